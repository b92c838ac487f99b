"""The formats of an export, one module each."""

from pipelines.export.formats.ai_toolkit import AIToolkit
from pipelines.export.formats.base import EncodedPair, Format
from pipelines.export.formats.imagefolder import ImageFolder
from pipelines.export.formats.ominicontrol import OminiControl
from pipelines.export.formats.parquet import Parquet
from pipelines.export.formats.simpletuner import SimpleTuner
from pipelines.export.formats.uno import Uno
from pipelines.export.formats.webdataset import WebDataset

FORMATS: dict[str, Format] = {
    made.name: made
    for made in (WebDataset(), ImageFolder(), Parquet(), AIToolkit(), SimpleTuner(), Uno(), OminiControl())
}
"""By the name that --format takes."""

__all__ = ["FORMATS", "EncodedPair", "Format"]
