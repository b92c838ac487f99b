"""What the small backbones learn from."""
