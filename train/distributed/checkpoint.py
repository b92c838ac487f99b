"""Checkpoints of a run: written under a temporary name, complete or absent, resumed exactly on any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from runtime.digest import digest_files
from runtime.errors import UserError
from train.batches.arrays import sync
from train.distributed.ranks import Ranks

if TYPE_CHECKING:  # DeepSpeed reads its device from the environment on import
    from train.distributed.engine import TrainedState

# Written last: a folder without it is not a checkpoint.
PROGRESS = "progress.json"
STATE = "state.safetensors"
# The second newest is kept in case the newest gets damaged on disk.
KEPT = 2


class Checkpoints:
    """Checkpoints of one run, in a folder that all ranks share.

    A checkpoint holds whole tensors, written by rank 0: cheap for a small adapter, and valid for any ZeRO stage and
    any number of ranks. The frozen backbone is not included.
    """

    def __init__(self, folder: Path, ranks: Ranks, source: Path | None = None) -> None:
        """`folder`: the run's own, named by the hash of everything the run depends on. `source`: a run, or one of its
        checkpoints, to resume from if `folder` has none."""
        self.folder, self.ranks, self.source = folder, ranks, source

    def restore(self, trained: TrainedState) -> tuple[int, dict[str, Any] | None]:
        """Load the newest intact checkpoint; return its step and the state given to `save`, or (0, None) if none.

        Collective: all ranks call it.

        Raises:
            UserError: a given `source` has no intact checkpoint.
        """
        newest = self.ranks.first("checkpoint", lambda: str(self.newest() or ""))
        if not newest:
            return 0, None
        progress = json.loads((Path(newest) / PROGRESS).read_text(encoding="utf-8"))
        with safe_open(Path(newest) / STATE, framework="pt") as tensors:
            trained.write({name: tensors.get_tensor(name) for name in tensors.keys()}, progress["counts"])  # noqa: SIM118
        return progress["step"], progress["state"]

    def save(self, trained: TrainedState, step: int, state: dict[str, Any]) -> None:
        """Save everything trained after `step` steps, and `state` (JSON-like; rank 0's is saved). Collective."""
        tensors = {}
        for name, tensor in trained.read():
            if self.ranks.rank == 0:
                tensors[name] = tensor.detach().cpu().clone()
        if self.ranks.rank == 0:
            final = self.folder / f"step-{step:09d}"
            temporary = self.folder / f".{final.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                save_file(tensors, temporary / STATE)
                progress = {"step": step, "state": state, "counts": trained.counts()}
                progress["digest"] = digest_files(temporary / STATE)
                (temporary / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
                sync(temporary)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # frees space on a full disk
                raise
            temporary.rename(final)
            sync(self.folder)
            for old in complete(self.folder)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()

    def newest(self) -> Path | None:
        """The newest checkpoint whose bytes are as written; reports the damaged ones it skips."""
        for folder in (self.folder, self.source):
            for checkpoint in reversed(complete(folder) if folder else []):
                if sound(checkpoint):
                    return checkpoint
                print(f"train: checkpoint {checkpoint} is damaged; skipping it", flush=True)
        if self.source is not None:
            raise UserError(f"{self.source} has no intact checkpoint; name another folder, or omit --resume")
        return None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first; `folder` itself if it is one."""
    if (folder / PROGRESS).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"step-*/{PROGRESS}"))


def sound(checkpoint: Path) -> bool:
    """Whether the bytes of its tensors are as written."""
    try:
        written = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError):
        return False
    return (checkpoint / STATE).is_file() and digest_files(checkpoint / STATE) == written
