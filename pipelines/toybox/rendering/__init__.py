"""The renderer of the embedded worlds: distance functions, rays, surfaces, scenes, styles and what can be worn."""
