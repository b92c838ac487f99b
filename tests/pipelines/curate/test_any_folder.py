"""Whatever a folder of photos holds, every photo is a frame or a reject, or one sentence says why it is refused."""

import logging
import os
import random
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import tables
from pipelines.curate import duplicates
from pipelines.curate import stage as curate
from pipelines.curate.worker import CurateParams, CurateWorker, unpack
from pipelines.photos.archives import PACKED_SUFFIXES, SUFFIXES
from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import is_image
from runtime.errors import UserError
from tests.world.photos import blocks, encoded, png_header

SMALL = blocks(9, 72, 66)
DEEP = np.asarray(SMALL.convert("L")).astype(np.uint16) * 257
FRAMES = [blocks(k, 72, 66) for k in range(3)]
LATIN = "caf\udce9"  # a byte that is not UTF-8

CONTENTS = {
    **{f"photo {k}": encoded(blocks(k, 72, 66), "JPEG") for k in range(4)},
    "png": encoded(blocks(4, 72, 66)),
    "cmyk": encoded(blocks(5, 72, 66).convert("CMYK"), "JPEG"),
    "palette": encoded(blocks(6, 72, 66).quantize(16)),
    "sixteen bits": encoded(Image.fromarray(DEEP)),
    "animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "pixel": encoded(Image.new("RGB", (1, 1))),
    "cut off": encoded(blocks(7, 72, 66), "JPEG")[:900],
    "nothing": b"",
    "text": b"not a photo",
    "huge": png_header(60_000, 60_000),
    "mask": encoded(Image.new("L", (72, 66), 255)),
}

STEMS = (
    *("0", "1", "10", "a b", "caf\u00e9", "cafe\u0301", LATIN, "\U0001f642", "x" * 200, "\u6771\u4eac"),
    *("1.mask", "1_mask", "1-Mask", "1.jpg", "masks", "Masks", "masks_old", "images", "dataset", "captions"),
    *(".dot", "@eaDir", "$RECYCLE.BIN", "Thumbs", "_", "...", "%20", "a::b", "a:b", "#1", "[a]*?", "~", "-x"),
    *(" 1", "1 ", "a\nb", "a,b", '"q"', "\u200b", "\u0130", "a\\b", "x.zip", "x.tar", "\ufffd"),
)
SUFFIXES_OF_FILES = (
    *(".jpg", ".jpg", ".jpg", ".png", ".JPG", ".Jpeg", ".webp", ".gif", ".tif", ".bmp", ".jfif", ".avif"),
    *(".mask.png", ".MASK.PNG", ".jpg.png", ".heic", ".cr2", ".txt", "", ".zip", ".tar", ".tar.gz", ".7z"),
)
TEXTS = ("a mug", "", "a cafe\u0301", "mug, red", "\u3053\u308c\u306f", "x" * 300, "two\nlines", '"', "caf\u00e9 mug")

plain = st.sampled_from(("mug", "mug", "red", "caf\u00e9", "cafe\u0301", "blue"))
names = plain | st.sampled_from(STEMS)
tidy_folders = st.one_of(
    *[st.tuples(plain, names.filter(lambda name: name.lower() != "masks"))] * 3,
    st.tuples(plain, plain, st.sampled_from(("masks", "Masks", ".thumbs"))),
)
folders = st.one_of(
    *[tidy_folders, st.tuples(names, names)] * 3,
    st.tuples(names, names, st.sampled_from(("masks", "raw"))),
    st.lists(names, max_size=4).map(tuple),
)
last_names = st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(SUFFIXES_OF_FILES))
targets = st.sampled_from(("itself", "nowhere.jpg", "pipe", ".", "..", "0.jpg"))


@dataclass
class Tree:
    """Files by path (parts), what kind of thing is at other paths, and the captions."""

    files: dict[tuple[str, ...], str]
    links: dict[tuple[str, ...], str] = field(default_factory=dict)
    captions: bytes | None = None

    def write(self, root: Path, order: random.Random) -> None:
        """Write it below `root`, in some order; of two things that would be at one place the first in name order is."""
        taken: set[str] = set()
        things = [(parts, CONTENTS[name]) for parts, name in self.files.items()]
        things += [(parts, target) for parts, target in self.links.items()]
        kept = []
        for parts, what in sorted(things, key=lambda thing: thing[0]):
            path = "/".join(parts)
            parents = {"/".join(parts[:end]) for end in range(1, len(parts))}
            if path not in taken and not parents & {"/".join(p) for p, _ in kept}:
                taken |= {path, *parents}
                kept.append((parts, what))
        order.shuffle(kept)
        for parts, what in kept:
            file = root.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(what, bytes):
                file.write_bytes(what)
            elif what == "pipe":
                os.mkfifo(file)
            else:
                file.symlink_to(file.name if what == "itself" else what)
        root.mkdir(parents=True, exist_ok=True)
        if self.captions is not None and not (root / "captions.csv").exists():
            (root / "captions.csv").write_bytes(self.captions)


