"""What a run goes on from: its own checkpoints, or those in a folder that is named, where the recipes agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runtime.digest import digest
from runtime.errors import UserError
from runtime.files import write_json

RECIPE = "recipe.json"
RANKS = "ranks"


@dataclass(frozen=True)
class ResumeOptions:
    """Options of the training command beside those of every stage.

    Raises:
        UserError: `other_ranks` without a folder.
    """

    folder: Path | None
    """The run whose newest checkpoint is resumed; None: this run's own."""
    other_ranks: bool
    """Accept a checkpoint of another number or kind of ranks."""

    def __post_init__(self) -> None:
        if self.other_ranks and self.folder is None:
            raise UserError("--other-ranks is about a checkpoint; name its folder with --resume")

    @classmethod
    def of(cls, resume: str | None, other_ranks: bool) -> Self:
        """From the options of a command line."""
        return cls(None if resume is None else Path(resume).expanduser(), other_ranks)

    def words(self) -> list[str]:
        """The options again, to hand to a command started from here."""
        folder = [] if self.folder is None else ["--resume", str(self.folder)]
        return [*folder, *(["--other-ranks"] if self.other_ranks else [])]


def run_folder(work: Path, recipe: dict[str, Any]) -> Path:
    """The folder in `work` of the run with this recipe, which is written there."""
    folder = work / digest(recipe)
    write_json(folder / RECIPE, recipe)
    return folder


def accept(folder: Path, recipe: dict[str, Any], options: ResumeOptions) -> str:
    """Hold the recipe in `folder` against `recipe` and return what to tell, "" for nothing.

    Raises:
        UserError: there is none, or it differs, but for ranks where that is asked for; names each key, both values.
    """
    found = differences(read(folder), recipe)
    if options.other_ranks:
        theirs, ours = found.pop(RANKS, (None, None))
        if theirs is not None and not found:
            return (
                f"train: the checkpoint was made by ranks {shown(theirs)} and is gone on from by {shown(ours)};"
                " sums are rounded in another order, so the numbers are not those of one run bit for bit"
            )
    if found:
        told = "; ".join(
            f"{key} is {shown(theirs)} there and {shown(ours)} here" for key, (theirs, ours) in found.items()
        )
        only_ranks = " (or give --other-ranks)" if set(found) == {RANKS} else ""
        raise UserError(f"{folder} is of another run: {told}; make them equal{only_ranks}, or leave out --resume")
    return ""


def unfinished(work: Path, folder: Path, recipe: dict[str, Any]) -> str:
    """One line about the newest other run in `work` that has checkpoints but did not end, "" where there is none."""
    others = [file.parent for file in work.glob(f"*/{RECIPE}") if file.parent != folder]
    begun = [run for run in others if any(run.glob("step-*")) and not last_step(run)]
    if not begun:
        return ""
    newest = max(begun, key=lambda run: max(step.stat().st_mtime for step in run.glob("step-*")))
    keys = ", ".join(differences(read(newest), recipe))
    return f"train: begins anew; the unfinished run {newest} differs in {keys}"


def last_step(run: Path) -> bool:
    """Has the run a checkpoint of its last step?"""
    return (run / f"step-{read(run)['train']['steps']:09d}").exists()


def read(folder: Path) -> dict[str, Any]:
    """The recipe in `folder`, or of the run whose checkpoint it is."""
    for file in (folder / RECIPE, folder.parent / RECIPE):
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            continue
        except ValueError:
            raise UserError(f"{file} is no recipe; name another folder, or remove this one") from None
    raise UserError(f"{folder} holds no {RECIPE}; name a folder of a run, as in run.work/train")


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (their value, our value) where two recipes differ; None stands for a key that is not there."""
    before, now = dict(flat(theirs)), dict(flat(ours))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: Any) -> str:
    """A value as params.yaml would have it."""
    return " ".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
