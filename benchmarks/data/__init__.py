"""What the data stages cost beside the work itself, as ratios from one run on one machine."""
