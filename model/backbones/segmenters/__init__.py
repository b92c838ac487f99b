"""Segmenters: SAM of segment_anything, SAM 2 of transformers; both are prompted with a box or points."""
