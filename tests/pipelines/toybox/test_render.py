from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.toybox import world
from pipelines.toybox.rendering import exact
from pipelines.toybox.rendering.accessories import ACCESSORIES, fit
from pipelines.toybox.rendering.march import View, camera
from pipelines.toybox.rendering.render import Rendered
from pipelines.toybox.rendering.scenes import BLANK
from pipelines.toybox.rendering.sdf import BODY, FAMILIES, WORN, union
from pipelines.toybox.world import Item, Look, render, sample_look, sample_subject, sample_view


def random_items(count: int, seed: int) -> list[Item]:
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    for _ in range(count):
        subject = sample_subject(rng)
        look = sample_look(rng, style=0.4, shape=0.3, accessory=0.4, family=subject.family)
        items.append((subject, sample_view(rng), look))
    return items


def assert_same(a: Rendered, b: Rendered) -> None:
    for name in ("images", "masks", "subject_masks", "parts", "depth"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_same_items_give_the_same_bytes() -> None:
    items = random_items(20, 0)
    assert_same(render(items), render(items))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    items = random_items(61, 1)
    whole = render(items)
    alone = [render([items[i]]) for i in (0, 7, 33, 60)]
    for i, one in zip((0, 7, 33, 60), alone, strict=True):
        assert torch.equal(whole.images[i], one.images[0])
    back = render(items[::-1])
    for name in ("images", "masks", "subject_masks", "parts", "depth"):
        assert torch.equal(getattr(whole, name), getattr(back, name).flip(0)), name
    assert_same(
        render(items[5:18]),
        Rendered(*(getattr(whole, n)[5:18] for n in Rendered.__dataclass_fields__)),
    )


def test_a_picture_depends_neither_on_chunks_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(24, 2)
    whole = render(items)
    monkeypatch.setattr("pipelines.toybox.rendering.render.CHUNK", 7)
    assert_same(render(items), whole)
    torch.set_num_threads(2)
    try:
        assert_same(render(items), whole)
    finally:
        torch.set_num_threads(1)


def brute_force(item: Item, size: int, samples: int = 1500) -> Tensor:
    """Bool [H, W]: whether the ray through a pixel's centre meets the subject or what it wears, by dense sampling."""
    subject, view, look = item
    rotation, translation, k = camera(view, size)
    v, u = np.mgrid[:size, :size] + 0.5
    away = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1) @ rotation
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    eye = -rotation.T @ translation
    t = np.linalg.norm(eye) + np.linspace(-1.05, 1.05, samples)
    p = torch.from_numpy(eye + away[:, :, None] * t[:, None]).float().reshape(-1, 3).T
    family = FAMILIES[look.shape or subject.family]
    anchors = family.anchors(subject.proportions)
    scale, height = fit(ACCESSORIES[look.accessory], anchors) if look.accessory else (1.0, 0.0)
    x, y, z = p[0] / scale, (p[1] - height) / scale, p[2] / scale
    q = tuple(torch.full_like(x, value) for value in subject.proportions)
    distance = union(family.parts((x, y, z), q))  # type: ignore[arg-type]
    if look.accessory:
        row = ACCESSORIES[look.accessory]
        ax, ay, az, radius = getattr(anchors, row.anchor)
        worn = union(row.parts(((x - ax) / radius, (y - ay) / radius, (z - az) / radius)))
        distance = torch.minimum(distance, worn * radius)
    return (distance.reshape(size, size, samples) < 0).any(-1)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_masks_are_exact(family: str) -> None:
    rng = np.random.default_rng(7)
    accessory = world.ACCESSORIES[world.FAMILIES.index(family) % len(world.ACCESSORIES)]
    for worn in (None, accessory):
        item = (
            sample_subject(rng, family),
            sample_view(rng),
            Look("beach", accessory=worn),
        )
        mask, truth = render([item], 32).masks[0], brute_force(item, 32)
        wrong = (mask != truth).sum().item()
        assert wrong <= 0.02 * truth.sum().item() + 1, f"{wrong} of {truth.sum()} pixels"


def test_the_camera_is_a_rotation_and_sees_the_centre_where_the_picture_has_it() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        view = sample_view(rng)
        rotation, translation, k = camera(view, 64)
        assert np.allclose(rotation @ rotation.T, np.eye(3))
        assert np.isclose(np.linalg.det(rotation), 1)
        pixel = k @ translation / translation[2]
        assert np.allclose(pixel[:2], 32 + 64 * np.array(view.position))
        ball = replace(sample_subject(rng, "ball"), proportions=(0.25, 0.0, 0.5, 0.5))
        mask = render([(ball, view, Look(BLANK))]).masks[0].numpy()
        rows, columns = np.nonzero(mask)
        assert abs(columns.mean() + 0.5 - pixel[0]) < 0.8
        assert abs(rows.mean() + 0.5 - pixel[1]) < 0.8


def test_upright_stays_upright_and_the_front_looks_at_azimuth_zero() -> None:
    rotation, translation, k = camera(View(azimuth=0, elevation=20), 64)
    base, top, side = (k @ (rotation @ np.array(p) + translation) for p in ((0, -0.5, 0), (0, 0.5, 0), (0.5, 0, 0)))
    assert top[1] / top[2] < 32 < base[1] / base[2]
    assert np.isclose(top[0] / top[2], 32)
    assert side[0] / side[2] > 32


