from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from model import sampler
from model.backbones.variant import load_variant
from model.demo import studio as demo
from model.demo.photos import open_photos
from model.demo.studio import Studio
from tests.world.models import FakeClip, make_adapter
from tests.world.subject import photo


@pytest.fixture
def place(tmp_path, tiny_sd, monkeypatch):
    """A studio around tiny models, and two photos of a mug that are cut out by transparency."""
    image, mask = photo()
    image.putalpha(Image.fromarray(mask))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    make_adapter(tiny_sd).save(tmp_path / "adapter", data_hash="d1")
    variant = load_variant("toybox")
    diffusion = variant.diffusion.model_copy(update={"path": tiny_sd.name})
    variant = variant.model_copy(update={"resolution": 16, "diffusion": diffusion})
    monkeypatch.setattr(sampler, "load_variant", lambda name: variant)
    monkeypatch.setattr(sampler, "load_diffusion", lambda spec, dtype, device: tiny_sd)
    clip = FakeClip()
    monkeypatch.setattr(sampler, "adapter_source", lambda *_: SimpleNamespace(load=lambda device: clip))
    loads = []
    load = demo.load_sampler
    monkeypatch.setattr(demo, "load_sampler", lambda *given: loads.append(given) or load(*given))
    studio = Studio({"customcontrast": tmp_path / "adapter"}, "tiny", "cpu", "float32")
    photos = open_photos([tmp_path / "a.png", tmp_path / "b.png"])
    return SimpleNamespace(folder=tmp_path, studio=studio, photos=photos, clip=clip, loads=loads)
