import numpy as np
import pytest

from eval.probes.views import invariance
from eval.probes.views import stage as view_tokens
from pipelines import tables


def unit(*angles):
    """Unit vectors [P, 2] at angles in degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    vectors = unit(0, 10, 12, 80)[:, None]
    subjects = ["a", "a", "b", "b"]
    likeness = invariance.cosines(vectors)
    pairs = {(i, j): float(likeness[i, j]) for i in range(4) for j in range(i + 1, 4)}
    same = [pairs[0, 1], pairs[2, 3]]
    other = [pairs[0, 2], pairs[0, 3], pairs[1, 2], pairs[1, 3]]
    right = [(s > o) + 0.5 * (s == o) for s in same for o in other]
    assert invariance.pair_auc(likeness, subjects) == pytest.approx(sum(right) / len(right))
    assert invariance.mean_cosine(likeness, subjects, True) == pytest.approx(np.mean(same))
    assert invariance.mean_cosine(likeness, subjects, False) == pytest.approx(np.mean(other))


def test_within_classes_only_classes_of_several_subjects_count():
    subjects = ["dog", "dog", "dog2", "dog2", "cat", "cat"]
    classes = ["dog"] * 4 + ["cat"] * 2
    far = unit(0, 40, 20, 60, 180, 185)[:, None]
    likeness = invariance.cosines(far)
    assert invariance.pair_auc(likeness, subjects, classes) == pytest.approx(
        np.mean([(s > o) + 0.5 * (abs(s - o) < 1e-9) for s in (likeness[0, 1], likeness[2, 3])
                 for o in (likeness[0, 2], likeness[0, 3], likeness[1, 2], likeness[1, 3])])
    )  # fmt: skip
    assert invariance.pair_auc(likeness, subjects) > invariance.pair_auc(likeness, subjects, classes)
    assert invariance.pair_auc(likeness, subjects, subjects) is None, "no class holds two subjects"
    assert invariance.pair_auc(likeness[:2, :2], ["a", "b"]) is None, "no two photos of one subject"


def test_likeness_is_the_mean_over_levels():
    vectors = np.stack([unit(0, 60), unit(0, 90)], axis=1)
    assert invariance.cosines(vectors)[0, 1] == pytest.approx((0.5 + 0.0) / 2)


def test_tokens_of_all_text_encoders_count_alike_whatever_their_length():
    one, other = np.array([[[[3.0, 4.0], [0.0, 2.0]]]]), np.array([[[[5.0, 0.0, 0.0], [0.0, 0.0, 7.0]]]])
    found = invariance.unit_tokens([one, other])
    assert found.shape == (1, 1, 10)
    assert found[0, 0] == pytest.approx(np.array([0.6, 0.8, 0, 1, 1, 0, 0, 0, 0, 1]) / 2)


def test_silhouette_is_that_of_the_definition():
    vectors, labels = unit(0, 10, 90, 120), ["a", "a", "b", "b"]
    distance = 1 - vectors @ vectors.T
    own = [distance[0, 1], distance[1, 0], distance[2, 3], distance[3, 2]]
    near = [distance[0, 2:].mean(), distance[1, 2:].mean(), distance[2, :2].mean(), distance[3, :2].mean()]
    wanted = np.mean([(n - o) / max(n, o) for o, n in zip(own, near, strict=True)])
    assert invariance.silhouette(vectors, labels) == pytest.approx(wanted)
    assert invariance.silhouette(vectors, ["a"] * 4) is None
    assert invariance.silhouette(vectors, ["a", "b", "c", "d"]) is None


def test_the_map_is_the_same_each_time_and_keeps_groups_together():
    vectors = unit(*(start + step for start in (0, 120, 240) for step in range(14)))
    places = invariance.flat_map(vectors, 10.0, seed=0)
    assert (places == invariance.flat_map(vectors, 10.0, seed=0)).all()
    assert np.abs(places).max() == pytest.approx(1.0)
    groups = places.reshape(3, 14, 2)
    spread = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=-1).max()
    middles = groups.mean(axis=1)
    assert min(np.linalg.norm(middles[i] - middles[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 2 * spread


def test_three_photos_have_no_map():
    assert (invariance.flat_map(unit(0, 10, 20), 5.0, seed=0) == 0).all()


def test_levels_are_those_of_the_papers_figure_at_sixteen_layers():
    shares = (0.125, 0.4375, 0.625, 0.8125)
    assert [level + 1 for level in view_tokens.chosen_levels(shares, 16)] == [2, 7, 10, 13]
    assert view_tokens.chosen_levels(shares, 1) == [0]


@pytest.fixture
def params():
    return view_tokens.ViewsParams(
        split="test",
        subjects=None,
        timestep=500,
        shares=(0.5, 1.0),
        perplexity=5.0,
        seed=0,
        margin=0.05,
        batch_size=2,
        threads=1,
    )


def token_rows(levels):
    angles = {"bench/duck": (0, 5), "bench/mug": (90, 95)}
    return [
        {"subject_id": s, "frame_id": f"{s}/{n:02d}", "level": level, "class_name": s[6:], "vector": v}
        for level in levels
        for s, of in angles.items()
        for n, v in enumerate(unit(*of).astype(np.float16))
    ]


def test_metrics_come_from_the_table_of_tokens(tmp_path, params):
    tables.write(tmp_path, "view_tokens", tables.from_rows("view_tokens", token_rows((-1, 0, 1))))
    metrics, places = view_tokens.measure(tmp_path, params)
    assert (metrics["photos"], metrics["subjects"], metrics["level_count"]) == (4, 2, 2)
    assert metrics["s_plus"]["auc"] == metrics["image_encoder"]["auc"] == 1.0
    assert metrics["s_plus"]["auc_same_class"] is None
    assert set(metrics["levels"]) == {"0", "1"} and metrics["levels"]["1"]["silhouette_subject"] > 0.9
    assert metrics["levels"]["1"]["silhouette_view"] < 0, "the first and second photos of two subjects are no groups"
    assert [place[:3] for place in places[:2]] == [("bench/duck", f"bench/duck/0{n}", 0) for n in range(2)]


def test_an_adapter_without_a_textual_q_former_has_no_s_plus(tmp_path, params):
    tables.write(tmp_path, "view_tokens", tables.from_rows("view_tokens", token_rows((-1,))))
    metrics, places = view_tokens.measure(tmp_path, params)
    assert metrics["s_plus"] is None and metrics["levels"] == {} and places == []
    assert metrics["image_encoder"]["auc"] == 1.0


def test_shares_outside_the_levels_are_refused(params):
    with pytest.raises(ValueError, match="shares above 0 and at most 1"):
        view_tokens.ViewsParams(**{**params.model_dump(), "shares": (0.0,)})
