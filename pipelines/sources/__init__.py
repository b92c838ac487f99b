"""Readers of raw photo layouts, one module each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from pipelines.photos.licences import normalised
from pipelines.photos.roots import Root, SourceParams
from pipelines.sources import celebahq, dreambench, ffhq, generated, mvimgnet, openimages, portraits, video
from pipelines.sources.base import LicensedSource, Photo, Pose, Prompt, Source, Subject
from pipelines.sources.celebahq import CelebAHQ
from pipelines.sources.dreambench import DreamBench
from pipelines.sources.ffhq import FFHQ
from pipelines.sources.folder import Folder
from pipelines.sources.generated import Generated
from pipelines.sources.mvimgnet import MVImgNet
from pipelines.sources.openimages import OpenImages
from pipelines.sources.portraits import Portraits
from pipelines.sources.turntables import uco3d
from pipelines.sources.turntables.co3d import CO3D
from pipelines.sources.turntables.uco3d import UCO3D
from pipelines.sources.video import Video
from runtime.errors import UserError

LAYOUTS: dict[str, Callable[[SourceParams], Source]] = {
    "mvimgnet": MVImgNet,
    "openimages": OpenImages,
    "dreambench": DreamBench,
    "folder": Folder,
    "ffhq": FFHQ,
    "celebahq": CelebAHQ,
    "portraits": Portraits,
    "video": Video,
    "co3d": CO3D,
    "generated": Generated,
    "uco3d": UCO3D,
}

__all__ = ["LAYOUTS", "Photo", "Pose", "Prompt", "Source", "SourceParams", "Subject", "open_source"]


# Files that only roots of one layout have.
_SIGNS: dict[str, str] = {
    mvimgnet.CATEGORIES: "mvimgnet",
    dreambench.LISTING: "dreambench",
    PurePosixPath(dreambench.LISTING).name: "dreambench, whose root is the folder above",
    **dict.fromkeys(openimages.CLASS_FILES, "openimages"),
    ffhq.LISTING: "ffhq",
    celebahq.FOLDER: "celebahq",
    portraits.CONSENT: "portraits",
    video.SEGMENTS: "video",
    generated.LISTING: "generated",
    uco3d.METADATA: "uco3d",
}


def open_source(params: SourceParams) -> Source:
    """Return the reader of a source; its entry's licence and attribution are those of photos of which it knows none.

    Raises:
        UserError: its root does not exist, or has the files of another layout.
    """
    source = LAYOUTS[params.layout](params)
    root = Root(params.root)
    signs = {sign: layout for sign, layout in _SIGNS.items() if root.exists(sign)}
    if signs and params.layout not in signs.values():
        sign, layout = next(iter(signs.items()))
        raise UserError(f"'{params.root}' is no root of layout {params.layout}: it has {sign}; use layout {layout}")
    if params.licence is None and params.attribution is None:
        return source
    return LicensedSource(source, normalised(params.licence), params.attribution)
