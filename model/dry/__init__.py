"""The models on tensors without values: sizes, memory and operations without weights."""
