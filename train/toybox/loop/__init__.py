"""Training of the small backbones: loop, optimizer, cards."""
