"""The paper's tables on the toybox: what is trained, measured and written down, run by run."""
