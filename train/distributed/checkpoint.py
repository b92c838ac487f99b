"""Checkpoints of a run: written beside their place, complete or absent, resumed exactly on any ranks."""

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

if TYPE_CHECKING:  # DeepSpeed asks the environment for its device when it is imported
    from train.distributed.engine import TrainedState

# Written last: a folder without it is not a checkpoint.
PROGRESS = "progress.json"
STATE = "state.safetensors"
# The one before the newest stays, in case the disk damages the newest.
KEPT = 2


class Checkpoints:
    """The checkpoints of one run, in a folder that all ranks share.

    A checkpoint holds whole tensors, written by rank 0: with a small adapter that costs little, and it fits any ZeRO
    stage and any number of ranks. The frozen backbone is not in it.
    """

    def __init__(self, folder: Path, ranks: Ranks, source: Path | None = None) -> None:
        """`folder` is the run's own: it is named by the hash of all that the run depends on. `source`: the run, or one
        checkpoint of it, that is gone on from where the own folder has none."""
        self.folder, self.ranks, self.source = folder, ranks, source

    def restore(self, trained: TrainedState) -> tuple[int, dict[str, Any] | None]:
        """Load the newest sound checkpoint; return its step and what `save` was given, (0, None) without one.

        Collective: all ranks call it.

        Raises:
            UserError: a named source has no sound checkpoint.
        """
        newest = self.ranks.first("checkpoint", lambda: str(self.newest() or ""))
        if not newest:
            return 0, None
        progress = json.loads((Path(newest) / PROGRESS).read_text(encoding="utf-8"))
        with safe_open(Path(newest) / STATE, framework="pt") as tensors:
            trained.write({name: tensors.get_tensor(name) for name in tensors.keys()}, progress["counts"])  # noqa: SIM118
        return progress["step"], progress["state"]

    def save(self, trained: TrainedState, step: int, state: dict[str, Any]) -> None:
        """Save all that is trained after `step` steps, and `state` (JSON-like; rank 0's counts). Collective."""
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
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk has room again for what is sound
                raise
            temporary.rename(final)
            sync(self.folder)
            for old in complete(self.folder)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()

    def newest(self) -> Path | None:
        """The newest checkpoint whose bytes are those that were written; tells of damaged ones that are passed over."""
        for folder in (self.folder, self.source):
            for checkpoint in reversed(complete(folder) if folder else []):
                if sound(checkpoint):
                    return checkpoint
                print(f"train: checkpoint {checkpoint} is damaged and is passed over", flush=True)
        if self.source is not None:
            raise UserError(f"{self.source} holds no sound checkpoint; name another folder, or leave out --resume")
        return None


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; `folder` itself where it is one."""
    if (folder / PROGRESS).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"step-*/{PROGRESS}"))


def sound(checkpoint: Path) -> bool:
    """Are the bytes of its tensors those that were written?"""
    try:
        written = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError):
        return False
    return (checkpoint / STATE).is_file() and digest_files(checkpoint / STATE) == written
