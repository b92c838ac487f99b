"""LPIPS over a network whose weights are a file: the package's own forward, and each fault in one sentence."""

from __future__ import annotations

from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import squeezenet1_1

from model.backbones.hub import sha256
from model.backbones.perceptual import Perceptual, load_perceptual
from model.backbones.variant import LpipsSpec
from runtime.errors import ModelError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes it, random weights; the smallest of the three networks."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.save(squeezenet1_1().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def perceptual(weights: Path) -> Perceptual:
    return load_perceptual(LpipsSpec(path=str(weights), net="squeeze", sha256=sha256([weights])), "cpu", batch_size=2)


@pytest.fixture
def square(photos: list[Image.Image]) -> list[Image.Image]:
    return [photo.resize((64, 48)) for photo in photos[:4]]


def package(weights: Path) -> lpips.LPIPS:
    """The package's own model, with the weights put where its own download would have put them."""
    model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = torch.load(weights, weights_only=True)
    slices = model.net.state_dict()
    model.net.load_state_dict({key: state[f"features.{key.split('.', 1)[1]}"] for key in slices})
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*torchvision|.*parameter|.*weight enum")
def test_distances_are_the_packages_own(perceptual: Perceptual, weights: Path, square: list[Image.Image]) -> None:
    prepared = [perceptual.prepare(image) for image in square]
    found = perceptual.distances(prepared)
    model = package(weights)

    def forward(a: Image.Image, b: Image.Image) -> Tensor:
        with torch.no_grad():
            return model(*(lpips.im2tensor(np.asarray(image)) for image in (a, b)))[0, 0, 0, 0]

    expected = torch.stack([torch.stack([forward(a, b) for b in square]) for a in square])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found.diagonal() == 0).all() and torch.equal(found, found.T)
    assert found[0, 1] > 0.01


def test_distances_do_not_depend_on_how_many_are_computed_at_once(
    perceptual: Perceptual, square: list[Image.Image]
) -> None:
    prepared = [perceptual.prepare(image) for image in square]
    torch.testing.assert_close(perceptual.distances(prepared)[:2, :2], perceptual.distances(prepared[:2]))
    assert perceptual.distances(prepared[:1]).tolist() == [[0.0]]


def test_pictures_of_several_sizes_are_one_sentence(perceptual: Perceptual, square: list[Image.Image]) -> None:
    prepared = [perceptual.prepare(image) for image in (square[0], square[1].resize((80, 48)))]
    with pytest.raises(ModelError, match="not 64x48 and 80x48"):
        perceptual.distances(prepared)


def test_weights_missing_of_another_network_or_changed_are_one_sentence(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder; download torchvision.models.AlexNet_Weights"):
        load_perceptual(LpipsSpec(path="weights/none.pth", net="alex"), "cpu")
    with pytest.raises(ModelError, match="cannot be read as torchvision's AlexNet weights"):
        load_perceptual(LpipsSpec(path=str(weights), net="alex"), "cpu")
    with pytest.raises(ModelError, match=r"SHA-256 is .*, expected 0000"):
        load_perceptual(LpipsSpec(path=str(weights), net="squeeze", sha256="0" * 64), "cpu")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"broken.pth: cannot be read as torchvision's SqueezeNet1_1 weights"):
        load_perceptual(LpipsSpec(path=str(tmp_path / "broken.pth"), net="squeeze"), "cpu")
