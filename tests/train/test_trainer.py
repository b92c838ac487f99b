"""A new adapter of DreamIdentity: the recogniser's weights, the names' statistics, and the memory of a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion, load_diffusion
from model.backbones.features.face import load_recogniser
from model.backbones.variant import Variant, load_variant
from runtime.errors import ModelError, UserError
from runtime.params import Params, overlay
from tests.world.faces import COLUMNS, face_spec, write_recogniser
from tests.world.faces import SIDE as FACE_SIDE
from tests.world.training import CHANNELS, SIDE
from train.distributed.memory import estimate
from train.recipe import ModelParams, TrainParams
from train.trainer import make_adapter


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory, variant: Path) -> Variant:
    folder = write_recogniser(tmp_path_factory.mktemp("vit"))
    return load_variant(str(variant)).model_copy(update={"face": face_spec(folder)})


@pytest.fixture(scope="module")
def diffusion(faces: Variant) -> Diffusion:
    return load_diffusion(faces.diffusion, torch.float32, "cpu")


def model(**changes: Any) -> ModelParams:
    """Section model as rivals sets it, with `changes`."""
    tree = Params.read().tree()
    overlay(tree, {"model": tree["rivals"]["dreamidentity"]["model"]}, "rivals")
    overlay(tree, {"model": changes}, "changes")
    return ModelParams.model_validate(tree["model"])


def made(faces: Variant, diffusion: Diffusion, **changes: Any) -> Adapter:
    params = model(**changes)
    hidden = (3, FACE_SIDE, FACE_SIDE) if params.face.train == "all" else (1, 1, COLUMNS)
    tables: Any = SimpleNamespace(latent_shape=(CHANNELS, SIDE, SIDE), hidden_shape=hidden)
    return make_adapter(params, faces, diffusion, tables, seed=0)


def test_recogniser_that_is_trained_starts_from_the_variant_s_weights(faces: Variant, diffusion: Diffusion):
    assert faces.face is not None
    trained, frozen = (made(faces, diffusion, face={"train": train}) for train in ("all", "projector"))
    wanted, found = load_recogniser(faces.face).state_dict(), trained.mfi.face.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert frozen.mfi.face is None and trained.config.text_tokens == 2
    assert trained.config.feature_layers == (0, 1, 2) and frozen.config.feature_width == COLUMNS
    assert trained.config.image_encoder != frozen.config.image_encoder


def test_names_of_the_file_are_measured_and_only_their_statistics_kept(
    faces: Variant, diffusion: Diffusion, tmp_path: Path
):
    file = tmp_path / "names.txt"
    file.write_text("ab\n\n cd \nae\n")  # the tokenizer has single letters
    adapter = made(faces, diffusion, words={"norm": "names", "names": str(file)})
    (statistics,) = adapter.mfi.names
    tokenizer, text = diffusion.tokenizers[0], diffusion.text_encoders[0]
    rows = [tokenizer(name, add_special_tokens=False).input_ids for name in ("ab", "cd", "ae")]
    vectors = text.get_input_embeddings()(torch.tensor(rows))
    torch.testing.assert_close(statistics.mean, vectors.mean(dim=0))
    torch.testing.assert_close(statistics.std, vectors.std(dim=0))
    adapter.save(tmp_path / "adapter")
    assert "names.txt" not in (tmp_path / "adapter" / "adapter.json").read_text()
    file.write_text("ab\nabc\n")
    with pytest.raises(ModelError, match="'abc' has 3 tokens, but a person has 2 words"):
        made(faces, diffusion, words={"norm": "names", "names": str(file)})
    with pytest.raises(UserError, match="nowhere cannot be read"):
        made(faces, diffusion, words={"norm": "names", "names": "nowhere"})


@pytest.mark.parametrize("words", [{"norm": "names"}, {"names": "file"}])
def test_names_go_with_their_norm(words: dict[str, str]):
    with pytest.raises(pydantic.ValidationError, match="give a file of names with norm names only"):
        model(words=words)


@pytest.mark.parametrize("train", ["all", "projector"])
def test_step_is_weighed_with_the_recogniser_that_is_trained(
    faces: Variant, diffusion: Diffusion, params: TrainParams, tmp_path: Path, train: str
):
    off = params.objective.model_copy(update={"cscl": False, "macl": False, "location_weight": 0.0})
    found = estimate(
        params.model_copy(update={"objective": off}), model(face={"train": train}), faces, 2, tmp_path / train
    )
    trained = sum(p.numel() for p in made(faces, diffusion, face={"train": train}).parameters())
    assert found.trained == 4 * trained and found.activations > 0
