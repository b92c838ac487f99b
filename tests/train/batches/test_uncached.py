"""Training that reads photos and runs the frozen encoders itself, beside training from cached tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from model.adapter import Adapter
from model.backbones.diffusion import load_diffusion
from model.backbones.features.source import FeatureParams
from model.backbones.variant import load_variant
from model.methods.customcontrast.training import training_losses
from model.methods.realcustom_pp.training import with_black
from model.objective import ObjectiveConfig
from pipelines import tables
from pipelines.encode.worker import EncodeParams, EncodeWorker
from pipelines.photos.roots import SourceParams
from runtime.errors import UserError
from runtime.params import Params
from tests.world.batches import sampler
from tests.world.training import frame, triplet, write_similarity
from train.batches import arrays
from train.batches.arrays import Arrays
from train.batches.prefetch import Batches
from train.batches.sampler import Sampler
from train.batches.training_set import TrainingSet
from train.batches.uncached import AugmentParams, Photos
from train.curriculum import Curriculum, CurriculumParams
from train.recipe import DropParams
from train.trainer import black_reference

NAME = "toybox"
CLIP, TOWERS = FeatureParams(encoder="mfi"), FeatureParams(encoder="realcustom_pp")
SUBJECTS = 6
"""The first four have three photos each, the others one."""


def draw_photo(file: Path, number: int) -> np.ndarray:
    """Draw an ellipse on noise; return its mask."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((96, 72))
    box = (10 + number % 5, 8, 50 + 2 * (number % 7), 60)
    mask = Image.new("1", image.size)
    ImageDraw.Draw(mask).ellipse(box, fill=1)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    image.save(file)
    return np.asarray(mask)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two sources in `photos`, and all tables of the data stages in `data`."""
    root = tmp_path_factory.mktemp("uncached")
    (root / "photos").mkdir()
    data = root / "data"
    frames, triplets, masks, payload = [], [], [], []
    for subject in range(SUBJECTS):
        count, name = (3, f"own/a/{subject}") if subject < 4 else (1, f"own/b/{subject}")
        ids = [f"{name}/{n}" for n in range(count)]
        for place, frame_id in enumerate(ids):
            mask = draw_photo(root / "photos" / f"{subject}{place}.png", 10 * subject + place)
            row = frame(frame_id, name, "mug") | {"source": "own", "path": f"{subject}{place}.png"}
            frames.append(row)
            found = {"rle": tables.encode_mask(mask), "height": 72, "width": 96}
            masks.append(mask_row(frame_id, found))
            roles = {"target": True, "input": True, "single": count == 1}
            payload.append(row | {"extra": found | roles})
        triplets.append(triplet(name, 0, "mug", [ids[0], ids[-1], ids[count // 2]], "pose" if count > 1 else "augment"))
    for stage, table, rows in (
        ("curate", "frames", frames),
        ("pairs", "triplets", triplets),
        ("mask", "masks", masks),
    ):
        tables.write(data / stage, table, tables.from_rows(table, rows))
    write_similarity(data / "similarity", sorted({row["subject_id"] for row in frames}, key=tables.path_order))
    encode = Params.read().section("encode", EncodeParams)
    sources = [SourceParams(name="own", layout="folder", root=str(root / "photos"), split="train")]
    (encoded,) = EncodeWorker(encode, CLIP, NAME, sources, "cpu").compute([payload])
    for table in ("latents", "features"):
        tables.write(data / "encode", table, tables.from_rows(table, encoded[table]))
    return root


def mask_row(frame_id: str, found: dict[str, Any]) -> dict[str, Any]:
    row = dict.fromkeys(tables.spec("masks").columns, 1.0)
    words = {"frame_id": frame_id, "phrase": "mug", "method": "annotated", "quality": "ok"}
    return row | words | found | {"box": [0.0, 0.0, 1.0, 1.0]}


def samplers(world: Path, reader: FeatureParams = CLIP, **missing: bool) -> tuple[Sampler, Sampler]:
    """One that reads cached tables, which are of CLIP, and one that has those named in `missing` not."""
    data = world / "data"
    whole = Arrays.open(arrays.write(data, world / "arrays" / "all"))
    parts = {"hidden": whole.hidden, "latents": whole.latents, "masks": whole.masks}
    if missing.get("hidden"):
        parts["hidden"] = None
    if missing.get("latents"):
        parts["latents"] = parts["masks"] = None
    sources = [SourceParams(name="own", layout="folder", root=str(world / "photos"), split="train")]
    augment = Params.read().section("encode", AugmentParams)
    variant = load_variant(NAME)
    needed = {"hidden": False, "latents": False, **missing}
    photos = Photos.open(data, augment, variant, reader.source(variant), sources, "cpu", **needed)
    bare = TrainingSet.read(data, Arrays(**parts, cosines=whole.cosines), "triplet", photos)
    return sampler(TrainingSet.read(data, whole, "triplet"), batch=4), sampler(bare, batch=4)


@pytest.mark.parametrize("missing", [{"hidden": True}, {"latents": True}, {"hidden": True, "latents": True}])
def test_batches_are_those_of_cached_tables(world: Path, missing: dict[str, bool]):
    cached, bare = samplers(world, **missing)
    for step in range(3):
        wanted = cached.batch(step)
        for name, value in vars(bare.batch(step)).items():
            other = getattr(wanted, name)
            if name in ("reference", "positive", "latents"):
                assert value.dtype == other.dtype and value.shape == other.shape
                # Another batch size may round otherwise before the rounding to fp16.
                torch.testing.assert_close(value, other, rtol=2e-3, atol=2e-3)
            else:
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_losses_are_those_of_cached_tables_up_to_the_rounding_of_fp16(world: Path):
    cached, bare = samplers(world, hidden=True, latents=True)
    diffusion = load_diffusion(load_variant(NAME).diffusion, torch.float32, "cpu")
    layers, _, width = bare.data.hidden_shape
    torch.manual_seed(0)
    adapter = Adapter.for_unet(
        diffusion.unet, base_model="b", base_revision=None, image_encoder="e", feature_layers=tuple(range(layers)),
        feature_width=width, text_widths=[128], width=16, heads=2, depth=1, fourier_pairs=8,
    )  # fmt: skip
    adapter.install(diffusion.unet)
    with torch.no_grad(), Batches(bare, 0, 1, torch.device("cpu"), ahead=2, steps=2) as batches:
        for step in range(2):
            found, wanted = (
                training_losses(batch, adapter, adapter.config, diffusion, ObjectiveConfig())
                for batch in (batches.take(step), cached.batch(step))
            )
            for name in ("diffusion", "cscl", "macl", "location", "total"):
                assert float(found[name]) == pytest.approx(float(wanted[name]), rel=1e-3, abs=1e-5), name


def test_tables_without_a_row_are_not_cached(world: Path, tmp_path: Path):
    folder = tmp_path / "data"
    for stage in ("curate", "pairs", "similarity"):
        (folder / stage).parent.mkdir(exist_ok=True)
        (folder / stage).symlink_to(world / "data" / stage)
    for table in ("latents", "features"):
        tables.write(folder / "encode", table, tables.from_rows(table, []))
    found = Arrays.open(arrays.write(folder, tmp_path / "arrays" / "none"))
    assert found.hidden is None and found.latents is None and found.masks is None
    assert len(found.cosines) == 2 * SUBJECTS**2  # two groupings


def test_photo_that_is_gone_is_one_sentence(world: Path):
    _, bare = samplers(world, hidden=True)
    gone = next((world / "photos").iterdir())
    held = gone.read_bytes()
    gone.unlink()
    try:
        with pytest.raises(UserError, match=rf"{gone.name} can no longer be read .*; run curate again"):
            for step in range(8):
                bare.batch(step)
    finally:
        gone.write_bytes(held)


def course(world: Path, reader: FeatureParams, **changes: Any) -> Sampler:
    """A sampler without cached hidden states, under a curriculum's end."""
    _, bare = samplers(world, reader, hidden=True)
    params = CurriculumParams.model_validate(Params.read().tree()["train"]["curriculum"] | {"schedule": "constant"})
    return sampler(bare.data, batch=4, curriculum=Curriculum(params, 5, 10, 1), **changes)


