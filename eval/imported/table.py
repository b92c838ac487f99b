"""Images made elsewhere as rows of the generations table, and the record of what was asked beside it."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from eval.imported.coverage import check_same, questions, remarks
from eval.imported.listing import ImageList, NamedImage, first_of, list_images
from eval.imported.names import names_in
from eval.protocol import protocol
from eval.protocol.protocol import LEAVE_ONE_OUT, ProtocolParams, read_protocol
from pipelines import tables
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.prefetch import prefetch
from runtime.errors import UserError
from runtime.files import write_json
from runtime.lock import exclusive
from runtime.params import RunParams
from runtime.progress import Progress

Row = dict[str, Any]
Piece = tuple[list[list[str]], list[Row]]
"""A method's rows of one subject, with the key they are sorted by."""
ASKED = ("subject_id", "group", "prompt_id", "prompt", "reference")
RESERVED = ("real", "copy")
"""Methods of the score stage's own."""
LONGEST_NAME = 60
SMALLEST = 16
"""px; below, encoders see nothing but upscaling."""
PNG = b"\x89PNG\r\n\x1a\n"
AHEAD = 16
"""Images read in advance."""
IMPORTED = "imported"
"""Key of generate's protocol.json that lists the methods whose images were made elsewhere, and their reference rule."""


@dataclass
class Seen:
    """What the images of a method look like."""

    sizes: Counter[str] = field(default_factory=Counter)
    blank: list[str] = field(default_factory=list)
    """Images of a single colour."""
    faults: list[str] = field(default_factory=list)
    """Images that cannot be read."""


def import_images(
    data: Path,
    places: Sequence[str],
    methods: Sequence[str],
    token: str,
    params: ProtocolParams,
    photo_quality: Collection[str],
    run: RunParams,
) -> None:
    """Add the images in `places` to the generations table in `data`, and print what was found.

    The other methods of the table stay; a method of the same name that was imported before is replaced. The table and
    its record are replaced as a whole, once every image has been read.

    Args:
        places: a folder or archive of `<subject>/<prompt>_<seed>.png`, or a CSV file, for each method.
        methods: their names; empty: those of the places.
        token: see `Names`.
        photo_quality: mask qualities of the photos that images are compared with.

    Raises:
        UserError: a name means nothing, an image cannot be read, the methods have images of different prompts, or a
            reference is unknown although images are to be compared only with the other photos.
    """
    if not all(place.strip() for place in places):
        raise UserError("--images names no folder or file; give its path")
    if methods and len(methods) != len(places):
        raise UserError(f"there are {len(places)} --images and {len(methods)} --method-name; give one name for each")
    chosen = methods or [method_name(place) for place in places]
    subjects = protocol.held_out(data)
    usable = {p.frame_id for subject in subjects for p in subject.photos if p.quality in photo_quality}
    unusable = {p.frame_id for subject in subjects for p in subject.photos} - usable
    names = names_in(subjects, protocol.prompts_by_subject(data), params, usable, token)
    unusable |= {row["id"] for row in tables.rows(data / "curate", "rejects", ["id"])}
    out = data / "generate"
    with exclusive("generate", Path(run.work)):
        recorded = record_in(out)
        check_names(chosen, recorded)
        listings = [list_images(place, method, names, unusable) for place, method in zip(places, chosen, strict=True)]
        kept = {name for name in (*recorded.get("methods", {}), *recorded.get(IMPORTED, {})) if name not in chosen}
        made = asked_by(out, kept) if kept else {}
        asked = made | {listing.method: asked_for(listing.images) for listing in listings}
        rule = rule_of(recorded, params)
        check_asked(asked, rule, recorded)
        seen = {listing.method: Seen() for listing in listings}
        write_table(out, listings, kept, names.subjects, seen, run)
        imported = {name: of for name, of in recorded.get(IMPORTED, {}).items() if name in made} | {
            listing.method: summary_of(listing, seen[listing.method]) for listing in listings
        }
        if "methods" not in recorded:
            every = (question for of in asked.values() for question in of)
            identifier = protocol.prompts_id(subjects, every, rule == LEAVE_ONE_OUT)
            recorded = {"id": identifier, "protocol": {"reference": rule, "prompt_set": params.prompt_set}}
        write_json(out / "protocol.json", recorded | {IMPORTED: imported})
    for listing in listings:
        of = seen[listing.method]
        print(
            f"{listing.method}: {len(listing.images)} images of {len({i.subject_id for i in listing.images})} subjects"
        )
        told = [*listing.remarks, *remarks(questions(asked_for(listing.images)), names), *remarks_on(of)]
        for line in told:
            print(f"  {line}")


