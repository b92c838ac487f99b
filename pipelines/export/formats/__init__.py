"""The formats of an export, one module each."""

from pipelines.export.formats.base import EncodedPair, Format
from pipelines.export.formats.imagefolder import ImageFolder
from pipelines.export.formats.webdataset import WebDataset

FORMATS: dict[str, Format] = {made.name: made for made in (WebDataset(), ImageFolder())}
"""By the name that --format takes."""

__all__ = ["FORMATS", "EncodedPair", "Format"]
