"""Where a method lives: what it adds to the frozen model, how it is trained, how it samples. See `base`."""
