"""What the adapter costs beside a bare UNet and beside diffusers' own IP-Adapter-plus, as ratios from one run."""
