"""Looks inside the adapter: S+ over views, location masks over steps."""
