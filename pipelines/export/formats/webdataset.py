"""WebDataset: tar files in which the files of a pair follow each other and share a stem."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.export.formats.base import EncodedPair, Format, line
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part


class WebDataset(Format):
    """`train-000000.tar` with `00000000.target.jpg`, `.reference.jpg`, `.txt` and `.json` of each pair."""

    name = "webdataset"
    summary = "tar shards of WebDataset"

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        # USTAR, and no time, owner or mode of this machine: the same pairs are the same bytes.
        with tarfile.open(folder / f"{part.name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for pair in pairs:
                files = {f"{role}{suffix}": data for role, (suffix, data) in pair.files.items()}
                files |= {"txt": pair.record["text"].encode(), "json": line(pair.record).encode()}
                for ending, data in files.items():
                    member = tarfile.TarInfo(f"{pair.key}.{ending}")
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
                yield ""

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"{Part(split, index, ()).name}.tar"

    def data_files(self, split: str) -> str | None:
        return f"{split}-*.tar"

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return 'webdataset.WebDataset(sorted(glob.glob("train-*.tar")), shardshuffle=100).shuffle(1000).decode("pil")'
