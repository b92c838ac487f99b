"""How a small backbone is trained: loop, optimizer, cards."""
