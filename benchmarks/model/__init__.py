"""Cost of the adapter relative to a plain UNet and to diffusers' own IP-Adapter-plus, as ratios within one run."""
