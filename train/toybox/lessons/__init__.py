"""Training data of the small backbones."""
