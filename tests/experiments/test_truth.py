"""What the toybox knows of its evaluation subjects, and measures made with it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import truth
from pipelines import tables
from pipelines.toybox import layouts
from pipelines.toybox.stage import FacesParams, ToyboxParams
from pipelines.toybox.world import Look, apart, render
from tests.world.faces import FACES
from train.toybox.lessons.toys import TOYS
from train.toybox.models.judge import load_judge

PARAMS = ToyboxParams(
    root="-",
    world="toys",
    seed=3,
    size=64,
    mvimgnet_subjects=1,
    mvimgnet_views=2,
    scene_per_view=True,
    openimages_photos=1,
    dreambench_subjects=11,
    dreambench_photos=2,
    caption_detail="noun",
    faces=FacesParams(**FACES),
)


def test_subjects_and_views_are_those_that_were_drawn(tmp_path):
    layouts.write_dreambench(tmp_path, 3, 11, 2, 64, "noun", lambda done, total: None)
    world = truth.people(PARAMS)
    assert {path.name for path in (tmp_path / "dataset").iterdir() if path.is_dir()} == set(world)
    drawn = render([item for _, photos in world.values() for item in photos]).images.numpy()
    files = [tmp_path / "dataset" / name / f"{k:02d}.jpg" for name in world for k in range(2)]
    for image, file in zip(drawn, files, strict=True):
        assert np.abs(image.astype(int) - np.asarray(Image.open(file)).astype(int)).mean() < 4, file  # JPEG


def noun(name: str) -> str:
    """The class noun of a subject: its name without the number of a second one."""
    return name.rstrip("0123456789")


def generation(image: np.ndarray, name: str, prompt: str) -> dict:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return {
        "subject_id": f"bench/{name}",
        "prompt": prompt,
        "image": stream.getvalue(),
        "reference": f"bench/{name}/00",
    }


def test_attributes_of_true_pictures_are_found_and_of_another_s_are_not():
    world, judge = truth.people(PARAMS), load_judge(TOYS)
    names = sorted(world)
    subjects = {name: subject for name, (subject, _) in world.items()}
    items = [(subject, photos[0][1], Look("beach")) for _, (subject, photos) in sorted(world.items())]
    images = render(items).images.numpy()
    prompt = "a {} on the beach"
    right = truth.attributes(
        [generation(i, n, prompt.format(noun(n))) for i, n in zip(images, names, strict=True)], subjects, judge
    )
    assert min(*right["kept"].values(), right["followed"]["scene"]) > 0.8
    assert right["followed"]["style"] is None
    other = np.roll(images, 1, axis=0)
    wrong = truth.attributes(
        [generation(i, n, prompt.format(noun(n))) for i, n in zip(other, names, strict=True)], subjects, judge
    )
    assert wrong["kept"]["family"] < 0.5 and wrong["followed"]["scene"] > 0.8


def test_only_pictures_of_one_subject_by_the_model_are_measured(tmp_path, monkeypatch):
    image = np.zeros((64, 64, 3), np.uint8)
    row = generation(image, "duck", "a duck") | {"method": "customcontrast", "class_name": "duck", "partner": None}
    row |= {"prompt_id": 0, "group": "scene", "index": 0, "seed": 0}
    rows = [row, row | {"method": "prompt_only"}, row | {"group": "pair", "partner": "bench/mug"}]
    tables.write(tmp_path / "generate", "generations", tables.from_rows("generations", rows))
    monkeypatch.setattr(truth, "people", lambda params: {})
    monkeypatch.setattr(truth, "load_judge", lambda world: None)
    monkeypatch.setattr(truth, "attributes", lambda measured, subjects, judge: {"pictures": len(measured)})
    monkeypatch.setattr(truth, "poses", lambda measured, world, judge: {"pictures": len(measured)})
    assert truth.measure(tmp_path, PARAMS) == {"pictures": 1, "pose": {"pictures": 1}}


@pytest.mark.parametrize("shape", ["can", "ring", "cone"])
def test_another_shape_is_seen_however_the_judge_names_it(shape: str):
    """It may call a can shaped mug a can; and a picture in the subject's own shape is not one in another."""
    world, judge = truth.people(PARAMS), load_judge(TOYS)
    subjects = {name: subject for name, (subject, _) in world.items() if subject.family != shape}
    views = [(name, photo[1]) for name in subjects for photo in world[name][1]]
    prompt = f"a {shape} shaped {{}}"
    shares = []
    for drawn in (shape, None):
        images = render([(subjects[name], view, Look("studio", shape=drawn)) for name, view in views]).images.numpy()
        rows = [generation(i, n, prompt.format(noun(n))) for i, (n, _) in zip(images, views, strict=True)]
        shares.append(truth.attributes(rows, subjects, judge)["followed"]["shape"])
    assert shares[0] > 0.8 and shares[1] < 0.2


