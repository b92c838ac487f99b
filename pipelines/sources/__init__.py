"""Readers of raw photo layouts, one module each."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.photos.roots import SourceParams
from pipelines.sources.base import Photo, Pose, Prompt, Source, Subject
from pipelines.sources.dreambench import DreamBench
from pipelines.sources.folder import Folder
from pipelines.sources.mvimgnet import MVImgNet
from pipelines.sources.openimages import OpenImages

LAYOUTS: dict[str, Callable[[SourceParams], Source]] = {
    "mvimgnet": MVImgNet,
    "openimages": OpenImages,
    "dreambench": DreamBench,
    "folder": Folder,
}

__all__ = ["LAYOUTS", "Photo", "Pose", "Prompt", "Source", "SourceParams", "Subject", "open_source"]


def open_source(params: SourceParams) -> Source:
    """Return the reader of a source.

    Raises:
        UserError: its root does not exist.
    """
    return LAYOUTS[params.layout](params)
