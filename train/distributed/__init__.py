"""Ranks, the DeepSpeed engine, checkpoints, resuming, memory estimates."""
