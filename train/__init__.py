"""Training: tables in, adapter out."""
