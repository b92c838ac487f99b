"""View invariance of S+: AUC over pairs of photos, silhouettes, a two-dimensional map.

Vectors are unit vectors; likeness is the cosine. This puts numbers on the paper's Fig. 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score, silhouette_score


def unit_tokens(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """S+ tokens of each text encoder, [P, L, n_t, d_i] -> one unit vector per photo and level, [P, L, sum of n_t d_i].

    Each token is normalised first: in use it takes the norm of its class noun's embedding anyway.
    """
    flat = []
    for values in tokens:
        values = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
        flat.append(values.reshape(*values.shape[:2], -1) / np.sqrt(values.shape[2] * len(tokens)))
    return np.concatenate(flat, axis=-1)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """[P, L, d] -> [P, P]: the similarity of two photos' S+, as the mean cosine over levels."""
    return np.einsum("pld,qld->pq", vectors, vectors) / vectors.shape[1]


def pair_auc(likeness: np.ndarray, subjects: Sequence[str], classes: Sequence[str] | None = None) -> float | None:
    """Return how often two photos of one subject are more alike than two of different subjects: 1 always, 0.5 chance.

    Args:
        likeness: [P, P], symmetric.
        subjects: one per photo.
        classes: one per photo. With them, only pairs within a class of several subjects count.

    Returns None if there are no pairs of one of the two kinds.
    """
    first, second = np.triu_indices(len(subjects), k=1)
    names = np.asarray(subjects)
    same = names[first] == names[second]
    counted = np.ones(len(first), dtype=bool)
    if classes is not None:
        kinds = np.asarray(classes)
        mixed = {kind for kind in set(classes) if len(set(names[kinds == kind])) > 1}
        counted = (kinds[first] == kinds[second]) & np.isin(kinds[first], sorted(mixed))
    if not same[counted].any() or same[counted].all():
        return None
    return float(roc_auc_score(same[counted], likeness[first, second][counted]))


def mean_cosine(likeness: np.ndarray, subjects: Sequence[str], same: bool) -> float | None:
    """Return the mean likeness of pairs of one subject, or of different subjects; None if there are none."""
    first, second = np.triu_indices(len(subjects), k=1)
    names = np.asarray(subjects)
    counted = (names[first] == names[second]) == same
    return float(likeness[first, second][counted].mean()) if counted.any() else None


def silhouette(vectors: np.ndarray, labels: Sequence[str]) -> float | None:
    """Return the mean silhouette (Rousseeuw 1987) of [P, d] by cosine distance, -1..1; 1: tight groups far apart.

    Returns None for fewer than two labels, or if no label repeats.
    """
    if not 2 <= len(set(labels)) < len(labels):
        return None
    distances = np.maximum(1 - vectors @ vectors.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    return float(silhouette_score(distances, np.asarray(labels), metric="precomputed"))


def flat_map(vectors: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Return t-SNE (van der Maaten & Hinton 2008) of [P, d] by cosine distance, [P, 2], each axis within -1..1.

    Exact and initialised from the principal components, so it is the same on every run. A perplexity too large for P
    photos is lowered to (P - 1) / 3; fewer than four photos give zeros.
    """
    count = len(vectors)
    if count < 4:
        return np.zeros((count, 2))
    model = TSNE(
        perplexity=min(perplexity, (count - 1) / 3), metric="cosine", init="pca", method="exact", random_state=seed
    )
    places = model.fit_transform(vectors.astype(np.float64))
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return places / max(float(np.abs(places).max()), 1e-12)
