import numpy as np
import pytest

from eval.score import metrics

INTERVALS = metrics.IntervalParams(resamples=500, level=0.9, seed=3)
COLUMNS = ("method", "subject_id", "group", "prompt_id", "index", "metric", "value")


def rows(*values: tuple) -> list[dict]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in values]


def spread(method: str, subject: str, group: str, number: int, **values: float | None) -> list[dict]:
    """The rows of one picture, a metric each."""
    return rows(*((method, subject, group, number, 0, metric, value) for metric, value in values.items()))


def found(method: str, *segmented: bool) -> list[dict]:
    return [{"method": method, "segmented": hit} for hit in segmented]


def test_a_picture_scores_its_mean_cosine_to_the_photos_it_is_compared_with():
    cosines = np.array([[1.0, 0.6], [0.0, 0.8], [0.5, 0.5]])
    compared = np.array([[True, True], [False, True], [False, False]])
    assert metrics.mean_cosines(cosines, compared) == pytest.approx([0.8, 0.8, np.nan], nan_ok=True)


def test_copy_excess_by_hand():
    # Photo 0 was shown; its cosines to the others are 0.6 and 0.4, mean 0.5: a copy has 1 - 0.5 to gain.
    photos = np.array([[1.0, 0.6, 0.4], [0.6, 1.0, 0.9], [0.4, 0.9, 1.0]])
    pictures = np.array([photos[0], [0.7, 0.8, 0.6], [0.9, 0.7, 0.6]])
    shown = np.tile([True, False, False], (3, 1))
    everything = np.ones((3, 3), dtype=bool)
    expected = [1.0, (0.7 - 0.7) / 0.5, (0.9 - 0.65) / 0.5]
    assert metrics.copy_excess(pictures, photos, shown, everything) == pytest.approx(expected)
    # Whether the shown photo counts among those compared with is of no matter.
    assert metrics.copy_excess(pictures, photos, shown, ~shown) == pytest.approx(expected)


def test_of_several_shown_crops_the_nearest_counts():
    photos = np.array([[1.0, 0.6, 0.4], [0.6, 1.0, 0.2], [0.4, 0.2, 1.0]])
    shown = np.array([[True, True, False]])
    picture = np.array([[0.5, 0.9, 0.3]])
    assert metrics.copy_excess(picture, photos, shown, np.ones((1, 3), bool)) == pytest.approx([(0.9 - 0.3) / 0.8])


def test_copying_cannot_be_told_without_a_shown_crop_or_without_other_photos():
    photos = np.array([[1.0, 0.5], [0.5, 1.0]])
    shown = np.array([[False, False], [True, True]])
    alike = np.ones((2, 2)) - 1e-7 * (1 - np.eye(2))
    assert np.isnan(metrics.copy_excess(alike, alike, np.eye(2, dtype=bool), np.ones((2, 2), bool))).all()
    assert np.isnan(metrics.copy_excess(photos, photos, shown, np.ones((2, 2), bool))).all()
    assert np.isnan(metrics.copy_excess(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1), bool), np.ones((1, 1), bool)))


