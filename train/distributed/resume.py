"""Resuming: from a run's own checkpoints, or from those in a given folder if the recipes agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runtime.digest import digest
from runtime.errors import UserError
from runtime.files import write_json
from runtime.params import flat

RECIPE = "recipe.json"
RANKS, STEPS = "ranks", "train.steps"


@dataclass(frozen=True)
class ResumeOptions:
    """Options of the train command besides those of every stage.

    Raises:
        UserError: `other_ranks` without a folder.
    """

    folder: Path | None
    """The run whose newest checkpoint to resume; None: this run's own."""
    other_ranks: bool
    """Accept a checkpoint made by a different number or kind of ranks."""

    def __post_init__(self) -> None:
        if self.other_ranks and self.folder is None:
            raise UserError("--other-ranks applies to a resumed checkpoint; name its folder with --resume")

    @classmethod
    def of(cls, resume: str | None, other_ranks: bool) -> Self:
        """From command-line options."""
        return cls(None if resume is None else Path(resume).expanduser(), other_ranks)

    def words(self) -> list[str]:
        """The options as command-line words, to pass to a subprocess."""
        folder = [] if self.folder is None else ["--resume", str(self.folder)]
        return [*folder, *(["--other-ranks"] if self.other_ranks else [])]


def run_folder(work: Path, recipe: dict[str, Any]) -> Path:
    """The folder in `work` of the run with this recipe; writes the recipe there."""
    folder = work / digest(recipe)
    write_json(folder / RECIPE, recipe)
    return folder


def accept(folder: Path, recipe: dict[str, Any], options: ResumeOptions) -> str:
    """Compare the recipe in `folder` with `recipe`; return notices to print, or "".

    A constant learning rate does not depend on the number of steps, so such a run can be trained on for more of them,
    unless it has a curriculum, which does.

    Raises:
        UserError: there is none, or it differs (in more than that, and ranks with `other_ranks`); names each key, both
            values.
    """
    found, notices = differences(read(folder), recipe), []
    train = recipe["train"]
    fixed = train.get("schedule") == "constant" and train.get("curriculum", {}).get("schedule") != "linear"
    if STEPS in found and "train.schedule" not in found and fixed:
        theirs, ours = found.pop(STEPS)
        notices.append(f"train: going on to step {ours} from a run of {theirs}")
    if options.other_ranks and RANKS in found:
        theirs, ours = found.pop(RANKS)
        notices.append(
            f"train: the checkpoint was made by ranks {shown(theirs)} and is resumed on {shown(ours)};"
            " sums are rounded in a different order, so results are not bit-identical to an uninterrupted run"
        )
    if found:
        changes = "; ".join(
            f"{key} is {shown(theirs)} there and {shown(ours)} here" for key, (theirs, ours) in found.items()
        )
        only_ranks = " (or give --other-ranks)" if set(found) == {RANKS} else ""
        raise UserError(f"{folder} belongs to another run: {changes}; make them equal{only_ranks}, or omit --resume")
    return "\n".join(notices)


def unfinished(work: Path, folder: Path, recipe: dict[str, Any]) -> str:
    """One line about the newest other run in `work` that has checkpoints but did not finish, or ""."""
    others = [file.parent for file in work.glob(f"*/{RECIPE}") if file.parent != folder]
    started = [run for run in others if any(run.glob("step-*")) and not last_step(run)]
    if not started:
        return ""
    newest = max(started, key=lambda run: max(step.stat().st_mtime for step in run.glob("step-*")))
    keys = ", ".join(differences(read(newest), recipe))
    return f"train: starting a new run; the unfinished run {newest} differs in {keys}"


def last_step(run: Path) -> bool:
    """Whether the run has a checkpoint of its last step."""
    return (run / f"step-{read(run)['train']['steps']:09d}").exists()


def read(folder: Path) -> dict[str, Any]:
    """The recipe in `folder`, or in its parent if `folder` is a checkpoint."""
    for file in (folder / RECIPE, folder.parent / RECIPE):
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            continue
        except ValueError:
            raise UserError(f"{file} is not a recipe; name another folder, or remove this one") from None
    raise UserError(f"{folder} contains no {RECIPE}; name the folder of a run, such as those in run.work/train")


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (their value, our value) where two recipes differ; None stands for a missing key."""
    before, now = dict(flat(theirs)), dict(flat(ours))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def shown(value: Any) -> str:
    """A value as written in params.yaml."""
    return " ".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
