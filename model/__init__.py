"""The network: backbones, MFI encoder, decoupled cross-attention, losses, pipeline."""
