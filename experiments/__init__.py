"""The paper's tables on the toybox: training, measuring and documenting each run."""
