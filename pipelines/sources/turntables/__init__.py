"""Turntable videos of objects with masks and camera poses: CO3D and uCO3D."""
