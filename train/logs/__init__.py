"""Logs, progress and sample sheets of a run."""
