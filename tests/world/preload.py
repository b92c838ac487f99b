"""What ranks would each spend seconds on, done once in the process that they are forked from: see `tests.world.ranks`."""

import os

# DeepSpeed and torch read these when they are imported.
os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import torch._dynamo

import train.run
import train.trainer
from train.recipe import run_code

# Asks which of its C++ operators could be built here.
assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
run_code()
