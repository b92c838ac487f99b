"""Long computations on one machine that a killed run does not lose."""
