import numpy as np
import pytest

from eval import metrics

COLUMNS = ("method", "subject_id", "group", "prompt_id", "index", "segmented", "clip_t", "clip_i", "dino_i")


def rows(*values: tuple) -> list[dict]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in values]


def test_a_picture_scores_its_mean_cosine_to_all_photos():
    pictures = np.array([[1.0, 0.0], [0.0, 1.0]])
    photos = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert metrics.mean_cosines(pictures, photos) == pytest.approx([0.8, 0.4])


def test_real_against_real_leaves_out_a_photo_against_itself():
    photos = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    # (0 + 0.6) / 2, (0 + 0.8) / 2, (0.6 + 0.8) / 2
    assert metrics.mean_cosines_to_others(photos) == pytest.approx([0.3, 0.4, 0.7])


def test_a_single_real_photo_has_nothing_to_be_compared_with():
    assert np.isnan(metrics.mean_cosines_to_others(np.array([[1.0, 0.0]]))).all()


@pytest.mark.parametrize(
    ("policy", "expected"), [("zero", [0.5, 0.0]), ("skip", [0.5, None]), ("unsegmented", [0.5, 0.25])]
)
def test_miss_policies(policy, expected):
    assert metrics.with_misses([0.5, 0.25], [True, False], policy) == expected


def test_means_are_over_pictures_of_a_subject_first_and_then_over_subjects():
    table = rows(
        ("m", "a", "scene", 0, 0, True, 0.1, 0.2, None),
        ("m", "a", "scene", 1, 0, True, 0.3, 0.4, None),
        ("m", "a", "scene", 2, 0, True, 0.2, 0.6, None),
        ("m", "b", "scene", 0, 0, True, 0.4, 0.8, None),
    )
    assert metrics.subject_mean(table, "clip_t") == pytest.approx((0.2 + 0.4) / 2)
    assert metrics.subject_mean(table, "clip_i") == pytest.approx((0.4 + 0.8) / 2)
    assert metrics.subject_mean(table, "dino_i") is None


def test_summary_by_hand():
    table = rows(
        ("customcontrast", "a", "reconstruction", -1, 0, True, 0.9, 0.8, 0.7),
        ("customcontrast", "a", "scene", 0, 0, True, 0.3, 0.6, 0.5),
        ("customcontrast", "a", "style", 1, 0, False, 0.1, 0.0, 0.0),
        ("real", "a", "photo", -1, 0, True, None, 0.85, 0.75),
    )
    both = metrics.summaries(table)
    assert list(both) == ["customcontrast", "real"]
    model, real = both["customcontrast"], both["real"]
    assert {name: model[name] for name in metrics.METRICS} == {
        "CT": 0.2,  # the reconstruction prompt asks for nothing that could be followed
        "R-CI": 0.8,
        "E-CI": 0.3,
        "R-DI": 0.7,
        "E-DI": 0.25,
    }
    assert (model["subjects"], model["pictures"], model["misses"]) == (1, 3, 1)
    assert model["groups"]["scene"] == {"CT": 0.3, "CI": 0.6, "DI": 0.5}
    assert (real["CT"], real["R-CI"], real["E-CI"], real["R-DI"], real["E-DI"]) == (None, 0.85, 0.85, 0.75, 0.75)


def test_skipped_misses_do_not_pull_a_mean_down():
    table = rows(
        ("customcontrast", "a", "scene", 0, 0, True, 0.3, 0.6, 0.5),
        ("customcontrast", "a", "scene", 1, 0, False, 0.3, None, None),
        ("customcontrast", "b", "scene", 1, 0, False, 0.3, None, None),
    )
    assert metrics.summary(table)["E-CI"] == 0.6
