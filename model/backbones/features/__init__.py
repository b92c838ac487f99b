"""Which frozen image encoder a method reads, and the hidden states of two towers."""
