"""From easy samples to hard ones: what each batch shows is a function of seed and batch, and harder later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from runtime.errors import UserError
from runtime.params import Params
from tests.world.batches import names, read, sampler
from tests.world.training import write_world
from train.batches.training_set import TrainingSet
from train.curriculum import Curriculum, CurriculumParams
from train.recipe import TrainParams

STEPS, BATCH = 100, 6


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Subjects with three triplets, 20, 60 and 150 degrees apart, and four with a single photo."""
    found = read(write_world(tmp_path_factory.mktemp("world") / "data", group_size=12).data)
    index = np.array([int(name.as_py().rpartition("/")[2]) for name in found.triplet_ids])
    return replace(found, angles=np.where(found.single, np.nan, np.array([20.0, 60.0, 150.0])[index]))


def curriculum(**changes: Any) -> Curriculum:
    values = Params.read().tree()["train"]["curriculum"] | {"schedule": "linear"} | changes
    return Curriculum(CurriculumParams.model_validate(values), seed=3, steps=STEPS, accumulation=1)


def shown(samples: TrainingSet, course: Curriculum | None, steps: range = range(STEPS)) -> list[Any]:
    draws = sampler(samples, curriculum=course)
    return [draws.draw(step) for step in steps]


def test_difficulty_grows_between_a_tenth_and_six_tenths_of_the_run():
    course = curriculum()
    for step in range(STEPS):
        share = min(max((step / STEPS - 0.1) / 0.5, 0.0), 1.0)
        now = course.at(step)
        assert now.multi_view == pytest.approx(0.5 * share)
        assert now.angle == pytest.approx(15 + 75 * share)
        assert now.scale == pytest.approx((0.9 - 0.4 * share, 0.95))
    constant = curriculum(schedule="constant")
    assert all(constant.at(step) == constant.params.end for step in range(STEPS))


def test_micro_steps_of_a_step_are_equally_hard():
    course = replace(curriculum(), accumulation=4)
    assert [course.at(batch) for batch in range(0, 4 * STEPS, 4)] == [curriculum().at(step) for step in range(STEPS)]
    assert course.at(4 * 30) == course.at(4 * 30 + 3)


def test_no_curriculum_is_the_present_training(samples: TrainingSet):
    none = Curriculum.of(Params.read().section("train", TrainParams).curriculum, 0, STEPS, 1)
    assert none is None
    for draw in shown(samples, none, range(10)):
        assert not draw.own.any() and draw.scales is None


def test_what_else_is_drawn_stays_as_without_a_curriculum(samples: TrainingSet):
    for with_one, without in zip(shown(samples, curriculum()), shown(samples, None), strict=True):
        assert np.array_equal(samples.subjects[with_one.triplets], samples.subjects[without.triplets])
        for name in ("timesteps", "positive_timesteps", "drop_image", "drop_text", "grouping"):
            assert np.array_equal(getattr(with_one, name), getattr(without, name)), name


def test_share_angles_and_sizes_follow_the_difficulty(samples: TrainingSet):
    course = curriculum()
    draws = shown(samples, course)
    for step, draw in enumerate(draws):
        now = course.at(step)
        others = draw.triplets[~draw.own]
        assert (samples.angles[others] <= now.angle).all()
        assert ((draw.scales >= now.scale[0]) & (draw.scales <= now.scale[1])).all()
        assert (~draw.own).sum() in (int(now.multi_view * BATCH), int(now.multi_view * BATCH) + 1)
    assert all(draw.own.all() for draw in draws[:10])
    late = np.concatenate([draw.triplets[~draw.own] for draw in draws[60:]])
    assert len(late) == pytest.approx(0.5 * 40 * BATCH, rel=0.1)
    assert {20.0, 60.0} == set(samples.angles[late])  # 150 degrees stay beyond the largest
    scales = np.concatenate([draw.scales for draw in draws[60:]])
    assert scales.min() < 0.55 and scales.mean() == pytest.approx(0.725, abs=0.03)


