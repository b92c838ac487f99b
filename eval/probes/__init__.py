"""Probes of the adapter: S+ across views, location masks across steps."""
