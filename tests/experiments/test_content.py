"""What can be read of a subject from the parts of an adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import content
from model.adapter import Adapter
from runtime.errors import UserError

WEIGHTS = Path("weights/toybox")


def test_a_classifier_reads_what_is_linear_in_unseen_rows_and_leaves_out_what_is_not_shown():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(300, 5)).astype(np.float32)
    labels: list[str | None] = ["up" if row[2] > 0 else "down" for row in columns]
    assert content.accuracy(columns, labels) > 0.9
    assert content.accuracy(columns[:, :2], labels) < 0.7, "nothing of it is in the others"
    hidden = [None if place % 2 else label for place, label in enumerate(labels)]
    assert content.accuracy(columns, hidden) > 0.9
    noise = ["up" if place % 2 else "down" for place in range(300)]
    assert content.accuracy(columns, noise) < 0.65, "rows that it was fitted to do not count"


def test_parts_of_an_adapter_are_those_between_image_encoder_and_unet():
    adapter = Adapter.load(WEIGHTS / "adapter").eval()
    config = adapter.config
    items = content.toys(9)
    assert items[:4] == content.toys(4)
    features = torch.randn(9, len(config.feature_layers), 65, config.feature_width)
    found = dict(content.parts(adapter, features, chunk=4))
    with torch.no_grad():
        whole = adapter.mfi(features, torch.full((9,), content.STEP))
    assert list(found) == [
        *(f"image encoder, block {layer}" for layer in config.feature_layers),
        "image encoder, all", "V", "V~, as the UNet reads it", "S+",
    ]  # fmt: skip
    np.testing.assert_allclose(found["V"], whole.v_tokens.flatten(1), atol=1e-5)
    np.testing.assert_allclose(found["S+"], whole.s_plus[0].flatten(1), atol=1e-5)
    assert found["image encoder, all"].shape == (9, 2 * len(config.feature_layers) * config.feature_width)
    rows = content.table(adapter, features, items)
    assert [len(row) for row in rows] == [1 + len(content.ATTRIBUTES)] * len(found)


def test_adapter_of_another_method_is_refused():
    with pytest.raises(UserError, match="is of realcustom, but V is of mfi and ip_adapter_plus"):
        content.main([str(WEIGHTS / "realcustom"), "--subjects", "3"])
