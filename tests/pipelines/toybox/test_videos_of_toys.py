"""Videos of toys: what they show, and that they are read as videos."""

import numpy as np
import pytest

from pipelines.photos.decode import decode_image
from pipelines.photos.roots import SourceParams
from pipelines.photos.videos import Span, VideoParams, choose
from pipelines.sources import open_source
from pipelines.toybox import videos
from pipelines.toybox.layouts import VIDEOS, generator
from pipelines.toybox.videos import turn, write_videos
from runtime.errors import UserError

FRAMES, SIZE = 8, 48


def test_a_turn_shows_one_toy_from_all_sides_in_one_scene():
    items = turn(generator(0, VIDEOS, 0), "mug", 72)
    assert len({(subject, look) for subject, _, look in items}) == 1
    steps = np.diff([view.azimuth for _, view, _ in items]) % 360
    np.testing.assert_allclose(steps, 5, atol=1e-3)


def test_videos_are_those_of_the_video_layout_and_are_kept_where_they_exist(tmp_path):
    files = list(write_videos(tmp_path, 0, 2, FRAMES, SIZE))
    source = SourceParams(name="s", layout="video", root=str(tmp_path), split="train")
    found = [(s.class_name, s.photos[0].path) for s in open_source(source).subjects()]
    assert found == [(file.parent.name, str(file.relative_to(tmp_path))) for file in files]
    with files[0].open("rb") as stream:
        frames = list(choose(stream, Span(parts=4), VideoParams(frames=4, tries=2, min_change=0.0)))
    assert [decode_image(data).size for _, data in frames] == [(SIZE, SIZE)] * 4
    before = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in write_videos(tmp_path, 0, 2, FRAMES, SIZE)] == before
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--size", "51"], "--size is 51, and H.264 halves the resolution of colours; give an even number"),
        (["--videos", "0"], "--videos is 0; give at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        videos.main(["--out", str(tmp_path), *option])
