"""What scoring costs beside the models' own work, as ratios from one run."""
