"""Bytes of every kind become pixels one way, or say why not."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.photos.decode import DecodeError, decode_grey, decode_image, decode_mask_image
from tests.world.photos import encoded, png_header


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 6)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


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
