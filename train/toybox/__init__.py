"""Trains the embedded world's small backbones, in the formats in which the large ones are published."""
