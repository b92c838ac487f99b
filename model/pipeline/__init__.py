"""The diffusers pipelines."""

from model.pipeline.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline

__all__ = ["CustomContrastPipeline", "CustomContrastXLPipeline", "build_pipeline"]
