"""Which frames make a sample: three of them, at angles from the band, every frame as often as any other."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.pairs import triplets
from pipelines.pairs.triplets import TripletParams, per_subject, select, whole_subjects
from pipelines.photos import poses

BAND = (15.0, 90.0)
PARAMS = TripletParams(per_subject=8, class_balance=4.0, angle_band=BAND, order_band=(0.1, 0.5), seed=0)
SUBJECT = "set/mug/7"
ROLES = ("reference", "positive", "target")


def changed(**values) -> TripletParams:
    return PARAMS.model_copy(update=values)


def ring(azimuths, elevation: float = 0.0) -> np.ndarray:
    """Unit vectors around an object [n, 3], degrees."""
    a, e = np.radians(azimuths), np.radians(elevation)
    return np.stack([np.cos(e) * np.sin(a), np.full(len(a), np.sin(e)), np.cos(e) * np.cos(a)], axis=1)


def looking_at(centre: np.ndarray, direction: np.ndarray, distance: float, roll: float) -> dict:
    """Pose columns of a camera at `centre + distance * direction` that looks at `centre`, rolled by degrees."""
    camera, forward = centre + distance * direction, -direction
    right = np.cross([0.3, 1.0, 0.2], forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return {"rotation": list(rotation.reshape(-1)), "translation": list(-rotation @ camera)}


def views(directions, subject: str = SUBJECT, centre=(3.0, -1.0, 7.0), known: bool = True, **more) -> list[dict]:
    """Rows of what select reads: a frame for each direction, None for one without a pose."""
    place = np.array(centre)
    blank = {"subject_id": subject, "class_name": "mug", "role": None, "rotation": None, "translation": None}
    return [
        blank
        | {"frame_id": f"{subject}/{n:03d}", "object_centre": list(centre) if known else None, **more}
        | (looking_at(place, np.asarray(d), 2.0 + n / 9, roll=13.0 * n) if d is not None else {})
        for n, d in enumerate(directions)
    ]


def table(rows: list[dict]) -> pa.Table:
    schema = tables.spec("frames").schema
    return pa.Table.from_pylist(rows, pa.schema([schema.field(name) for name in triplets.COLUMNS]))


def chosen(rows: list[dict], params: TripletParams = PARAMS) -> list[dict]:
    """The triplets of these frames, `per_subject` each."""
    frames = table(rows)
    subjects = len(set(frames["subject_id"].to_pylist()))
    found = select(frames, np.full(subjects, params.per_subject), params)
    tables.check("triplets", found, "test")
    return found.to_pylist()


def number(row: dict, role: str) -> int:
    return int(row[role][-3:])


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(a @ b, -1, 1))))


directions = st.lists(st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: sum(x * x for x in v) > 0.01), max_size=14)


@settings(max_examples=60, deadline=None)
@given(directions.filter(lambda found: len(found) >= 3), st.integers(1, 20), st.integers(0, 3))
def test_posed_triplets_differ_and_lie_in_the_band_where_a_frame_does(vectors, amount, seed):
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    params = changed(per_subject=amount, seed=seed)
    rows = chosen(views(unit), params)
    assert len(rows) == amount
    assert rows == chosen(views(unit), params)
    slack = 0.01  # poses are stored in 4 bytes
    for row in rows:
        reference, positive, target = (number(row, role) for role in ROLES)
        assert row["method"] == "pose"
        assert len({reference, positive, target}) == 3
        for role, other in (("reference_target_angle", target), ("reference_positive_angle", positive)):
            between = degrees(unit[reference], unit[other])
            assert row[role] == pytest.approx(between, abs=0.2 if between < 1 or between > 179 else 0.01)
        for value, taken in (
            (
                degrees(unit[reference], unit[target]),
                [degrees(unit[n], unit[target]) for n in range(len(unit)) if n != target],
            ),
            (
                degrees(unit[reference], unit[positive]),
                [degrees(unit[n], unit[reference]) for n in range(len(unit)) if n not in (reference, target)],
            ),
        ):
            if any(BAND[0] + slack < angle < BAND[1] - slack for angle in taken):
                assert BAND[0] - slack <= value <= BAND[1] + slack


def test_angles_spread_over_the_band():
    rows = chosen(views(ring(np.arange(0, 360, 5))), changed(per_subject=300))
    for column in ("reference_target_angle", "reference_positive_angle"):
        shares = np.histogram([row[column] for row in rows], bins=5, range=(14.99, 90.01))[0] / len(rows)
        assert shares.sum() == pytest.approx(1)
        assert shares.min() > 0.1


def test_even_a_few_samples_of_a_subject_spread_over_the_band():
    """Eight independent draws leave one of four quarters empty in a third of the subjects."""
    frames = [row for n in range(40) for row in views(ring(np.arange(0, 360, 2)), subject=f"set/mug/{n:02d}")]
    quarters = defaultdict(set)
    for row in chosen(frames):
        quarters[row["subject_id"]].add(int((row["reference_target_angle"] - 15) // 18.76))
    assert np.mean([len(found) == 4 for found in quarters.values()]) > 0.9


def test_chance_decides_between_equal_distances():
    """Of a turntable's two neighbours at one angle, neither is taken always."""
    rows = chosen(views(ring(np.arange(0, 360, 30))), changed(per_subject=200, angle_band=(30, 31)))
    steps = Counter((number(row, "reference") - number(row, "target")) % 12 for row in rows)
    assert set(steps) == {1, 11} and min(steps.values()) > 40


