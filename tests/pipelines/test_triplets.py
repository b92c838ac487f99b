"""Which frames make a sample: three of them, at angles from the band, every frame as often as any other."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables, triplets
from pipelines.curate import CurateParams
from pipelines.triplets import View, angle, select, viewing_directions

BAND = (15.0, 90.0)
PARAMS = triplets.TripletParams(per_subject=8, angle_band=BAND, order_band=(0.1, 0.5), seed=0)
SUBJECT = "set/mug/7"


def ring(azimuths, elevation: float = 0.0) -> list[View]:
    """Views from around an object, degrees."""
    a, e = np.radians(azimuths), np.radians(elevation)
    directions = np.stack([np.cos(e) * np.sin(a), np.full(len(a), np.sin(e)), np.cos(e) * np.cos(a)], axis=1)
    return [View(f"{SUBJECT}/{n:03d}", d) for n, d in enumerate(directions)]


def unposed(count: int) -> list[View]:
    return [View(f"{SUBJECT}/{n:03d}", None) for n in range(count)]


def chosen(views: list[View], rows: list[dict]) -> list[tuple[View, View, View]]:
    by_id = {view.frame_id: view for view in views}
    return [(by_id[row["reference"]], by_id[row["positive"]], by_id[row["target"]]) for row in rows]


directions = st.lists(st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: sum(x * x for x in v) > 0.01), max_size=14)


@settings(max_examples=60, deadline=None)
@given(directions.filter(lambda found: len(found) >= 3), st.integers(1, 20), st.integers(0, 3))
def test_posed_triplets_differ_and_lie_in_the_band_where_a_frame_does(vectors, per_subject, seed):
    views = [View(f"s/{n}", np.array(v) / np.linalg.norm(v)) for n, v in enumerate(vectors)]
    params = PARAMS.model_copy(update={"per_subject": per_subject, "seed": seed})
    rows = select("s", "mug", views, params)
    assert len(rows) == per_subject
    assert rows == select("s", "mug", views, params)
    for row, (reference, positive, target) in zip(rows, chosen(views, rows), strict=True):
        assert row["method"] == "pose"
        assert len({reference.frame_id, positive.frame_id, target.frame_id}) == 3
        assert row["reference_target_angle"] == angle(reference, target)
        assert row["reference_positive_angle"] == angle(reference, positive)
        possible = {v.frame_id for v in views if v is not target and BAND[0] <= angle(v, target) <= BAND[1]}
        assert not possible or reference.frame_id in possible
        possible = {v.frame_id for v in views if BAND[0] <= angle(v, reference) <= BAND[1]}
        possible -= {reference.frame_id, target.frame_id}
        assert not possible or positive.frame_id in possible
    tables.from_rows("triplets", rows)


def test_angles_spread_over_the_band():
    views = ring(np.arange(0, 360, 5))
    rows = select(SUBJECT, "mug", views, PARAMS.model_copy(update={"per_subject": 300}))
    for column in ("reference_target_angle", "reference_positive_angle"):
        shares = np.histogram([row[column] for row in rows], bins=5, range=BAND)[0] / len(rows)
        assert shares.sum() == pytest.approx(1)
        assert shares.min() > 0.1


def test_nearest_frames_stand_in_where_none_is_in_the_band():
    rows = select(SUBJECT, "mug", ring([0, 2, 4, 180]), PARAMS)
    for row in rows:
        assert row["reference_target_angle"] < 5 or row["target"].endswith("3")
    assert all(len({row["reference"], row["positive"], row["target"]}) == 3 for row in rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_every_frame_is_a_target_as_often_as_any_other(frames, per_subject, posed):
    views = ring(np.linspace(0, 350, frames)) if posed else unposed(frames)
    rows = select(SUBJECT, "mug", views, PARAMS.model_copy(update={"per_subject": per_subject}))
    uses = Counter(row["target"] for row in rows)
    assert sum(uses.values()) == per_subject
    assert max(uses.values()) - min(uses[view.frame_id] for view in views) <= 1


def test_two_frames_share_positive_and_target():
    views = unposed(2)
    for row in select(SUBJECT, "mug", views, PARAMS):
        assert row["positive"] == row["target"] != row["reference"]
        assert row["method"] == "order"


def test_one_frame_is_all_three_and_is_to_be_augmented():
    for views in (unposed(1), ring([0])):
        rows = select(SUBJECT, "mug", views, PARAMS)
        assert len(rows) == PARAMS.per_subject
        assert {(row["reference"], row["positive"], row["target"]) for row in rows} == {(views[0].frame_id,) * 3}
        assert {row["method"] for row in rows} == {"augment"}


@pytest.mark.parametrize("count", [3, 4, 11, 40])
def test_frames_without_poses_are_chosen_by_their_distance_in_the_capture(count):
    rows = select(SUBJECT, "mug", unposed(count), PARAMS.model_copy(update={"per_subject": 60}))
    low, high = PARAMS.order_band
    for row in rows:
        reference, positive, target = (int(row[role][-3:]) for role in ("reference", "positive", "target"))
        assert len({reference, positive, target}) == 3
        assert row["method"] == "order" and row["reference_target_angle"] is None
        if count > 10:
            assert low <= abs(reference - target) / (count - 1) <= high
            assert low <= abs(reference - positive) / (count - 1) <= high


def test_other_seed_or_subject_gives_other_triplets():
    views = ring(np.arange(0, 360, 10))
    first = select(SUBJECT, "mug", views, PARAMS)
    assert first != select(SUBJECT, "mug", views, PARAMS.model_copy(update={"seed": 1}))
    other = [row["target"] for row in select("set/mug/8", "mug", views, PARAMS)]
    assert other != [row["target"] for row in first]


def test_ids_number_the_triplets_of_a_subject():
    assert [row["triplet_id"] for row in select(SUBJECT, "mug", unposed(3), PARAMS)] == [
        f"{SUBJECT}/{index:03d}" for index in range(8)
    ]


def looking_at(centre: np.ndarray, direction: np.ndarray, distance: float, roll: float) -> dict:
    """Pose columns of a camera at `centre + distance * direction` that looks at `centre`, rolled by degrees."""
    camera, forward = centre + distance * direction, -direction
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return {"rotation": list(rotation.reshape(-1)), "translation": list(-rotation @ camera)}


def posed_frames(azimuths, centre, known: bool) -> list[dict]:
    views = ring(azimuths, elevation=20.0)
    return [
        {"frame_id": view.frame_id, "object_centre": list(centre) if known else None}
        | looking_at(centre, view.direction, 2.0 + n, roll=13.0 * n)
        for n, view in enumerate(views)
    ]


@pytest.mark.parametrize("known", [True, False])
def test_poses_give_the_known_angles_wherever_the_object_stands(known):
    """Without a known centre, the point nearest to the optical axes is found."""
    azimuths, centre = [0, 10, 40, 100, 190], np.array([3.0, -1.0, 7.0])
    views = viewing_directions(posed_frames(azimuths, centre, known))
    for found, wanted in zip(views, ring(azimuths, elevation=20.0), strict=True):
        assert np.allclose(found.direction, wanted.direction, atol=1e-6)
    assert angle(views[0], views[4]) == pytest.approx(angle(*[ring([0, 190], 20.0)[k] for k in (0, 1)]), abs=1e-4)


def test_nearest_point_has_the_least_squared_distance_to_the_axes():
    rng = np.random.default_rng(0)
    origins = list(rng.normal(size=(6, 3)))
    along = [v / np.linalg.norm(v) for v in rng.normal(size=(6, 3))]

    def cost(point):
        return sum(np.sum((o - point - d * ((o - point) @ d)) ** 2) for o, d in zip(origins, along, strict=True))

    best = triplets._nearest_point(origins, along)
    assert all(cost(best) <= cost(best + 0.01 * step) for step in rng.normal(size=(50, 3)))


def test_frames_without_a_pose_are_left_out_where_three_have_one():
    frames = posed_frames([0, 30, 60, 90], np.zeros(3), known=True)
    frames[1] |= {"rotation": None, "translation": None}
    rows = select(SUBJECT, "mug", viewing_directions(frames), PARAMS)
    assert {row["method"] for row in rows} == {"pose"}
    assert not any(frames[1]["frame_id"] in (row["reference"], row["positive"], row["target"]) for row in rows)
    frames[2] |= {"rotation": None, "translation": None}
    rows = select(SUBJECT, "mug", viewing_directions(frames), PARAMS)
    assert {row["method"] for row in rows} == {"order"}
    assert {row["target"] for row in rows} == {frame["frame_id"] for frame in frames}


def test_band_of_the_params_file_is_one_that_a_turn_around_an_object_offers(section):
    params = section("curate", CurateParams).triplets
    rows = select(SUBJECT, "mug", ring(np.arange(0, 360, 36)), params)
    assert len(rows) == params.per_subject
    assert all(params.angle_band[0] <= row["reference_target_angle"] <= params.angle_band[1] for row in rows)