def test_leakage_by_hand():
    azimuths = {"a": [0.0, 90.0, 180.0, 270.0]}
    copied = truth.leakage([("a", azimuth, azimuth) for azimuth in azimuths["a"]], azimuths)
    assert copied == {"same_pose": 1.0, "chance": 0.25}
    front = truth.leakage([("a", 10.0, azimuth) for azimuth in azimuths["a"]], azimuths)
    assert front == {"same_pose": 0.25, "chance": 0.25}
    assert apart(-170, 170) == 20


def test_pose_of_a_render_is_read_and_a_copied_photo_leaks():
    world, judge = truth.people(PARAMS), load_judge(TOYS)
    rows = []
    for name, (_, photos) in world.items():
        drawn = render([(who, view, Look("studio")) for who, view, _ in photos]).images.numpy()
        for k, image in enumerate(drawn):
            rows.append(generation(image, name, f"a photo of a {noun(name)}") | {"reference": f"bench/{name}/{k:02d}"})
    found = truth.poses(rows, world, judge)
    assert found["subjects"] >= 1 and found["read_right"] >= truth.READABLE
    assert found["same_pose"] > found["chance"] + 0.2


def test_empty_mask_has_no_cut_out():
    assert truth.cut_out(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool)) is None


def test_change_outside_is_that_of_the_same_noise_where_neither_shows_the_subject(monkeypatch):
    images = np.full((2, 64, 64, 3), 100, np.uint8)
    plain = images.copy()
    images[:, 10:30, 10:30] = 255  # the subject, and what surrounds it by up to two pixels
    images[0, 50] += 51  # a row of 64 pixels outside: a fifth of the range
    masks = np.zeros((2, 64, 64), bool)
    masks[:, 12:28, 12:28] = True
    seen = [masks, np.zeros_like(masks)]
    monkeypatch.setattr(truth, "verdicts", lambda judge, images: ({}, torch.from_numpy(seen[int(images.max() == 100)])))

    def rows(pictures: np.ndarray, seed: int = 0) -> list[dict]:
        keys = [{"prompt_id": number, "index": 0, "seed": seed} for number in range(len(pictures))]
        return [generation(image, "duck", "a duck") | key for image, key in zip(pictures, keys, strict=True)]

    outside = 64 * 64 - 20 * 20
    expected = 0.2 * 64 / outside / 2  # of the first of two images
    assert truth.change_outside(rows(images), rows(plain), None)["change"] == pytest.approx(expected, abs=1e-4)
    assert truth.change_outside(rows(plain), rows(plain), None) == {"change": 0.0}
    assert truth.change_outside(rows(images), rows(plain, seed=1), None) == {"change": None}


def test_overlap_is_minima_over_maxima_on_the_grid_of_the_map(monkeypatch):
    masks = np.zeros((3, 64, 64), bool)
    masks[0, :32, :32], masks[1, :, :24] = True, True  # a quarter; three eighths; the third shows no subject
    monkeypatch.setattr(truth, "verdicts", lambda judge, images: ({}, torch.from_numpy(masks)))
    keys = [{"prompt_id": number, "group": "scene", "index": 0, "seed": 0} for number in range(3)]
    rows = [generation(np.zeros((64, 64, 3), np.uint8), "duck", "a duck") | key for key in keys]
    exact = np.zeros((2, 2), np.uint8)
    exact[0, 0] = 255
    whole = np.full((2, 2), 255, np.uint8)

    def seen(number: int, step: int, values: np.ndarray) -> dict:
        return rows[number] | {"step": step, "height": 2, "width": 2, "map": values.tobytes()}

    maps = [seen(0, 4, exact), seen(1, 4, exact), seen(2, 4, exact), seen(0, 11, whole)]
    of_two = (1.0 + 0.75 / (1.0 + 0.75)) / 2  # cells of the second: 0.75, 0 above and below
    assert truth.overlap(maps, rows, None) == {"4": pytest.approx(of_two, abs=1e-4), "11": 0.25}
    assert truth.overlap([], rows, None) == {}