def test_nearest_frames_stand_in_where_none_is_in_the_band():
    rows = chosen(views(ring([0, 2, 4, 180])))
    for row in rows:
        assert row["reference_target_angle"] < 5 or row["target"].endswith("3")
    assert all(len({row[role] for role in ROLES}) == 3 for row in rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_every_frame_is_a_target_as_often_as_any_other(frames, amount, posed):
    rows = views(ring(np.linspace(0, 350, frames)) if posed else [None] * frames)
    uses = Counter(row["target"] for row in chosen(rows, changed(per_subject=amount)))
    assert sum(uses.values()) == amount
    assert max(uses.values()) - min(uses[row["frame_id"]] for row in rows) <= 1


def test_two_frames_share_positive_and_target():
    for row in chosen(views([None, None])):
        assert row["positive"] == row["target"] != row["reference"]
        assert row["method"] == "order"


def test_one_frame_is_all_three_and_is_to_be_augmented():
    for found in ([None], ring([0])):
        rows = chosen(views(found))
        assert len(rows) == PARAMS.per_subject
        assert {tuple(row[role] for role in ROLES) for row in rows} == {(f"{SUBJECT}/000",) * 3}
        assert {row["method"] for row in rows} == {"augment"}


@pytest.mark.parametrize("count", [3, 4, 11, 40])
def test_frames_without_poses_are_chosen_by_their_distance_in_the_capture(count):
    rows = chosen(views([None] * count), changed(per_subject=60))
    low, high = PARAMS.order_band
    for row in rows:
        reference, positive, target = (number(row, role) for role in ROLES)
        assert len({reference, positive, target}) == 3
        assert row["method"] == "order" and row["reference_target_angle"] is None
        if count > 10:
            assert low <= abs(reference - target) / (count - 1) <= high
            assert low <= abs(reference - positive) / (count - 1) <= high


def test_other_seed_or_subject_gives_other_triplets():
    around = ring(np.arange(0, 360, 10))
    first = chosen(views(around))
    assert first != chosen(views(around), changed(seed=1))
    other = [number(row, "target") for row in chosen(views(around, "set/mug/8"))]
    assert other != [number(row, "target") for row in first]


def test_ids_number_the_triplets_of_a_subject():
    assert [row["triplet_id"] for row in chosen(views([None] * 3))] == [f"{SUBJECT}/{n:03d}" for n in range(8)]


def test_a_subject_gets_the_same_triplets_whoever_is_beside_it():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 5, 9, 30, 7, 5]
    frames = []
    for n, size in enumerate(sizes):
        unit = rng.normal(size=(size, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        some = [None if (n == 7 and k % 3 == 0) or n == 4 else d for k, d in enumerate(unit)]
        frames += views(some, f"set/mug/{n}", known=n != 6)
    together = chosen(frames)
    for n in range(len(sizes)):
        alone = [row for row in frames if row["subject_id"] == f"set/mug/{n}"]
        assert chosen(alone) == [row for row in together if row["subject_id"] == f"set/mug/{n}"]


@pytest.mark.parametrize("known", [True, False])
def test_poses_give_the_known_angles_wherever_the_object_stands(known):
    """Without a known centre, the point nearest to the optical axes is found."""
    wanted = ring([0, 10, 40, 100, 190], elevation=20.0)
    found = poses.viewing_directions(table(views(wanted, known=known)), np.array([0]))
    assert np.allclose(found, wanted, atol=1e-5)


def test_nearest_point_has_the_least_squared_distance_to_the_axes():
    rng = np.random.default_rng(0)
    origins, along = rng.normal(size=(12, 3)), rng.normal(size=(12, 3))
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    groups = [slice(0, 5), slice(5, 12)]

    def cost(point, group):
        to = origins[group] - point
        return np.sum((to - along[group] * np.sum(to * along[group], axis=1, keepdims=True)) ** 2)

    best = poses.nearest_points(origins, along, np.array([0, 5]))
    for point, group in zip(best, groups, strict=True):
        assert all(cost(point, group) <= cost(point + 0.01 * step, group) for step in rng.normal(size=(50, 3)))


def test_frames_without_a_pose_are_left_out_where_three_have_one():
    around = list(ring([0, 30, 60, 90]))
    around[1] = None
    rows = chosen(views(around))
    assert {row["method"] for row in rows} == {"pose"}
    assert not any(number(row, role) == 1 for row in rows for role in ROLES)
    around[2] = None
    rows = chosen(views(around))
    assert {row["method"] for row in rows} == {"order"}
    assert {number(row, "target") for row in rows} == {0, 1, 2, 3}


def test_band_of_the_params_file_is_one_that_a_turn_around_an_object_offers(section):
    params = section("pairs", TripletParams)
    rows = chosen(views(ring(np.arange(0, 360, 36))), params)
    assert len(rows) == params.per_subject
    low, high = params.angle_band
    assert all(low - 0.01 <= row["reference_target_angle"] <= high + 0.01 for row in rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9), st.sampled_from([0.5, 1.0, 4.0]))
def test_large_classes_share_their_triplets_evenly_and_no_subject_goes_without(classes, amount, balance):
    codes = np.array(classes)
    keys = np.arange(len(codes), dtype=np.uint64) * np.uint64(7919)
    counts = per_subject(codes, keys, changed(per_subject=amount, class_balance=balance))
    most = int(balance * amount * len(codes) / len(set(classes)))
    for code in set(classes):
        own = counts[codes == code]
        assert own.min() >= 1 and own.max() <= amount and own.max() - own.min() <= 1
        assert own.sum() == min(max(most, len(own)), amount * len(own))


def test_subjects_are_never_cut_however_the_table_is_read():
    rows = [row for n, size in enumerate([1, 4, 2, 6, 1]) for row in views([None] * size, f"set/mug/{n}")]
    whole = table(rows)
    for size in range(1, 15):
        pieces = list(whole_subjects(whole.slice(at, size) for at in range(0, len(rows), size)))
        assert pa.concat_tables(pieces).equals(whole)
        ids = [subject for piece in pieces for subject in set(piece["subject_id"].to_pylist())]
        assert len(ids) == len(set(ids)) == 5


def test_table_is_the_same_however_it_is_read_and_balanced_over_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.files, "PART_BYTES", 1000)
    rows = [row for n in range(9) for row in views(ring([0, 40, 80, 120]), f"set/mug/{n}")]
    rows += views([None] * 4, "set/pen/0", class_name="pen")
    frames = table(rows)

    def written(size: int, folder: str) -> list[bytes]:
        def stretches():
            return (frames[at : at + size] for at in range(0, len(rows), size))

        triplets.write(stretches, tmp_path / folder, changed(class_balance=1.0))
        return [part.read_bytes() for part in tables.parts(tmp_path / folder, "triplets")]

    parts = written(len(rows), "whole")
    assert len(written(1, "ones")) > 1 and written(len(rows), "again") == parts
    found = tables.read(tmp_path / "whole", "triplets")
    assert found.equals(tables.read(tmp_path / "ones", "triplets"))
    assert found.equals(tables.sort("triplets", found))
    assert Counter(found["class_name"].to_pylist()) == {"mug": 40, "pen": 8}
    kept = {row["frame_id"] for row in rows}
    for row in found.to_pylist():
        assert {row[role] for role in ROLES} <= kept
        assert all(row[role].startswith(row["subject_id"] + "/") for role in ROLES)


