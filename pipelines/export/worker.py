"""Shards of a plan -> files at the destination, and a row for each pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.engine.shards import Rows
from pipelines.export.destination import Destination
from pipelines.export.formats import FORMATS, EncodedPair
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from pipelines.export.records import attribution, licence, record
from pipelines.export.render import render
from pipelines.photos.prefetch import prefetch
from pipelines.photos.roots import Roots, SourceParams


class ExportWorker:
    """Reads the photos of pairs, cuts, resizes and encodes them in `decoders` threads, and writes shards."""

    def __init__(
        self, form: str, options: ExportOptions, sources: Sequence[SourceParams], out: str, decoders: int = 0
    ) -> None:
        """`form`: name of the format. `out`: the destination."""
        self.format, self.options, self.decoders = FORMATS[form], options, decoders
        self.roots, self.destination = Roots(sources), Destination(out)

    def compute(self, payloads: Sequence[Part]) -> list[Rows]:
        return [self.write(part) for part in payloads]

    def write(self, part: Part) -> Rows:
        """Write a shard and return the rows of its pairs."""
        for source in {pair[role]["source"] for pair in part.pairs for role in self.options.roles()}:
            self.roots[source]  # opened here, not concurrently by several threads
        with self.destination.writing(part.name) as folder:
            entries = list(self.entries(part, folder))
        return {"exports": [self.row(part, pair, entry) for pair, entry in zip(part.pairs, entries, strict=True)]}

    def entries(self, part: Part, folder: Path) -> Iterator[str]:
        """Write the files of a shard below `folder`; yield what the format's index says of each pair."""
        ahead = 2 * max(self.decoders, 1)
        return self.format.write(part, prefetch(self.encoded, part.pairs, self.decoders, ahead), folder, self.options)

    def encoded(self, pair: dict[str, Any]) -> EncodedPair:
        """Return a pair with its images encoded; called by threads."""
        images = render(self.roots, pair, self.options)
        files = self.format.encode(images, self.options)
        captions = {role: pair[role]["caption"] for role in images}
        return EncodedPair(pair["number"], record(pair, images, self.options), captions, files)

    def row(self, part: Part, pair: dict[str, Any], entry: str) -> dict[str, Any]:
        """Return the row of a pair in the exports table."""
        triplet = pair["triplet"]
        return {
            "split": part.split,
            "number": pair["number"],
            "part": part.index,
            "triplet_id": triplet["triplet_id"],
            "subject_id": triplet["subject_id"],
            "class_name": triplet["class_name"],
            "angle": triplet["reference_target_angle"],
            "licence": licence(pair, self.options),
            "attribution": attribution(pair, self.options),
            "file": self.format.holder(part.split, part.index, pair["number"], self.options),
            "entry": entry,
        }
