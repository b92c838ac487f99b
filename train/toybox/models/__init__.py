"""The small backbones, one module each: build, train, export, measure."""
