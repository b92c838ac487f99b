"""LPIPS (Zhang et al. 2018): perceptual distance between two images, through its authors' package.

The package ships the calibrated linear layers. The network below them is torchvision's; the package would download its
weights, here they are read from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import lpips
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import identify, reading, require_weights, resolve, sha256
from model.backbones.variant import LpipsSpec
from runtime.errors import ModelError


@dataclass(frozen=True)
class Perceptual:
    """A frozen LPIPS 0.1."""

    model: lpips.LPIPS
    batch_size: int
    """Images per forward pass."""
    name: str
    """`<path>@<12 digits of the SHA-256>`: the id in tables."""
    revision: str

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as network input, [3, h, w] in -1..1 at its own size; runs on the CPU, so threads can do it."""
        return pil_to_tensor(image.convert("RGB")).float() / 127.5 - 1

    @torch.no_grad()
    def distances(self, images: Sequence[Tensor]) -> Tensor:
        """LPIPS between all pairs of `images`, [N, N] float32, 0 on the diagonal; equal to the package's own forward.

        images: outputs of `prepare`. Raises ModelError if their sizes differ. Features are computed once per image; the
        package's forward of pairs would compute them N - 1 times.
        """
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            found = " and ".join(sorted(f"{width}x{height}" for _, height, width in sizes))
            raise ModelError(f"LPIPS compares images of one size, not {found}; generate them again")
        device = self.model.scaling_layer.shift.device
        layers: list[list[Tensor]] = []
        for rows, count in fixed_batches(images, self.batch_size):
            batch = torch.stack(rows).to(device)
            layers.append([lpips.normalize_tensor(f)[:count] for f in self.model.net(self.model.scaling_layer(batch))])
        result = torch.zeros(len(images), len(images), device=device)
        for linear, *parts in zip(self.model.lins, *layers, strict=True) if layers else ():
            features = torch.cat(parts)
            for row, feature in enumerate(features[:-1]):
                between = linear((features[row + 1 :] - feature) ** 2).mean(dim=(1, 2, 3))
                result[row, row + 1 :] += between
        return result + result.T


def load_perceptual(spec: LpipsSpec, device: str | torch.device, batch_size: int = 32) -> Perceptual:
    """The frozen LPIPS over the network of `spec`; raises ModelError if its file is missing or does not fit."""
    known = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet1_1"}[spec.net]
    file = resolve(spec, [], f"download torchvision.models.{known}_Weights.IMAGENET1K_V1.url there")
    digest = sha256([file])
    if spec.sha256 not in (None, digest):
        raise ModelError(f"{spec.path}: SHA-256 is {digest}, expected {spec.sha256}; download it again")
    what = f"torchvision's {known} weights"
    with reading(spec.path, what):
        state = torch.load(file, map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torchvision, about the package's arguments
            model = lpips.LPIPS(net=spec.net, pnet_rand=True, verbose=False)
        # LPIPS's `slice3.6.weight` is torchvision's `features.6.weight`: slices keep the layer numbers.
        names = {key: f"features.{key.partition('.')[2]}" for key in model.net.state_dict()}
        wanted = {names[key]: value for key, value in model.net.state_dict().items()}
        # The classifier comes after the features that LPIPS compares.
        require_weights(wanted, {key: value for key, value in state.items() if not key.startswith("classifier.")})
        model.net.load_state_dict({key: state[name] for key, name in names.items()})
    name, revision = identify(spec, [file])
    return Perceptual(freeze(model, device), batch_size, f"{name}@{revision[:12]}", revision)
