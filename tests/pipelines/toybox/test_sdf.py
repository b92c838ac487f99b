from itertools import product

import pytest
import torch
from torch import Tensor

from pipelines.toybox.rendering.accessories import ACCESSORIES, REACH
from pipelines.toybox.rendering.sdf import FAMILIES, Point, nearest, union

CORNERS = list(product((0.0, 1.0), repeat=4))


def grid(half: float, count: int = 61) -> tuple[Point, float]:
    line = torch.linspace(-half, half, count)
    x, y, z = (a.reshape(-1) for a in torch.meshgrid(line, line, line, indexing="ij"))
    return (x, y, z), 2 * half / (count - 1)


def proportions(corner: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.full_like(like, value) for value in corner)
    return a, b, c, d


@pytest.mark.parametrize("family", FAMILIES)
def test_families_stand_on_their_base_inside_the_unit_sphere(family: str) -> None:
    p, step = grid(1.2)
    far = torch.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)
    for corner in CORNERS[::3]:
        inside = union(FAMILIES[family].parts(p, proportions(corner, p[0]))) < 0
        assert far[inside].max() <= 1.005
        assert abs(p[1][inside].min() - FAMILIES[family].anchors(corner).base) < 2 * step


@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_accessories_stay_within_their_reach(accessory: str) -> None:
    p, _ = grid(2.2)
    inside = union(ACCESSORIES[accessory].parts(p)) < 0
    assert torch.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)[inside].max() <= REACH


@pytest.mark.parametrize("family", FAMILIES)
def test_distances_hardly_ever_promise_too_much(family: str) -> None:
    p, step = grid(1.1, 41)
    d = union(FAMILIES[family].parts(p, proportions((0.5, 0.5, 0.5, 0.5), p[0]))).reshape(41, 41, 41)
    near = d.abs() < 0.3
    for axis in range(3):
        slope = d.diff(dim=axis).abs() / step
        both = near.narrow(axis, 0, 40) & near.narrow(axis, 1, 40)
        assert (slope[both] > 1.15).float().mean() < 0.02


def test_the_earlier_part_wins_a_tie() -> None:
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])
    assert nearest([(3, a), (4, b)]).tolist() == [3, 4]
    assert union([(3, a), (4, b)]).tolist() == [0.0, 0.5]
