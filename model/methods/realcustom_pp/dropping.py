"""What stands for a dropped reference in RealCustom++: a black image, and not a branch left out."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.objective import TrainingBatch


def with_black(batch: TrainingBatch) -> TrainingBatch:
    """`batch` with the features of a black image in place of each dropped reference, none of which is then dropped: the
    visual branch stays on. Without `TrainingBatch.black`, the batch itself."""
    if batch.black is None:
        return batch
    dropped = batch.drop_image[:, None, None, None]
    reference = torch.where(dropped, batch.black.to(batch.reference), batch.reference)
    return replace(batch, reference=reference, drop_image=torch.zeros_like(batch.drop_image), black=None)
