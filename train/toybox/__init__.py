"""Trains the toybox's small backbones, in the published formats of the large ones."""