def test_subject_without_a_view_that_is_near_enough_shows_the_target_itself(samples: TrainingSet):
    whole = curriculum(schedule="constant", end={"multi_view": 1.0, "angle": 30, "scale": [0.5, 0.95]})
    for draw in shown(samples, whole, range(20)):
        assert np.array_equal(draw.own, samples.single[draw.triplets])
        assert (samples.angles[draw.triplets[~draw.own]] == 20).all()
    far = replace(samples, angles=np.full(len(samples), 150.0))
    assert all(draw.own.all() for draw in shown(far, whole, range(5)))


def test_views_without_poses_count_as_the_hardest(samples: TrainingSet):
    unknown = replace(samples, angles=np.where(samples.single, np.nan, np.inf))
    draws = shown(unknown, curriculum())
    assert all(draw.own.all() for draw in draws[:60]) and not all(draw.own.all() for draw in draws[60:])


def test_angles_are_those_of_the_triplets(samples: TrainingSet, tmp_path: Path):
    plain = read(write_world(tmp_path / "data", views=8, single=2).data)
    assert np.isnan(plain.angles[plain.single]).all() and np.isinf(plain.angles[~plain.single]).all()


def test_batches_are_the_same_on_any_ranks_and_after_a_resume(samples: TrainingSet):
    course = curriculum()
    whole = sampler(samples, curriculum=course)
    for step in (70, 5, 42):
        first = whole.batch(step)
        parts = [sampler(samples, curriculum=course).batch(step, rank, 3) for rank in range(3)]
        for name in ("reference", "positive", "latents", "timesteps"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(first, name))
    assert not torch.equal(
        whole.batch(70).reference, sampler(samples, curriculum=replace(course, seed=4)).batch(70).reference
    )


def test_own_reference_is_the_target_s_photo(samples: TrainingSet):
    draws = sampler(samples, curriculum=curriculum())
    hidden = samples.arrays.hidden
    assert hidden is not None
    for step in (0, 80):
        draw, batch = draws.draw(step), draws.batch(step)
        for place, row in enumerate(draw.triplets):
            frame = samples.own[row] if draw.own[place] else samples.reference[row]
            expected = hidden[frame * samples.augmentations + draw.reference_views[place]]
            assert np.array_equal(batch.reference[place].numpy(), expected)
        assert batch.captions == samples.captions.take(draw.triplets).to_pylist()
    assert names(samples, draws.draw(0).triplets)


def test_targets_that_are_not_cached_are_one_sentence(samples: TrainingSet):
    own = samples.own.copy()
    own[3] = -1
    with pytest.raises(UserError, match=r"those of 1 of 64 triplets have no cached hidden states; add target to") as e:
        sampler(replace(samples, own=own), curriculum=curriculum())
    assert "\n" not in str(e.value)
    sampler(replace(samples, own=own))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"span": [0.6, 0.1]}, "must be"),
        ({"span": [0.1, 1.5]}, "span .* is not inside 0..1"),
        ({"schedule": "off"}, "schedule"),
        ({"end": {"multi_view": 2, "angle": 90, "scale": [0.5, 0.9]}}, "multi_view"),
        ({"end": {"multi_view": 0.5, "angle": 90, "scale": [0.0, 0.9]}}, "is not inside 0..1"),
    ],
)
def test_course_that_cannot_be_followed_is_refused(change: dict[str, Any], said: str):
    with pytest.raises(pydantic.ValidationError, match=said):
        curriculum(**change)


def test_a_curriculum_chooses_the_pairing_itself():
    tree = Params.read().tree()["train"]
    tree["curriculum"]["schedule"] = "linear"
    TrainParams.model_validate(tree)
    with pytest.raises(pydantic.ValidationError, match="set it to triplet"):
        TrainParams.model_validate(tree | {"pairing": "self"})