def test_depth_lies_on_the_surface() -> None:
    rng = np.random.default_rng(9)
    item = (sample_subject(rng, "ball"), sample_view(rng), Look("snow"))
    depth = render([item]).depth[0].numpy().astype(np.float64)
    rotation, translation, k = camera(item[1], 64)
    rows, columns = np.nonzero(depth)
    rays = np.stack(
        [
            (columns + 0.5 - 32) / k[0, 0],
            (rows + 0.5 - 32) / k[1, 1],
            np.ones(len(rows)),
        ],
        1,
    )
    p = torch.from_numpy((rays * depth[rows, columns, None] - translation) @ rotation).T
    q = tuple(torch.full_like(p[0], value) for value in item[0].proportions)
    assert union(FAMILIES["ball"].parts((p[0], p[1], p[2]), q)).abs().max() < 0.01  # type: ignore[arg-type]


def test_subjects_are_large_and_never_cut_by_the_border() -> None:
    rng = np.random.default_rng(10)
    items: list[Item] = []
    for family, accessory in product(world.FAMILIES, (None, *world.ACCESSORIES)):
        for _ in range(3):
            items.append(
                (
                    sample_subject(rng, family),
                    sample_view(rng),
                    Look("studio", accessory=accessory),
                )
            )
    masks = render(items).masks
    assert not (masks[:, 0].any() | masks[:, -1].any() | masks[:, :, 0].any() | masks[:, :, -1].any())
    share = masks.float().mean((1, 2)).reshape(len(world.FAMILIES), -1)
    assert 0.12 < share.mean() < 0.30
    assert share.mean(1).min() > 0.10
    assert share.mean(1).max() < 0.40


def test_everything_in_the_tables_renders_and_looks_different() -> None:
    rng = np.random.default_rng(11)
    duck, view = sample_subject(rng, "duck"), sample_view(rng, 20.0)
    looks = [
        *(Look(scene, seed=1) for scene in (*world.SCENES, BLANK)),
        *(Look("beach", style=style, seed=1) for style in world.STYLES[1:]),
        *(Look("beach", shape=shape, seed=1) for shape in world.SHAPES),
        *(Look("beach", accessory=accessory, seed=1) for accessory in world.ACCESSORIES),
    ]
    items: list[Item] = [(duck, view, look) for look in looks]
    items += [(sample_subject(rng, family), view, Look("grass")) for family in world.FAMILIES]
    items += [(replace(duck, pattern=p), view, Look("grass")) for p in world.PATTERNS]
    images = render(items).images
    assert len({image.numpy().tobytes() for image in images}) == len(items)
    assert images.float().std((1, 2, 3)).min() > 5


def test_every_pattern_shows_both_colours_and_mostly_the_main_one() -> None:
    rng = np.random.default_rng(12)
    red, white = (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    named = list(product(world.FAMILIES, world.PATTERNS[1:], (0.0, 0.5, 0.9)))
    items: list[Item] = []
    for family, pattern, number in named:
        subject = replace(
            sample_subject(rng, family), rgb=(red, white, red), pattern=pattern, scale=number, phase=number
        )
        items.append((subject, View(20.0, 20.0), Look("grass")))
    out = render(items)
    body = out.parts == BODY
    share = ((out.images[..., 1] > 110) & body).sum((1, 2)) / body.sum((1, 2))
    for (family, pattern, number), second in zip(named, share.tolist(), strict=True):
        assert 0.08 < second < 0.68, (family, pattern, number)
    shares = {
        p: np.mean([v for (_, q, _), v in zip(named, share.tolist(), strict=True) if q == p])
        for p in world.PATTERNS[1:]
    }
    assert max(shares.values()) < 0.45


def test_the_subject_mask_leaves_out_what_is_worn() -> None:
    rng = np.random.default_rng(13)
    items: list[Item] = [
        (sample_subject(rng), sample_view(rng, 10.0), Look("grass", accessory=name)) for name in world.ACCESSORIES
    ]
    out = render(items)
    assert torch.equal(out.masks, out.parts > 0)
    assert torch.equal(out.subject_masks, (out.parts > 0) & (out.parts < WORN))
    assert ((out.masks & ~out.subject_masks).sum((1, 2)) > 20).all()


def test_the_blank_scene_is_white_outside_the_subject() -> None:
    rng = np.random.default_rng(14)
    out = render([(sample_subject(rng, "mug"), sample_view(rng), Look(BLANK))])
    far = torch.nn.functional.max_pool2d(out.masks.float()[:, None], 5, 1, 2)[:, 0] == 0
    assert (out.images[far] == 255).all()


def test_other_sizes_show_the_same_picture() -> None:
    items = random_items(3, 15)
    small, large = render(items, 32).masks, render(items, 96).masks
    shrunk = torch.nn.functional.avg_pool2d(large.float()[:, None], 3)[:, 0] > 0.5
    assert (small != shrunk).float().mean() < 0.03


def test_roots_are_rounded_correctly() -> None:
    """Nowhere off by a bit, as the vector libraries behind `torch.sqrt` are on some processors."""
    x = np.random.default_rng(0).random(100_000, dtype=np.float32) * np.float32(4)
    x[:4] = 0, np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    np.testing.assert_array_equal(exact.sqrt(torch.from_numpy(x)).numpy(), np.sqrt(x))


def test_exact_functions_are_near_the_true_ones() -> None:
    t = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    assert (exact.wave(t) - torch.sin(2 * torch.pi * t)).abs().max() < 0.002
    y, x = torch.sin(2 * torch.pi * t * 0.24), torch.cos(2 * torch.pi * t * 0.24)
    assert (exact.angle(y, x) - torch.atan2(y, x) / (2 * torch.pi)).abs().max() < 0.0002