@pytest.mark.parametrize("stretches", [[], [table([])]])
def test_no_frames_make_an_empty_table(tmp_path, stretches):
    triplets.write(lambda: iter(stretches), tmp_path, PARAMS)
    assert tables.read(tmp_path, "triplets").num_rows == 0


def test_numbers_without_leading_zeros_are_in_the_order_of_the_capture():
    padded = [row for subject in ("set/mug/7", "set/mug/8") for row in views([None] * 12, subject)]
    plain = [{**row, "frame_id": f"{row['subject_id']}/{int(row['frame_id'][-3:])}"} for row in padded]
    plain[:12] = padded[:12]
    plain.sort(key=lambda row: tables.path_order(row["frame_id"]))
    assert [row["frame_id"].rpartition("/")[2] for row in plain[12:16]] == ["0", "1", "10", "11"]

    def numbers(rows: list[dict]) -> list[list[int]]:
        return [[int(row[role].rpartition("/")[2]) for role in ROLES] for row in chosen(rows)]

    assert numbers(plain) == numbers(padded)
    names = ["a1b10", "a1b9", "a2", "a10", "b", "1" * 5000, "12"]
    assert sorted(names, key=triplets._number_order) == ["12", "1" * 5000, "a1b9", "a1b10", "a2", "a10", "b"]


