"""Reader of videos: class folders, and lists of segments."""

import logging

import pytest

from pipelines.photos.videos import Span
from pipelines.sources import open_source
from runtime.errors import UserError


def subjects(params) -> list:
    return list(open_source(params("video")).subjects())


def test_a_video_is_a_subject_of_its_folder_s_class(put, params):
    put("coffee_mug/red.mp4", "coffee_mug/red.MOV", "shoe/IMG_2.webm", ".trash/a.mp4", "shoe/.hidden.mkv")
    put("captions.csv", content="path,caption\nshoe/IMG_2.webm,an old shoe\n")
    found = subjects(params)
    assert [(s.subject_id, s.class_name) for s in found] == [
        ("s/coffee_mug/red", "coffee mug"),
        ("s/coffee_mug/red.mp4", "coffee mug"),
        ("s/shoe/IMG_2", "shoe"),
    ]
    (photo,) = found[2].photos
    assert (photo.frame_id, photo.path, photo.caption) == ("s/shoe/IMG_2/IMG_2", "shoe/IMG_2.webm", "an old shoe")
    assert photo.span == Span()


def test_other_files_beside_videos_are_rejects(put, params):
    put("mug/a.mp4", "mug/b.jpg", "mug/c.txt")
    rejects = [p for s in subjects(params) for p in s.photos if p.reject]
    assert [(p.frame_id, p.reject, p.reject_detail) for p in rejects] == [
        ("s/mug/b/0", "not_a_video", "suffix '.jpg', photos are read by layout folder"),
        ("s/mug/c/0", "not_a_video", "suffix '.txt'"),
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.mp4", r"video '.*/a\.mp4' is in no class folder; move it to <class noun>/, or name it in segments\.csv"),
        ("mug/red/a.mp4", r"video '.*/mug/red/a\.mp4' lies deeper than <class noun>/; move it"),
        ("___/a.mp4", r"folder '.*/___' has no letter, so it is no class noun; rename it"),
    ],
)
def test_video_at_another_place_is_an_error_that_names_it(put, params, path, message):
    put(path)
    with pytest.raises(UserError, match=message):
        subjects(params)


def test_list_of_segments_names_subjects_in_any_videos(put, params, caplog):
    put("tour.mp4", "more/walk.mkv", "more/other.mp4")
    rows = ["video,start,end,subject,class_noun,caption"]
    rows += ["tour.mp4,1:05.5,80,red,Coffee_Mug,a red mug", "tour.mp4,0,10,,shoe,", "more\\walk.mkv,,,red,coffee mug,"]
    rows += ["tour.mp4,90,,red,coffee mug,"]
    put("segments.csv", content="\n".join(rows))
    put("captions.csv", content="path,caption\nmore/walk.mkv,on a walk\n")
    with caplog.at_level(logging.WARNING):
        red, shoe = subjects(params)
    assert (red.subject_id, red.class_name) == ("s/coffee_mug/red", "coffee mug")
    assert [(p.frame_id, p.path, p.span, p.caption) for p in red.photos] == [
        ("s/coffee_mug/red/tour", "tour.mp4", Span(65.5, 80.0), "a red mug"),
        ("s/coffee_mug/red/tour.2", "tour.mp4", Span(90.0, None), None),
        ("s/coffee_mug/red/walk", "more/walk.mkv", Span(), "on a walk"),
    ]
    assert (shoe.subject_id, shoe.photos[0].span) == ("s/shoe/tour", Span(0.0, 10.0))
    assert "1 video is not in segments.csv and so not read" in caplog.text and "more/other.mp4" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,,,,mug,", "line 2 has 'a.jpg' for a video; give a file below the root, .mp4"),
        ("../a.mp4,,,,mug,", "line 2 has '../a.mp4' for a video"),
        ("a.mp4,,,,,", "line 2 has no class noun"),
        ("a.mp4,soon,,,mug,", "line 2 has 'soon' for a time; give seconds, or minutes and seconds as 1:23.5"),
        ("a.mp4,-1,,,mug,", "line 2 has '-1' for a time"),
        ("a.mp4,nan,,,mug,", "line 2 has 'nan' for a time"),
        ("a.mp4,5,4,,mug,", "line 2 ends a segment at 4, not after its start"),
        ("a.mp4,,0,,mug,", "line 2 ends a segment at 0, not after its start"),
        ("a.mp4,,,x/y,mug,", "line 2 has the subject 'x/y'; name it without a slash"),
        ("a.mp4,,,x,mug,\na.mp4,,,x,cup,", "line 3 calls subject x a cup, line 2 a mug"),
        ("a.mp4,,", "line 2 has 3 of 6 columns"),
    ],
)
def test_malformed_row_is_an_error_with_its_line(put, params, row, message):
    put("segments.csv", content=f"video,start,end,subject,class_noun,caption\n{row}\n")
    with pytest.raises(UserError, match="segments.csv " + message.replace(".", r"\.")):
        subjects(params)


def test_list_of_segments_marks_the_layout(put, params):
    put("segments.csv", "mug/red/0.jpg")
    with pytest.raises(UserError, match=r"it has segments\.csv; use layout video"):
        open_source(params("folder"))


def test_videos_among_photos_are_rejects_that_say_how_they_are_read(put, params):
    put("mug/red/a.mp4")
    (subject,) = open_source(params("folder")).subjects()
    assert subject.photos[0].reject_detail == "suffix '.mp4', layout video reads videos"
