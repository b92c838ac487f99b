"""Long, resumable computations on one machine."""