def csv_of(rows: list[tuple[str, str]], header: str, mark: bytes) -> bytes:
    quoted = (",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    return mark + "\r\n".join([header, *quoted]).encode("utf-8", "replace")


@st.composite
def trees(draw) -> Tree:
    """Mostly as the layout wants it, with names, contents and neighbours of all kinds."""
    at = draw(st.sampled_from((tidy_folders, tidy_folders, folders)))
    paths = st.builds(lambda folder, last: (*folder, last), at, last_names)
    files = draw(st.dictionaries(paths, st.sampled_from(tuple(CONTENTS)), max_size=8))
    links = draw(st.just({}) | st.dictionaries(paths, targets, max_size=2))
    if not draw(st.booleans()):
        return Tree(files, links)
    named = st.sampled_from(["/".join(parts) for parts in files] or ["mug/red/1.jpg"])
    rows = st.lists(st.tuples(named | paths.map("/".join), st.sampled_from(TEXTS)), max_size=3)
    mark = draw(st.sampled_from((b"", b"", b"\xef\xbb\xbf", b"\xff")))
    return Tree(files, links, csv_of(draw(rows), draw(st.sampled_from(("path,caption", "path,caption", "file"))), mark))


def curated(root: Path, out: Path, params: CurateParams) -> dict[str, bytes] | str:
    """The tables' bytes, or the sentence of the error."""
    source = SourceParams(name="own", layout="folder", root=str(root), split="train")
    try:
        items = sorted(curate.items_of(source, 24), key=lambda item: tables.path_order(item.id))
    except UserError as error:
        return str(error).replace(str(root), "ROOT")
    results = CurateWorker(params, [source]).compute([item.payload for item in items])
    ids: list[str] = []
    for item, rows in zip(items, results, strict=True):
        ids += item.frame_ids
        assert sorted(item.frame_ids) == sorted(
            [r["frame_id"] for r in rows["frames"]] + [r["id"] for r in rows["rejects"]]
        )
        for row in rows["frames"]:
            assert row["caption"][row["noun_start"] : row["noun_end"]].casefold() == row["class_name"].casefold() != ""
    assert len(ids) == len(set(ids)) and ids
    for name in ("frames", "rejects"):
        tables.write(out, name, tables.from_rows(name, [row for rows in results for row in rows[name]]))
    duplicates.drop(out, params.filters.duplicate_bits, params.min_views, {item.id: item.views for item in items})
    kept = tables.read(out, "frames", ["frame_id"])["frame_id"].to_pylist()
    assert sorted(ids) == sorted(kept + tables.read(out, "rejects", ["id"])["id"].to_pylist())
    return {name: b"".join(part.read_bytes() for part in tables.parts(out, name)) for name in ("frames", "rejects")}


def shown(path: str) -> str:
    return Root(".").name(path).removeprefix("./")


def check_complete(root: Path, messages: list[str]) -> None:
    """Every file in a subject folder has a row, every mask a photo or a message, every archive elsewhere a message."""
    source = SourceParams(name="own", layout="folder", root=str(root), split="train")
    photos = [photo for item in curate.items_of(source, 24) for photo in unpack(item.payload).photos]
    rows, masks = {photo.path for photo in photos}, {photo.mask_path for photo in photos} - {None}
    unmatched = sum(int(found[1]) for found in map(re.compile(r"(\d+) masks? match").match, messages) if found)
    loose = 0
    for file in root.rglob("*"):
        if file.is_dir() and not file.is_symlink():
            continue
        path = os.fsencode(file.relative_to(root)).decode("utf-8", "replace")
        parts, last = path.split("/"), path.rpartition("/")[2]
        if any(map(is_hidden, parts)):
            assert path not in rows
        elif len(parts) in (3, 4) and (parts[2].lower() == "masks" or ("mask" in last.lower() and is_image(last))):
            loose += path not in rows | masks
        elif len(parts) == 3 or is_image(last):
            assert path in rows
        elif last.lower().endswith((*SUFFIXES, *PACKED_SUFFIXES)):
            assert any(f"{shown(path)} is skipped" in message for message in messages)
    assert loose == unmatched


def pack(root: Path, file: Path) -> Path | None:
    """The folder as an archive without empty folders; None where the archive cannot hold it."""
    inside = [path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if any(path.is_symlink() or not path.is_file() or {"\\", "\udce9"} & set(str(path)) for path in inside):
        return None
    if file.suffix == ".tar":
        with tarfile.open(file, "w") as tar:
            for path in inside:
                tar.add(path, str(path.relative_to(root)), recursive=False)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for path in inside:
                archive.write(path, str(path.relative_to(root)))
    return file


@pytest.fixture(scope="module")
def params(section) -> CurateParams:
    return section("curate", CurateParams)


@settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees())
def test_every_photo_of_any_folder_is_a_row_or_the_folder_is_refused(tree, params, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("any")
    for number in (0, 1):
        tree.write(folder / f"{number}/root", random.Random(number))
    caplog.clear()
    first = curated(folder / "0/root", folder / "0/out", params)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.MonkeyPatch.context() as patch:
        listing = LocalFileSystem.ls
        patch.setattr(LocalFileSystem, "ls", lambda self, *args, **options: listing(self, *args, **options)[::-1])
        assert curated(folder / "1/root", folder / "1/out", params) == first
    if isinstance(first, str):
        assert "ROOT" in first and "; " in first and "\n" not in first
        return
    check_complete(folder / "0/root", messages)
    for suffix in (".tar", ".zip"):
        archive = pack(folder / "0/root", folder / f"packed{suffix}")
        if archive is not None:
            assert curated(archive, folder / f"out{suffix}", params) == first
