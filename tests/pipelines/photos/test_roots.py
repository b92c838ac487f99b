import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.photos.decode import DecodeError, decode_grey, decode_image, decode_mask_image
from pipelines.photos.roots import Root, Roots
from pipelines.sources import SourceParams
from runtime.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 6)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and ends where its pixels would begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return head + struct.pack(">I", 1000) + b"IDAT"


PHOTO = encoded(noise(), "JPEG")


def reason(data: bytes, max_pixels: int | None = None) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, max_pixels)
    assert caught.value.detail
    return caught.value.reason


def test_no_bytes_are_empty():
    assert reason(b"") == "empty"


@pytest.mark.parametrize("data", [PHOTO[: len(PHOTO) // 2], PHOTO[:20], b"not an image", encoded(noise())[:60]])
def test_truncated_or_foreign_bytes_are_unreadable(data):
    assert reason(data) == "unreadable"


def test_postscript_is_never_interpreted():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n") == "unreadable"


def test_huge_photo_is_known_from_its_header():
    assert reason(png_header(100, 101), max_pixels=10_000) == "huge"
    assert reason(PHOTO, max_pixels=53) == "huge"
    assert decode_image(PHOTO, max_pixels=54).size == (9, 6)


@pytest.mark.parametrize("max_pixels", [None, 10_000, 10**12])
def test_decompression_bomb_is_huge_and_warns_nobody(max_pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png_header(60_000, 60_000), max_pixels) == "huge"
        assert reason(png_header(10_000, 10_000), max_pixels) == ("huge" if max_pixels == 10_000 else "unreadable")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_upright_by_its_exif_orientation(orientation):
    upright = noise()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that a camera in that orientation applies
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_image(encoded(stored, exif=exif)), upright)


def test_broken_exif_does_not_spoil_the_photo():
    assert decode_image(encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")).size == (9, 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_mode_of_every_format_becomes_rgb(mode, kind):
    image = noise("RGB").convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} cannot store {mode}")
    decoded = decode_image(data)
    assert (decoded.mode, decoded.size) == ("RGB", (9, 6))
    grey, size = decode_grey(data)
    assert (grey.mode, grey.size, size) == ("L", (9, 6), (9, 6))
    assert np.abs(np.asarray(grey, int) - np.asarray(decoded.convert("L"), int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("least", "part"), [(0, 1), (33, 1), (32, 2), (17, 2), (16, 4), (8, 8), (1, 8)])
def test_large_jpeg_is_decoded_as_small_as_is_allowed(orientation, least, part):
    image = noise().resize((96, 64), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    grey, size = decode_grey(data, least=least)
    whole = decode_image(data)
    assert size == whole.size
    assert grey.size == tuple(side // part for side in size)
    expected = whole.convert("L").resize(grey.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(grey, float) - np.asarray(expected, float)).mean() < 3


def test_file_out_of_reach_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    root = Root(str(tmp_path))
    for path in ("b.jpg", "a.jpg/b", ""):
        with pytest.raises(FileNotFoundError):
            root.read(path)
    with pytest.raises(FileNotFoundError):
        root.info("b.jpg")
    for error in (PermissionError("not yours"), TimeoutError("too slow"), RuntimeError("the store said no")):
        for name in ("cat_file", "info"):
            monkeypatch.setattr(root._fs, name, Mock(side_effect=error))
        for ask in (root.read, root.info):
            with pytest.raises(UserError, match=f"a.jpg cannot be read .{error}.; .* run the same command again"):
                ask("a.jpg")


@pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("the store said no")])
def test_nothing_out_of_reach_is_taken_for_absent(tmp_path, monkeypatch, error):
    (tmp_path / "captions.csv").write_text("path,caption\n")
    root = Root(str(tmp_path))
    for name in ("ls", "info", "isdir", "open"):
        monkeypatch.setattr(root._fs, name, Mock(side_effect=error))
    for ask in (root.ls, root.files, root.folders, root.exists, root.isdir):
        with pytest.raises(UserError, match=f"captions.csv cannot be read .{error}.; .* run the same command again"):
            ask("captions.csv")
    with pytest.raises(UserError, match=f"captions.csv cannot be read .{error}."):
        list(root.lines("captions.csv"))
    for ask in (root.read, root.info, root.files):
        with pytest.raises(UserError, match=f"x.zip/1.jpg cannot be read .{error}."):
            ask("x.zip/1.jpg")


def test_palette_colours_survive():
    image = noise().quantize(8)
    assert np.array_equal(decode_image(encoded(image)), image.convert("RGB"))


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode_image(encoded(image))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(decode_image(encoded(image)))[0, :, 0].tolist() == [0, 128, 255]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_decode_error(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
    damaged = bytearray(encoded(noise(), kind))
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    for decode in (decode_image, decode_mask_image, lambda *given: decode_grey(*given, least=2)):
        try:
            decode(bytes(damaged), 10_000)
        except DecodeError as error:
            assert error.reason in {"empty", "unreadable", "huge"}


EXPECTED = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(
    "kind",
    ["grey", "zero_one", "one_bit", "colour", "palette", "sixteen", "alpha", "grey_alpha", "opaque", "grey_opaque"],
)
def test_masks_are_read_however_they_are_stored(kind):
    grey = Image.fromarray(EXPECTED.astype(np.uint8) * 255)
    palette = Image.fromarray(EXPECTED.astype(np.uint8))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    image = {
        "grey": grey,
        "zero_one": Image.fromarray(EXPECTED.astype(np.uint8)),
        "one_bit": grey.convert("1"),
        "colour": Image.merge("RGB", (grey, Image.new("L", grey.size), Image.new("L", grey.size))),
        "palette": palette,
        "sixteen": Image.fromarray(EXPECTED.astype(np.uint16) * 65535),
        "alpha": Image.merge("RGBA", (*noise(size=grey.size).split(), grey)),
        "grey_alpha": Image.merge("LA", (Image.new("L", grey.size, 255), grey)),
        "opaque": grey.convert("RGBA"),
        "grey_opaque": grey.convert("LA"),
    }[kind]
    mask = decode_mask_image(encoded(image))
    assert mask.dtype == bool
    assert np.array_equal(mask, EXPECTED)


def test_mask_is_cut_at_half():
    assert decode_mask_image(encoded(Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)))).tolist() == [
        [False, False, True, True]
    ]


def test_black_mask_is_empty_and_mask_errors_have_reasons():
    assert not decode_mask_image(encoded(Image.new("L", (3, 2)))).any()
    with pytest.raises(DecodeError, match="huge"):
        decode_mask_image(png_header(100, 100), 100)
    with pytest.raises(DecodeError, match="empty"):
        decode_mask_image(b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in ("b/2.jpg", "b/1.jpg", "a.txt", ".hidden"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return tmp_path


def test_root_lists_and_reads_relative_paths(folder):
    root = Root(str(folder))
    assert root.ls() == [".hidden", "a.txt", "b"]
    assert root.files() == [".hidden", "a.txt"]
    assert root.folders() == ["b"]
    assert root.files("b") == ["1.jpg", "2.jpg"]
    assert root.read("b/1.jpg") == b"b/1.jpg"
    assert root.exists("b") and root.isdir("b") and not root.isdir("a.txt") and not root.exists("c")
    assert root.info("b/1.jpg") == (7, (folder / "b/1.jpg").stat().st_mtime)


def test_what_is_not_there_lists_as_nothing_and_reads_as_a_missing_file(folder):
    root = Root(str(folder))
    assert root.ls("c") == [] and root.files("a.txt/x") == []
    for call in (root.read, root.info):
        with pytest.raises(FileNotFoundError):
            call("c")


def test_links_to_folders_and_files_are_followed(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "link").symlink_to(folder / "b")
    (other / "photo.jpg").symlink_to(folder / "b/1.jpg")
    root = Root(str(other))
    assert (root.folders(), root.files(), root.files("link")) == (["link"], ["photo.jpg"], ["1.jpg", "2.jpg"])


def test_url_works_like_a_folder():
    memory = fsspec.filesystem("memory")
    memory.pipe("/photos-of-test/x/1.jpg", b"one")
    root = Root("memory://photos-of-test")
    assert (root.folders(), root.files("x")) == (["x"], ["1.jpg"])
    assert root.exists("x") and root.exists("x/1.jpg") and not root.exists("x/2.jpg")
    assert root.read("x/1.jpg") == b"one"
    assert root.info("x/1.jpg")[0] == 3
    memory.rm("/photos-of-test", recursive=True)


def test_root_travels_to_workers(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    root = Root(folder.name)
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(root)).read("a.txt") == b"a.txt"


def test_relative_root_is_the_same_folder_for_a_worker_elsewhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    source = SourceParams(name="own", layout="folder", root=folder.name, split="train")
    sent = pickle.dumps([source])
    monkeypatch.chdir("/")
    root = Roots(pickle.loads(sent))["own"]
    assert root.read("a.txt") == b"a.txt"
    assert root.name("a.txt") == f"{folder.name}/a.txt"  # as written, for tables must not tell where they were made
    assert source.model_dump() == {"name": "own", "layout": "folder", "root": folder.name, "split": "train"}


@pytest.mark.parametrize("url", ["nowhere/photos", "no-such-protocol://photos"])
def test_missing_root_is_named_with_what_to_do(url):
    with pytest.raises(UserError, match=rf"'{url}'.*params\.yaml"):
        Root(url)


def test_lines_drop_the_byte_order_mark_and_keep_line_ends(folder):
    (folder / "a.txt").write_bytes("\ufeffeins\r\nzwei é".encode())
    assert list(Root(str(folder)).lines("a.txt")) == ["eins\r\n", "zwei é"]
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        list(Root(str(folder)).lines("a.txt"))
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        list(Root(str(folder)).lines("none.txt"))


def test_roots_are_found_by_source_name(folder):
    def params(name: str) -> SourceParams:
        return SourceParams(name=name, layout="folder", root=str(folder), split="train")

    roots = Roots([params("one"), params("two")])
    assert roots["one"] is roots["one"]
    assert roots["two"].exists("a.txt")
    with pytest.raises(UserError, match="no source 'three'"):
        roots["three"]
    with pytest.raises(UserError, match="two sources 'one'"):
        Roots([params("one"), params("one")])
