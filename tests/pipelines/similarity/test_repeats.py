"""Of two subjects that are one object, one goes."""

import numpy as np

from pipelines import tables
from pipelines.similarity.repeats import same_subjects
from pipelines.similarity.stage import drop_repeats
from pipelines.similarity.tiles import prototypes
from pipelines.similarity.worker import SimilarityParams
from tests.world.tables import embedding, frame, write


def test_of_subjects_that_look_the_same_the_first_stays():
    """c repeats b, which repeats a: b goes, and c, which is like no subject that stays, does not."""
    ids = ["a", "b", "c", "d"]
    pairs, cosines = np.array([[1, 2], [0, 1]]), np.array([0.98, 0.99])
    assert same_subjects(ids, pairs, cosines, set()) == {"b": ("a", 0.99)}
    assert same_subjects(ids, pairs, cosines, {"c"}) == {"b": ("c", 0.98)}
    assert same_subjects(ids, pairs[:0], cosines[:0], set()) == {}


def test_subject_that_repeats_another_is_rejected_photo_by_photo(section, tmp_path):
    """b repeats a, d repeats c, which is of the test set though its id is later; nobody repeats e."""
    angles = {"s/a": 0.0, "s/b": 0.02, "s/d": 1.0, "t/c": 1.02, "t/e": 2.0}
    photos = {f"{subject}/{n}": angle for subject, angle in angles.items() for n in range(2)}
    vectors = {i: np.array([np.cos(angle), np.sin(angle)], np.float16) for i, angle in photos.items()}
    write(tmp_path, "embeddings", (embedding(i, vector) for i, vector in vectors.items()))
    write(tmp_path, "rejects", [tables.reject("s/z/0", "similarity", "crashed")])
    write(tmp_path / "curate", "frames", (frame(i, split="test" if i[0] == "t" else "train") for i in photos))
    drop_repeats(tmp_path, tmp_path / "curate", section("similarity", SimilarityParams, same_subject=0.999))
    assert prototypes(tmp_path)[0] == ["s/a", "t/c", "t/e"]
    rejects = {row["id"]: (row["stage"], row["reason"], row["detail"]) for row in tables.rows(tmp_path, "rejects")}
    assert rejects.pop("s/z/0") == ("similarity", "crashed", "")
    assert {i: detail for i, (_, reason, detail) in rejects.items() if reason == "same_subject"} == {
        "s/b/0": "s/a 0.9998",
        "s/b/1": "s/a 0.9998",
        "s/d/0": "t/c 0.9998",
        "s/d/1": "t/c 0.9998",
    }
