"""Images that other programs made of the held-out subjects, as methods of the generations table."""
