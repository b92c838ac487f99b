"""What the trainer costs beside the model's own step, and whether memory is what was told, as ratios from one run."""