def method_name(place: str) -> str:
    """Return the name of the folder, or of the archive or CSV file without its suffix."""
    path = PurePosixPath(place.rstrip("/") if "://" in place else str(Path(place).expanduser().resolve()))
    return path.stem if path.suffix.lower() in (".csv", ".tar", ".zip") else path.name


def check_names(methods: Sequence[str], recorded: dict[str, Any]) -> None:
    """Raise UserError if a name cannot be that of a method, is given twice, or is taken by one that generate ran."""
    for name in methods:
        if not name.isprintable() or not name.strip() or "/" in name or len(name) > LONGEST_NAME:
            raise UserError(
                f"{name[:LONGEST_NAME]!r} cannot name a method; give --method-name, at most {LONGEST_NAME} characters "
                f"without a slash"
            )
        if name in RESERVED:
            raise UserError(f"'{name}' is an oracle of the score stage; give the images another --method-name")
        if list(methods).count(name) > 1:
            raise UserError(f"two --images have the name '{name}'; give each its own --method-name")
        if name in recorded.get("methods", {}):
            raise UserError(f"'{name}' was generated here; give the images another --method-name")


def record_in(folder: Path) -> dict[str, Any]:
    """Return the protocol.json beside a generations table; empty if there is none yet."""
    file = folder / "protocol.json"
    found = read_protocol(file) if file.is_file() else {}
    if found and not {"methods", IMPORTED} & found.keys():
        raise UserError(f"{file} has no 'methods'; run the generate stage again")
    return found


def rule_of(recorded: dict[str, Any], params: ProtocolParams) -> str:
    """Return the reference rule of a table: generate's where it wrote some of the rows, else leave_one_out where
    params.yaml says so, or `IMPORTED`: an image is compared with all photos, whatever its reference."""
    if "methods" in recorded:
        rule: str = recorded["protocol"]["reference"]
        return rule
    return LEAVE_ONE_OUT if params.reference == LEAVE_ONE_OUT else IMPORTED


def check_asked(asked: dict[str, list[protocol.Asked]], rule: str, recorded: dict[str, Any]) -> None:
    """Raise UserError unless all methods have images of the same prompts, and known references where they matter."""
    found = {method: questions(of) for method, of in asked.items()}
    first = next(iter(found))
    for method, own in found.items():
        check_same(method, own, first, found[first])
        unknown = [question for question in asked[method] if not question[4]]
        if rule == LEAVE_ONE_OUT and unknown:
            where = "the images generated here were" if "methods" in recorded else "generate.protocol.reference is"
            raise UserError(
                f"{where} to be compared by {LEAVE_ONE_OUT}, and {len(unknown)} images of {method} have no known "
                f"reference with a usable mask; give them in the column reference of a CSV file, or choose another rule"
            )


def asked_by(folder: Path, methods: Collection[str]) -> dict[str, list[protocol.Asked]]:
    """Return what the images of some methods of a generations table were asked for."""
    found: dict[str, list[protocol.Asked]] = {}
    for row in tables.rows(folder, "generations", ["method", *ASKED]):
        if row["method"] in methods:
            found.setdefault(row["method"], []).append(tuple(row[name] for name in ASKED))
    return found


def asked_for(images: Iterable[NamedImage]) -> list[protocol.Asked]:
    """Return what images were asked for."""
    return [(i.subject_id, i.prompt.group, i.prompt.prompt_id, i.prompt.text, i.reference) for i in images]


def write_table(
    out: Path,
    listings: Sequence[ImageList],
    kept: Collection[str],
    subjects: Mapping[str, protocol.HeldOutSubject],
    seen: dict[str, Seen],
    run: RunParams,
) -> None:
    """Replace the generations table by the rows of its `kept` methods and those of the listings, one subject of a
    method in memory at a time; an image that cannot be read leaves the table as it was."""
    progress = Progress("images", sum(len(listing.images) for listing in listings), "image")

    def pieces() -> Iterator[pa.Table]:
        parts = [kept_pieces(out, kept)] if kept else []
        ordered = sorted(listings, key=lambda listing: tables.path_order(listing.method))
        parts += [new_pieces(listing, subjects, seen[listing.method], run, progress) for listing in ordered]
        for _, rows in heapq.merge(*parts, key=lambda piece: piece[0]):
            yield tables.from_rows("generations", rows)
        faults = [(method, of.faults) for method, of in seen.items() if of.faults]
        if faults:
            told = ", ".join(f"{method}: {first_of(of)}" for method, of in faults)
            raise UserError(f"images that cannot be scored: {told}; make them again, or leave them out")

    try:
        tables.write_parts(out, "generations", pieces())
    finally:
        progress.close()


