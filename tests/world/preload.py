"""What ranks would each spend seconds on, done once in the process that they are forked from: see `tests.world.ranks`."""

import importlib
import os

# DeepSpeed and torch read these when they are imported.
os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

SLOW = ("torch._dynamo", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer")

for name in (*SLOW, "train.run", "train.trainer"):
    importlib.import_module(name)

deepspeed, recipe = importlib.import_module("deepspeed"), importlib.import_module("train.recipe")
assert deepspeed.ops.__compatible_ops__  # asks for each of its C++ operators whether it could be built here
recipe.run_code()  # reads the repository's modules
