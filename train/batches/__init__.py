"""Which samples make a step: triplets, sampler, mixture, arrays, uncached photos, prefetching, validation."""