def kept_pieces(folder: Path, methods: Collection[str]) -> Iterator[Piece]:
    """Yield the rows of some methods of a generations table, in its order."""
    rows = (row for row in tables.rows(folder, "generations") if row["method"] in methods)
    for key, group in groupby(rows, key=lambda row: (row["method"], row["subject_id"])):
        yield [tables.path_order(part) for part in key], list(group)


def new_pieces(
    listing: ImageList, subjects: Mapping[str, protocol.HeldOutSubject], seen: Seen, run: RunParams, progress: Progress
) -> Iterator[Piece]:
    """Yield the rows of a listing's images, in the order of the table; without the images that cannot be read."""
    order = sorted(listing.images, key=lambda i: (tables.path_order(i.subject_id), i.prompt.prompt_id, i.seed))
    for subject_id, group in groupby(order, key=lambda image: image.subject_id):
        images = list(group)
        read = prefetch(lambda image: read_image(listing, image), images, run.decoders, AHEAD)
        numbers: Counter[int] = Counter()
        rows = []
        for image, found in zip(images, read, strict=True):
            progress.advance(1)
            if isinstance(found, str):
                seen.faults.append(found)
                continue
            png, pixels = found
            seen.sizes[f"{pixels.width}x{pixels.height}"] += 1
            if all(low == high for low, high in np.atleast_2d(pixels.getextrema())):
                seen.blank.append(image.path)
            rows.append(
                {
                    "method": listing.method,
                    "subject_id": subject_id,
                    "class_name": subjects[subject_id].class_name,
                    "partner": None,
                    "prompt_id": image.prompt.prompt_id,
                    "group": image.prompt.group,
                    "prompt": image.prompt.text,
                    "index": numbers[image.prompt.prompt_id],
                    "seed": image.seed,
                    "reference": image.reference,
                    "image": png,
                }
            )
            numbers[image.prompt.prompt_id] += 1
        yield [tables.path_order(part) for part in (listing.method, subject_id)], rows


def read_image(listing: ImageList, image: NamedImage) -> tuple[bytes, Image.Image] | str:
    """Return an image as PNG and its pixels [RGB], or what is wrong with it."""
    try:
        data = listing.root.read(image.path)
        pixels = decode_image(data)
    except (FileNotFoundError, DecodeError) as error:
        return f"'{image.path}' cannot be read ({error})"
    if min(pixels.size) < SMALLEST:
        return f"'{image.path}' has {pixels.width}x{pixels.height} px, a side below {SMALLEST}"
    return as_png(data, pixels), pixels


def as_png(data: bytes, pixels: Image.Image) -> bytes:
    """Return a PNG of these pixels: `data` itself if it is one, and is read as they are without turning or blending."""
    if data.startswith(PNG):
        with Image.open(io.BytesIO(data)) as image:
            if image.size == pixels.size and np.array_equal(np.asarray(image.convert("RGB")), np.asarray(pixels)):
                return data
    stream = io.BytesIO()
    pixels.save(stream, "PNG")
    return stream.getvalue()


def summary_of(listing: ImageList, seen: Seen) -> dict[str, Any]:
    """Return what protocol.json records of a method's images."""
    return {
        "images": len(listing.images),
        "references_known": sum(image.reference != "" for image in listing.images),
        "sizes": dict(sorted(seen.sizes.items())),
    }


def remarks_on(seen: Seen) -> Iterator[str]:
    """Yield sentences on how a method's images look."""
    if len(seen.sizes) > 1:
        yield "sizes differ: " + ", ".join(f"{size} ({count})" for size, count in seen.sizes.most_common(5))
    if seen.blank:
        yield f"{len(seen.blank)} images of a single colour, as a safety filter leaves them: {first_of(seen.blank)}"
