"""Segmenters: SAM and SAM 2, prompted with a box or points, and SAM 3, prompted with a phrase."""
