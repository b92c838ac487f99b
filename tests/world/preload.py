"""Imports and caches that all ranks need, set up once in the process they are forked from (`tests.world.ranks`)."""

import importlib
import os

# DeepSpeed and torch read these on import.
os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

SLOW = ("torch._dynamo", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer")

for name in (*SLOW, "train.run", "train.trainer"):
    importlib.import_module(name)

deepspeed, recipe = importlib.import_module("deepspeed"), importlib.import_module("train.recipe")
assert deepspeed.ops.__compatible_ops__  # probes which of its C++ operators can be built here
recipe.run_code()  # caches the imports of the repository's modules
