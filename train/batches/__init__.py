"""Training samples: triplets, sampler, mixture, arrays, uncached photos, prefetching, validation."""
