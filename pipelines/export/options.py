"""What an export holds: how the pairs are chosen, which images and columns are written, and how."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from model.images.references import MARGIN
from runtime.errors import UserError

REFERENCES = ("white", "alpha", "whole")
CROPS = ("square", "none")
ENCODINGS = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
"""Image formats, with the suffix of their files."""
FIELDS = ("mask", "box", "angle", "quality", "licence")
LEAST_SIZE = 16


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, all of which its bytes depend on.

    Attributes:
        size: px, the side of squares, and the most that the longer side of an uncropped photo has.
        reference: `white`: the subject alone on a white square; `alpha`: the same, transparent; `whole`: the photo.
        crop: `square`: photos are cropped to the largest square centred on the subject; `none`: they keep their shape.
        views: references of a pair, 1, or 2 with the triplet's positive.
        fields: of FIELDS, written beside images and caption.
        encoding: of ENCODINGS; images with transparency and masks are PNG where it has none.
        quality: of JPEG and WebP, 1..100.
        per_subject: the most pairs of a subject; None: all.
        validation: share of the subjects whose pairs are in the split `validation`, 0..1.
        part: pairs in a shard, the unit of work.
        margin: white border of a subject alone, as a fraction of its longer side.
    """

    size: int
    reference: str = "white"
    crop: str = "square"
    views: int = 1
    fields: tuple[str, ...] = ("box", "angle", "quality", "licence")
    encoding: str = "jpeg"
    quality: int = 95
    per_subject: int | None = None
    validation: float = 0.0
    part: int = 1000
    margin: float = MARGIN

    @property
    def suffix(self) -> str:
        """The suffix of opaque images."""
        return ENCODINGS[self.encoding]

    def roles(self) -> tuple[str, ...]:
        """Return what each image of a pair shows, target first."""
        return ("target", "reference", "positive")[: 1 + self.views]

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON-like data."""
        return asdict(self) | {"fields": list(self.fields)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that an export's content depends on."""
    standard = ExportOptions(size=0)
    images = parser.add_argument_group("images")
    images.add_argument("--size", type=int, metavar="PX", help="side of the images (default: the variant's resolution)")
    images.add_argument(
        "--reference",
        choices=REFERENCES,
        default=standard.reference,
        help="the subject alone on white or transparent, or its whole photo (default: %(default)s)",
    )
    images.add_argument(
        "--crop",
        choices=CROPS,
        default=standard.crop,
        help="square: photos cropped to a square around the subject; none: photos of any shape, their longer side at"
        " most --size (default: %(default)s)",
    )
    images.add_argument(
        "--views", type=int, choices=(1, 2), default=standard.views, help="references of a pair (default: %(default)s)"
    )
    images.add_argument(
        "--encoding", choices=tuple(ENCODINGS), default=standard.encoding, help="of images (default: %(default)s)"
    )
    images.add_argument(
        "--quality", type=int, default=standard.quality, metavar="N", help="of JPEG and WebP (default: %(default)s)"
    )
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--with",
        dest="fields",
        nargs="*",
        choices=FIELDS,
        default=list(standard.fields),
        metavar="FIELD",
        help=f"what is written beside images and caption, of {', '.join(FIELDS)} (default: all but mask)",
    )
    pairs.add_argument("--per-subject", type=int, metavar="N", help="at most so many pairs a subject (default: all)")
    pairs.add_argument(
        "--validation",
        type=float,
        default=standard.validation,
        metavar="SHARE",
        help="share of the subjects that go to the split validation (default: %(default)s)",
    )
    pairs.add_argument(
        "--shard-pairs",
        type=int,
        default=standard.part,
        metavar="N",
        help="pairs in a shard: a tar or Parquet file, and what a killed run loses at most (default: %(default)s)",
    )


def read(options: argparse.Namespace, resolution: int) -> ExportOptions:
    """Return the options of a command line; `resolution` is the default size.

    Raises:
        UserError: a number is out of range.
    """
    size = resolution if options.size is None else options.size
    at_least = (("--size", size, LEAST_SIZE), ("--shard-pairs", options.shard_pairs, 1))
    for flag, value, least in (*at_least, ("--per-subject", options.per_subject, 1)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value} is too small; give {least} or more")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality} is not in 1..100; 95 loses nothing that is seen")
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation {options.validation:g} is not a share; give 0 or more, and less than 1")
    return ExportOptions(
        size=size,
        reference=options.reference,
        crop=options.crop,
        views=options.views,
        fields=tuple(field for field in FIELDS if field in options.fields),
        encoding=options.encoding,
        quality=options.quality,
        per_subject=options.per_subject,
        validation=options.validation,
        part=options.shard_pairs,
    )
