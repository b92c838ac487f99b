"""Customization methods: what each adds to the frozen model, how it is trained, how it samples. See `base`."""