def test_distance_to_siblings_leaves_out_the_picture_itself_and_other_prompts():
    distances = np.array([[0, 1, 2, 9], [1, 0, 4, 9], [2, 4, 0, 9], [9, 9, 9, 0]], dtype=float)
    siblings = [("scene", 0), ("scene", 0), ("scene", 0), ("scene", 1)]
    assert metrics.mean_to_siblings(distances, siblings) == pytest.approx([1.5, 2.5, 3.0, np.nan], nan_ok=True)
    distances[:3, 3] = distances[3, :3] = np.nan  # what is never asked for need not be computed
    assert metrics.mean_to_siblings(distances, siblings) == pytest.approx([1.5, 2.5, 3.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("policy", "expected"), [("zero", [0.5, 0.0]), ("skip", [0.5, None]), ("unsegmented", [0.5, 0.25])]
)
def test_miss_policies(policy, expected):
    assert metrics.with_misses([0.5, 0.25], [True, False], policy) == expected
    assert metrics.with_misses([None, None], [True, False], policy) == [None, None]


def test_means_are_over_pictures_of_a_subject_first_and_nulls_are_left_out():
    table = rows(
        ("m", "a", "scene", 0, 0, "x", 0.2),
        ("m", "a", "scene", 1, 0, "x", 0.4),
        ("m", "a", "scene", 2, 0, "x", None),
        ("m", "b", "scene", 0, 0, "x", 0.8),
        ("m", "c", "scene", 0, 0, "x", None),
    )
    assert metrics.subject_means(table) == pytest.approx({"a": 0.3, "b": 0.8})


def test_interval_is_that_of_means_of_subjects_drawn_with_replacement():
    means = [0.1, 0.5, 0.6, 0.9]
    draws = np.random.default_rng(3).integers(4, size=(500, 4))
    resampled = sorted(sum(means[i] for i in draw) / 4 for draw in draws)
    result = metrics.estimate(means, INTERVALS)
    assert result["mean"] == 0.525
    # numpy's quantile lies between the two values around the place (n - 1) q.
    assert resampled[24] - 1e-4 <= result["low"] <= resampled[25] + 1e-4
    assert resampled[474] - 1e-4 <= result["high"] <= resampled[475] + 1e-4
    assert metrics.estimate(means, INTERVALS) == result


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        result = metrics.estimate(list(rng.normal(0.6, 0.1, 30)), INTERVALS)
        hits += result["low"] <= 0.6 <= result["high"]
    assert 0.82 <= hits / 200 <= 0.96  # 0.9, within three standard errors and the bootstrap's known optimism


def test_one_subject_has_a_mean_and_no_interval_and_none_has_neither():
    assert metrics.estimate([0.25], INTERVALS) == {"mean": 0.25, "low": None, "high": None}
    assert metrics.estimate([], INTERVALS) is None


def test_summary_by_hand():
    table = [
        *spread("customcontrast", "a", "reconstruction", -1, clip_t=0.9, reward=2.0, clip_i=0.8, dino_i=0.7),
        *spread("customcontrast", "a", "scene", 0, clip_t=0.3, reward=1.0, clip_i=0.6, dino_i=0.5),
        *spread("customcontrast", "a", "style", 1, clip_t=0.1, reward=-2.0, clip_i=0.0, dino_i=0.0),
        *spread("customcontrast", "a", "pair", 0, clip_t=0.0, reward=-9.0, clip_i=0.1, dino_i=0.1),
        *spread("real", "a", "photo", -1, clip_t=None, clip_i=0.85, dino_i=0.75),
        *spread("prompt_only", "a", "scene", 0, clip_t=0.4),
        *spread("another", "a", "scene", 0, clip_t=0.5),
    ]
    segmentations = [*found("customcontrast", True, True, False, True), *found("another", True)]
    every = metrics.summaries(table, segmentations, INTERVALS)
    assert list(every) == ["customcontrast", "another", "prompt_only", "real"]
    model, real = every["customcontrast"], every["real"]
    # The reconstruction prompt asks for nothing that could be followed, and a pair is a question of its own.
    assert {name: model[name]["mean"] for name in metrics.METRICS} == {
        "CT": 0.2,
        "IR": -0.5,
        "R-CI": 0.8,
        "E-CI": 0.3,
        "R-DI": 0.7,
        "E-DI": 0.25,
    }
    assert (model["pictures"], model["misses"], model["miss_rate"]) == (4, 1, 0.25)
    assert model["groups"]["scene"]["clip_i"]["mean"] == 0.6
    assert model["groups"]["pair"]["clip_i"]["mean"] == 0.1
    assert model["subjects"]["a"]["clip_i"] == {"R": 0.8, "E": 0.3}
    assert model["metrics"]["reward"]["R"]["mean"] == 2.0
    assert (real["CT"], real["IR"]) == (None, None)
    assert [real[name]["mean"] for name in ("R-CI", "E-CI", "R-DI", "E-DI")] == [0.85, 0.85, 0.75, 0.75]
    assert (real["pictures"], real["misses"], real["miss_rate"]) == (1, 0, 0.0)


def test_position_by_hand():
    low, high = ({"mean": mean, "low": None, "high": None} for mean in (0.2, 0.6))
    for mean, place in ((0.2, 0.0), (0.6, 1.0), (0.3, 0.25), (0.1, -0.25), (0.8, 1.5)):
        assert metrics.position({"mean": mean, "low": 0.0, "high": 1.0}, low, high) == place
    nearly = {"mean": 0.2009, "low": None, "high": None}
    for nothing_between in ((high, high, low), (low, low, low), (low, low, nearly)):
        assert metrics.position(*nothing_between) is None
    wide = {"mean": 0.6, "low": 0.35, "high": 0.85}
    assert metrics.position(high, {"mean": 0.2, "low": 0.1, "high": 0.3}, wide) == 1.0
    assert metrics.position(high, {"mean": 0.2, "low": 0.0, "high": 0.4}, wide) is None, "the ends' intervals overlap"
    for missing in ((None, low, high), (low, None, high), (low, low, None)):
        assert metrics.position(*missing) is None


def test_positions_are_of_every_method_between_the_base_model_and_true_renders():
    ends = [
        *spread("prompt_only", "a", "scene", 0, clip_t=0.4, dino_i=0.25),
        *spread("prompt_only", "a", "style", 1, clip_t=0.2, dino_i=0.25),
        *spread("truth", "a", "scene", 0, clip_t=0.3, dino_i=0.75),
        *spread("truth", "a", "style", 1, clip_t=0.3, dino_i=0.75),
    ]
    table = [
        *ends,
        *spread("customcontrast", "a", "scene", 0, clip_t=0.3, dino_i=0.5),
        *spread("customcontrast", "a", "style", 1, clip_t=0.25, dino_i=0.75),
        *spread("real", "a", "photo", -1, clip_t=None, dino_i=0.875),
    ]
    found = metrics.positions(metrics.summaries(table, [], INTERVALS))
    assert list(found) == ["customcontrast", "real"]
    model = found["customcontrast"]
    nothing = dict.fromkeys(metrics.METRICS)
    assert {name: model[name] for name in metrics.METRICS} == nothing | {"E-DI": 0.75}, "CT of both ends is 0.3"
    assert {name: found["real"][name] for name in metrics.METRICS} == nothing | {"E-DI": 1.25}
    # In scenes the base model's CLIP-T is above that of true renders.
    assert {group: (of["clip_t"], of["dino_i"]) for group, of in model["groups"].items()} == {
        "scene": (None, 0.5),
        "style": (0.5, 1.0),
    }
    assert found["real"]["groups"]["scene"]["dino_i"] is None
    for one in ("prompt_only", "truth"):
        rest = [row for row in table if row["method"] != one]
        assert metrics.positions(metrics.summaries(rest, [], INTERVALS)) == {}


def test_columns_are_the_published_ones_and_then_every_other_metric_that_says_something():
    table = [
        *spread("m", "a", "scene", 0, clip_t=0.3, clip_i_whole=0.5, lpips=None),
        *spread("m", "a", "reconstruction", 0, clip_t=0.6),
    ]
    columns = metrics.columns(metrics.summary(table, [], INTERVALS))
    assert list(columns) == [*metrics.METRICS, "E-clip_i_whole", "R-clip_t"]
    assert columns["E-clip_i_whole"]["mean"] == 0.5


def test_skipped_misses_do_not_pull_a_mean_down():
    table = [*spread("m", "a", "scene", 0, clip_i=0.6), *spread("m", "a", "scene", 1, clip_i=None)]
    assert metrics.summary(table, [], INTERVALS)["E-CI"]["mean"] == 0.6
