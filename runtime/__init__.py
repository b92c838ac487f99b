"""Foundation of all packages: errors, parameters, stages, the command line, files, locks, progress."""

import os

# Read by MKL at its first call. Without STRICT its AVX2 kernels round a row by its place in the batch, and a photo's
# result would depend on which photos share its batch; the AVX-512 kernels compute the same bits either way.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
