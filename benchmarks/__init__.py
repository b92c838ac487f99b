"""What the code costs beside the work itself, as ratios of one run. Nothing imports this package."""
