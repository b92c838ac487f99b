"""Frames of videos: which are chosen, and that they are read again as the same bytes."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Root
from pipelines.photos.videos import (
    Span,
    VideoParams,
    choose,
    frame_near,
    frame_path,
    is_video,
    read_frame,
    split_frame,
)
from tests.world.photos import blocks
from tests.world.videos import damaged, rotated, video

WIDTH, HEIGHT = 64, 48
PARAMS = VideoParams(frames=4, tries=5, min_change=2.0)


def image(number: int) -> Image.Image:
    return blocks(number, WIDTH, HEIGHT)


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), (value, value, value))


def chosen(data: bytes, parts: int = 4, **changes) -> list:
    params = PARAMS.model_copy(update=changes)
    return list(choose(io.BytesIO(data), Span(parts=parts), params))


def times(found: list) -> list[str]:
    return [one.reason if isinstance(one, DecodeError) else one[0] for one in found]


def nearest(data: bytes, images: list[Image.Image]) -> int:
    """Which of the images a frame shows."""
    frame, *others = (np.asarray(one.convert("L"), dtype=float) for one in (decode_image(data), *images))
    return int(np.argmin([np.abs(frame - other).mean() for other in others]))


def test_path_of_a_frame_is_that_of_its_video_and_its_time():
    assert split_frame(frame_path("mug/red.MP4", "3.266667")) == ("mug/red.MP4", "3.266667")
    assert split_frame("mug/red.mp4") is None
    assert split_frame("mug/red.jpg/3.266667") is None
    assert is_video("a.WebM") and not is_video("a.gif")


def test_sharpest_frame_of_each_part_of_the_time_is_chosen():
    shown = [image(n) if n % 5 == 3 else image(n).filter(ImageFilter.GaussianBlur(3)) for n in range(20)]
    found = chosen(video(shown, qscale="2"))
    assert times(found) == ["0.300000", "0.800000", "1.300000", "1.800000"]
    assert [nearest(data, shown) for _, data in found] == [3, 8, 13, 18]


def test_frame_that_looks_like_the_last_one_taken_gives_way_to_one_that_does_not():
    still, other = image(1), image(2).filter(ImageFilter.GaussianBlur(1))
    shown = [still] * 8 + [other] * 2
    assert times(chosen(video(shown), parts=2)) == ["0.000000", "0.800000"]
    assert times(chosen(video(shown), parts=2, min_change=0.0)) != ["0.000000", "0.800000"]


def test_only_some_frames_of_a_part_are_compared():
    shown = [image(n).filter(ImageFilter.GaussianBlur(3)) for n in range(9)] + [image(9)]
    assert times(chosen(video(shown), parts=1, tries=10)) == ["0.900000"]
    assert times(chosen(video(shown), parts=1, tries=2)) != ["0.900000"]


def test_parts_are_of_time_and_not_of_number_where_the_rate_varies():
    at = [0.0, 0.1, 0.2, 0.3, 2.0, 3.9]
    found = times(chosen(video(map(image, range(6)), at, kind="matroska")))
    assert found[0] in ("0.000000", "0.100000", "0.200000", "0.300000")
    assert found[1:] == ["2.000000", "no_frame", "3.900000"]


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska"])
def test_video_of_one_frame_gives_that_one(kind):
    first, *rest = chosen(video([image(0)], kind=kind))
    assert first[0] == "0.000000"
    assert times(rest) == ["no_frame"] * 3


def test_clip_is_read_between_its_times():
    shown = video(map(image, range(40)), codec="libx264", preset="ultrafast", g="10")
    found = list(choose(io.BytesIO(shown), Span(2.0, 3.0, parts=2), PARAMS))
    assert [2.0 <= float(time) <= 3.0 for time, _ in found] == [True, True]
    (none,) = choose(io.BytesIO(shown), Span(9.0, parts=1), PARAMS)
    assert (none.reason, none.detail) == ("no_frame", "between 9 s and its end")


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "12", "bf": "3", "preset": "fast"}),
        ("mov", "libx264", {"g": "12", "bf": "3", "preset": "fast", "x264-params": "open-gop=1"}),
        ("matroska", "libx264", {"g": "12", "bf": "3", "preset": "fast"}),
        ("mp4", "mpeg4", {"g": "6"}),
        ("webm", "libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_every_frame_is_read_again_as_the_same_bytes(kind, codec, options):
    data = video(map(image, range(30)), kind=kind, codec=codec, **options)
    found = chosen(data, parts=30)
    assert sum(not isinstance(one, DecodeError) for one in found) == 30
    for time, frame in found:
        assert read_frame(io.BytesIO(data), time) == frame


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
def test_frame_is_upright(degrees, turns):
    data = video([image(0)])
    ((_, plain),), ((_, turned),) = chosen(data, parts=1), chosen(rotated(data, degrees), parts=1)
    expected = np.rot90(np.asarray(decode_image(plain)), turns)
    np.testing.assert_array_equal(np.asarray(decode_image(turned)), expected)


@pytest.mark.parametrize(("full", "value"), [(False, 130), (True, 130), (False, 250), (True, 5)])
def test_grey_values_are_those_that_were_encoded_in_either_range(full, value):
    pixels = "yuvj420p" if full else "yuv420p"
    ((_, data),) = chosen(video([grey(value)], codec="libx264", pixels=pixels, qp="1"), parts=1)
    assert abs(int(np.asarray(decode_image(data)).mean()) - value) <= 2


def test_video_that_is_cut_off_is_used_up_to_there():
    shown = [image(n) for n in range(40)]
    whole = video(shown, codec="libx264", preset="ultrafast", g="5")
    found = chosen(whole[: len(whole) // 2], parts=8)
    assert all(float(time) < 2.5 for time, _ in found)
    assert [nearest(data, shown) for _, data in found] == [round(10 * float(time)) for time, _ in found]


def test_damaged_part_of_a_video_is_a_reject_and_the_rest_is_used():
    shown = [image(n) for n in range(40)]
    found = chosen(damaged(video(shown, codec="libx264", preset="ultrafast", g="5"), 0.4, 0.7), parts=8)
    reasons = [one.reason if isinstance(one, DecodeError) else "" for one in found]
    assert reasons[0] == reasons[-1] == "" and set(reasons) == {"", "unreadable"}
    whole = [one for one in found if not isinstance(one, DecodeError)]
    assert [nearest(data, shown) for _, data in whole] == [round(10 * float(time)) for time, _ in whole]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty", "0 bytes"),
        (b"text, not a video at all", "unreadable", "not a video of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "unreadable", "a git-lfs pointer, not the file itself"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd", "unreadable", "not a video of a known format"),
        (b"\0\0\0\x14ftypisom\0\0\0\0isom", "unreadable", ""),
        (b"\x1aE\xdf\xa3" + bytes(60), "unreadable", ""),
    ],
)
def test_file_that_is_no_video_says_so_for_every_part(data, reason, detail):
    found = chosen(data)
    assert [one.reason for one in found] == [reason] * 4
    assert found[0].detail.startswith(detail)


def test_video_with_too_many_pixels_is_refused_before_it_is_decoded():
    (one,) = choose(io.BytesIO(video([image(0)])), Span(), PARAMS, max_pixels=100)
    assert (one.reason, one.detail) == ("huge", "64 x 48 px, the limit is 100 pixels")


def test_frames_are_files_of_a_root_in_folders_and_archives(tmp_path):
    data = video(map(image, range(3)))
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug/red.mp4").write_bytes(data)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "mug/red.mp4", "mug/red.mp4")
    wanted = read_frame(io.BytesIO(data), "0.100000")
    for root in (str(tmp_path), str(tmp_path / "all.tar"), f"file://{tmp_path}"):
        assert Root(root).read("mug/red.mp4/0.100000") == wanted
        with pytest.raises(DecodeError, match=r"unreadable: the video has no frame at 0\.150000 s"):
            Root(root).read("mug/red.mp4/0.150000")
        with pytest.raises(FileNotFoundError):
            Root(root).read("mug/blue.mp4/0.100000")


@pytest.mark.parametrize("key_frames", ["1", "12"])
def test_frame_nearest_to_a_time_is_read_whatever_that_time(key_frames):
    shown = [image(n) for n in range(25)]
    data = video(shown, qscale="2", g=key_frames, bf="0")
    for seconds, number in ((0, 0), (0.04, 0), (0.06, 1), (1.23, 12), (1.251, 13), (2.4, 24), (2.49, 24)):
        path = frame_near("mug/red.mp4", seconds)
        name, time = split_frame(path)
        assert name == "mug/red.mp4" and nearest(read_frame(io.BytesIO(data), time), shown) == number, path
    with pytest.raises(DecodeError, match=r"the video shows no frame near 3.000 s"):
        read_frame(io.BytesIO(data), "~3.000000")
