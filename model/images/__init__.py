"""From photos and masks to what the models read."""
