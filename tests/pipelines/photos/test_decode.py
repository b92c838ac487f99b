"""Bytes of every kind become pixels one way, or say why not."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from model.images import decode
from model.images.decode import mask as mask_of
from model.images.references import MARGIN, segment_photo
from model.images.segment import on_white
from pipelines.photos.decode import READS_AVIF, DecodeError, decode_grey, decode_image, decode_mask_image
from runtime.errors import ModelError
from tests.world.photos import encoded, png_header
from tests.world.subject import photo


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


def test_git_lfs_pointer_is_named_with_what_to_do():
    with pytest.raises(DecodeError, match="unreadable: a git-lfs pointer, not the file itself; run git lfs pull"):
        decode_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.skipif(not READS_AVIF, reason="Pillow is built without AVIF")
def test_avif_is_read():
    assert decode_image(encoded(noise(size=(64, 48)), "AVIF")).size == (64, 48)


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


def test_uncompressed_ycbcr_tiff_keeps_its_colours():
    photo = noise()
    decoded = decode_image(encoded(photo.convert("YCbCr"), "TIFF"))
    assert np.abs(np.asarray(decoded, int) - np.asarray(photo, int)).max() <= 3  # of the rounding of YCbCr


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
    for read in (decode_image, decode_mask_image, lambda *given: decode_grey(*given, least=2)):
        try:
            read(bytes(damaged), 10_000)
        except DecodeError as error:
            assert error.reason in {"empty", "unreadable", "huge"}


EXPECTED = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(
    "kind",
    [
        *("grey", "zero_one", "value_38", "value_127", "one_bit", "colour", "palette", "sixteen"),
        *("alpha", "black_alpha", "palette_alpha", "grey_alpha", "opaque", "grey_opaque", "float"),
    ],
)
def test_masks_are_read_however_they_are_stored(kind):
    grey = Image.fromarray(EXPECTED.astype(np.uint8) * 255)
    palette = Image.fromarray(EXPECTED.astype(np.uint8))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    image = {
        "grey": grey,
        "zero_one": Image.fromarray(EXPECTED.astype(np.uint8)),
        "value_38": Image.fromarray(EXPECTED.astype(np.uint8) * 38),
        "value_127": Image.fromarray(EXPECTED.astype(np.uint8) * 127),
        "float": Image.fromarray(np.where(EXPECTED, 0.98, 0.02).astype(np.float32)),
        "one_bit": grey.convert("1"),
        "colour": Image.merge("RGB", (grey, Image.new("L", grey.size), Image.new("L", grey.size))),
        "palette": palette,
        "sixteen": Image.fromarray(EXPECTED.astype(np.uint16) * 65535),
        "alpha": Image.merge("RGBA", (*noise(size=grey.size).split(), grey)),
        "black_alpha": Image.merge("RGBA", (*Image.new("RGB", grey.size).split(), grey)),
        "palette_alpha": Image.merge("RGBA", (*Image.new("RGB", grey.size, "white").split(), grey)).quantize(4),
        "grey_alpha": Image.merge("LA", (Image.new("L", grey.size, 255), grey)),
        "opaque": grey.convert("RGBA"),
        "grey_opaque": grey.convert("LA"),
    }[kind]
    data = encoded(image, "TIFF" if kind == "float" else "PNG")
    mask = decode_mask_image(data)
    assert mask.dtype == bool
    assert np.array_equal(mask, EXPECTED)
    reference = noise(size=grey.size)
    assert np.array_equal(
        segment_photo((reference, Image.open(io.BytesIO(data))), "mug", no_finder),
        segment_photo((reference, EXPECTED), "mug", no_finder),
    )


def no_finder():
    pytest.fail("nothing is to be found")


@pytest.mark.parametrize(
    "array",
    [
        EXPECTED.astype(np.uint8),
        EXPECTED * 38,
        EXPECTED.astype(float),
        np.where(EXPECTED, 0.98, 0.02),
        np.where(EXPECTED, [0.6, 0.7, 0.9], [0.1, 0.3, 0.4]),
        np.where(EXPECTED, [1.02, 1, 1], [-0.03, 0, 0]),
        np.where(EXPECTED, [200.0, 250.0, 255.0], [0.0, 2.0, 90.0]),
        EXPECTED[..., None],
        np.stack([EXPECTED * 255, EXPECTED * 0, EXPECTED * 0], axis=-1),
        np.stack([EXPECTED * 0 + 255] * 3 + [EXPECTED * 255], axis=-1),
    ],
)
def test_arrays_are_masks_cut_at_half_of_their_range(array):
    assert np.array_equal(mask_of(array), EXPECTED)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 3), np.nan), "not numbers; give 0 for background and 1 for the subject"),
        (np.array([[-8.0, 3.0, 9.0]]), "values from -8 to 9; give 0..1 or 0..255"),
        (np.zeros((1, 1, 2, 3)), r"an array of shape \(1, 1, 2, 3\); give \[height, width\]"),
        (np.zeros((2, 3)), "the mask has no subject pixel"),
    ],
)
def test_arrays_that_are_no_masks_are_one_sentence(array, message):
    with pytest.raises(ModelError, match=message):
        segment_photo((noise(size=(3, 2)), array), "mug", no_finder)


@pytest.mark.parametrize("kind", ["exif", "palette", "tRNS", "GIF", "sixteen", "thirty-two", "float"])
def test_a_reference_has_the_pixels_that_the_stages_see(kind):
    image, mask = photo()
    cut = image.convert("RGBA")
    cut.putalpha(Image.fromarray(mask))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    data = {
        "exif": lambda: encoded(cut.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "palette": lambda: encoded(cut.quantize(16)),
        "tRNS": lambda: encoded(decode.rgb(cut), transparency=(255, 255, 255)),
        "GIF": lambda: encoded(cut, "GIF"),
        "sixteen": lambda: encoded(Image.fromarray(deep)),
        "thirty-two": lambda: encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float": lambda: encoded(Image.fromarray((deep / 65535).astype(np.float32)), "TIFF"),
    }[kind]()
    opened = Image.open(io.BytesIO(data))
    whole = decode_image(data)
    given = opened if kind in ("exif", "palette", "tRNS", "GIF") else (opened, mask)
    assert np.array_equal(segment_photo(given, "mug", no_finder), on_white(whole, mask, MARGIN))
    expected = image.convert("L") if isinstance(given, tuple) else image
    assert np.abs(np.asarray(whole.convert(expected.mode), int) - np.asarray(expected, int))[mask].max() <= 1


def test_heic_is_read_if_its_package_is_installed():
    pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    noise(size=(64, 48)).save(stream, "HEIF", quality=-1)
    assert decode_image(stream.getvalue()).size == (64, 48)


def test_an_image_that_was_made_upright_stays_so_and_an_opaque_one_has_no_mask():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode.upright(Image.open(io.BytesIO(encoded(noise(), exif=exif))))
    assert turned.size == (6, 9) and np.array_equal(decode.upright(turned), turned)
    assert decode.transparency_mask(noise()) is None and decode.transparency_mask(noise().convert("RGBA")) is None


@pytest.mark.parametrize("value", [20, 38, 127, 200, 255])
@pytest.mark.parametrize(("kind", "quality"), [("JPEG", 75), ("JPEG", 95), ("smoothed", None)])
def test_mask_of_two_values_is_read_though_compressed_or_smoothed(value, kind, quality):
    disc = Image.new("L", (480, 360))
    ImageDraw.Draw(disc).ellipse((120, 80, 360, 280), fill=value)
    stored = encoded(disc.resize((960, 720)).resize((480, 360), Image.Resampling.BICUBIC))
    if kind == "JPEG":
        stored = encoded(disc, "JPEG", quality=quality)
    wrong = decode_mask_image(stored) != (np.asarray(disc) > 0)
    assert wrong.mean() < 0.002


def test_soft_mask_below_half_is_no_subject():
    ramp = np.linspace(0, 100, 90 * 120).reshape(90, 120).astype(np.uint8)
    assert not decode_mask_image(encoded(Image.fromarray(ramp))).any()
    noise_on_black = np.random.default_rng(0).integers(0, 9, (90, 120), dtype=np.uint8)
    assert not decode_mask_image(encoded(Image.fromarray(noise_on_black))).any()


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