def with_roles(plain: int, edits: int, subject: str = SUBJECT) -> list[dict]:
    """Frames of a subject: the first ones are references, the others targets."""
    rows = views(ring(np.arange(plain + edits)), subject)
    return [row | {"role": "reference" if n < plain else "target"} for n, row in enumerate(rows)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 30))
def test_roles_say_what_a_photo_is_used_as(plain, edits, amount):
    rows = chosen(with_roles(plain, edits), changed(per_subject=amount))
    assert {row["method"] for row in rows} == {"role"} and len(rows) == amount
    for row in rows:
        reference, positive, target = (number(row, role) for role in ROLES)
        assert max(reference, positive) < plain <= target
        assert (reference == positive) == (plain == 1)
        assert row["reference_target_angle"] is row["reference_positive_angle"] is None
    for role, photos in (("reference", plain), ("positive", plain), ("target", edits)):
        uses = Counter(row[role] for row in rows)
        assert len(uses) == min(photos, amount) and max(uses.values()) - min(uses.values()) <= 1


def test_every_reference_meets_every_target():
    rows = chosen(with_roles(4, 6), changed(per_subject=24))
    assert len({(row["reference"], row["target"]) for row in rows}) == 24


def test_roles_of_a_subject_leave_others_as_they_are():
    other = views(ring(np.arange(0, 360, 40)), "set/mug/8")
    sized = with_roles(4, 5, "set/mug/6") + with_roles(2, 7, "set/mug/7")
    assert chosen(sized + other)[16:] == chosen(other)
    assert chosen(sized + other)[:8] == chosen(sized[:9])
    # A frame without a pose is left out of a subject with poses, and shifts none after it.
    partly = views([*ring([0, 30]), None, *ring([60, 90])], "set/mug/5")
    assert chosen(partly + sized)[8:] == chosen(sized)


def test_a_subject_without_references_or_targets_makes_no_sample(tmp_path):
    frames = with_roles(3, 0, "set/mug/1") + with_roles(0, 3, "set/mug/2") + with_roles(1, 1, "set/mug/3")
    triplets.write(lambda: iter([table(frames + views([None] * 3, "set/mug/4"))]), tmp_path, PARAMS)
    found = tables.read(tmp_path, "triplets")["subject_id"].to_pylist()
    assert Counter(found) == {"set/mug/3": 8, "set/mug/4": 8}
