"""Deleting a subject from all that was made of its photos."""
