"""Embeddings of segmented photos, and which encoder makes them."""

import numpy as np
import pytest
from PIL import Image

from pipelines import tables
from pipelines.photos.roots import SourceParams
from pipelines.similarity.worker import SimilarityParams, SimilarityWorker
from runtime.errors import UserError


def test_rows_of_the_embeddings_table_are_unit_vectors_of_the_chosen_encoder(section, tmp_path):
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:50, 20:40] = True
    frames = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        extra = {"rle": tables.encode_mask(mask), "height": 64, "width": 64}
        row = {"frame_id": f"s/{number % 2}/{number}", "subject_id": f"s/{number % 2}", "source": "own"}
        frames.append(row | {"path": f"{number}.png", "extra": extra})
    source = SourceParams(name="own", layout="folder", root=str(tmp_path), split="train")
    for encoder, decoders in (("clip", 0), ("dino", 2)):
        params = section("similarity", SimilarityParams, encoder=encoder, batch_size=2)
        worker = SimilarityWorker(params, "toybox", [source], "cpu", decoders)
        together = worker.compute([[frames[0], frames[2]], [frames[1]]])
        assert [len(rows["embeddings"]) for rows in together] == [2, 1]
        vectors = np.array([row["vector"] for rows in together for row in rows["embeddings"]], dtype=np.float32)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=2e-3)
        (alone,) = worker.compute([[frames[1]]])
        assert np.array_equal(alone["embeddings"][0]["vector"], together[1]["embeddings"][0]["vector"])


def test_encoder_needs_weights_that_a_variant_or_the_params_name(section):
    with pytest.raises(UserError, match=r"similarity\.weights: no variant names a SigLIP, so give \{path, revision\}"):
        section("similarity", SimilarityParams, encoder="siglip")
    with pytest.raises(UserError, match=r"similarity\.weights\.revision: 'main' is not a 40-hex commit"):
        weights = {"path": "google/siglip-base-patch16-224", "revision": "main"}
        section("similarity", SimilarityParams, encoder="siglip", weights=weights)
    with pytest.raises(UserError, match=r"similarity\.weights: .*needs `revision`"):
        section("similarity", SimilarityParams, encoder="dino", weights={"path": "facebook/dinov2-base"})
    assert section("similarity", SimilarityParams, encoder="dino").spec("sd15").path == "facebook/dinov2-base"
    own = {"path": "facebook/dinov2-large", "revision": "0" * 40}
    assert section("similarity", SimilarityParams, encoder="dino", weights=own).spec("sd15").path == own["path"]
