"""Checkpoints of the DeepSpeed engine: written beside their place, complete or absent, resumed exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from train.arrays import sync
from train.ranks import Ranks

# Written last: a folder without it is not a checkpoint.
PROGRESS = "progress.json"
TAG = "state"
# The one before the newest stays, in case the disk damages the newest.
KEPT = 2


class Checkpoints:
    """The checkpoints of one run, in a folder that all ranks share."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """`folder` is the run's own: it is named by the hash of all that the run depends on."""
        self.folder, self.ranks = folder, ranks

    def restore(self, engine: Any) -> tuple[int, dict[str, Any] | None]:
        """Load the newest checkpoint into `engine`; return its step and what `save` was given, (0, None) without one.

        Collective: all ranks call it.
        """
        newest = self.ranks.first("checkpoint", lambda: str(max(self.complete(), default="")))
        if not newest:
            return 0, None
        engine.load_checkpoint(newest, tag=TAG, load_lr_scheduler_states=False)
        progress = json.loads((Path(newest) / PROGRESS).read_text(encoding="utf-8"))
        return progress["step"], progress["state"]

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Save the engine after `step` steps, and `state` (JSON-like; rank 0's counts). Collective."""
        final = self.folder / f"step-{step:09d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self.ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        self.ranks.barrier()
        engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False)
        if self.ranks.rank == 0:
            progress = json.dumps({"step": step, "state": state})
            (temporary / PROGRESS).write_text(progress, encoding="utf-8")
            sync(temporary)
            temporary.rename(final)
            sync(self.folder)
            for old in sorted(self.complete())[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()

    def complete(self) -> list[Path]:
        """All complete checkpoints."""
        return [file.parent for file in self.folder.glob(f"step-*/{PROGRESS}")]