def test_two_towers_read_squares_of_twice_their_side(world: Path):
    _, bare = samplers(world, TOWERS, hidden=True)
    pixels, batch = bare.read(0).reference, bare.batch(0)
    assert pixels.shape == (4, 3, 128, 128) and pixels.dtype == torch.uint8
    assert batch.reference.shape == batch.positive.shape == (4, 5, 64, 256) and batch.reference.dtype == torch.float16
    assert bare.data.hidden_shape == (5, 64, 256)
    views = bare.data.photos.encoder.hidden_states(
        [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels], range(5)
    )
    torch.testing.assert_close(batch.reference.float(), views, rtol=2e-3, atol=2e-3)


def test_references_are_as_large_as_the_curriculum_says(world: Path):
    draws = course(world, TOWERS)
    for step in range(3):
        draw, pixels = draws.draw(step), draws.read(step).reference
        for image, scale, alone in zip(pixels, draw.scales, draws.data.single[draw.triplets], strict=True):
            rows, columns = np.nonzero((image < 250).any(dim=0).numpy())
            side = max(np.ptp(rows), np.ptp(columns)) + 1
            assert side == pytest.approx(
                128 * scale, abs=12 if alone else 3
            )  # a rotated ellipse leaves its box's corners


def test_placed_references_are_the_same_on_any_ranks_and_each_time(world: Path):
    draws, again = course(world, CLIP), course(world, CLIP)
    whole = draws.read(3).reference
    assert torch.equal(torch.cat([again.read(3, rank, 2).reference for rank in range(2)]), whole)
    assert not torch.equal(draws.read(4).reference, whole)


def test_positives_that_nothing_compares_are_not_read(world: Path):
    _, bare = samplers(world, hidden=True)
    for data in (bare.data, samplers(world)[0].data):
        found, whole = (sampler(data, batch=4, positives=positives).batch(1) for positives in (False, True))
        torch.testing.assert_close(found.reference, whole.reference, rtol=2e-3, atol=2e-3)
        assert torch.equal(found.positive, found.reference) and not torch.equal(whole.positive, whole.reference)


def test_a_batch_holds_what_stands_for_a_dropped_image(world: Path):
    _, bare = samplers(world, TOWERS, hidden=True)
    source, photos = bare.data.photos.source, bare.data.photos
    black = black_reference(source, bare.data, torch.device("cpu"))
    assert black.shape == (1, *source.shape) and black.dtype == torch.float16
    assert torch.equal(black, black_reference(source, samplers(world)[0].data, torch.device("cpu")))
    everything = DropParams(image=0.5, text=0.0, both=0.0)
    batch = sampler(replace(bare.data, photos=photos), batch=4, drop=everything, black=black).batch(2)
    assert batch.drop_image.any() and not batch.drop_image.all() and torch.equal(batch.black, black)
    replaced = with_black(batch)
    for row, dropped in enumerate(batch.drop_image):
        assert torch.equal(replaced.reference[row], black[0] if dropped else batch.reference[row])
    assert not replaced.drop_image.any()
