"""The models on tensors without data: sizes, memory and operations without weights."""
