"""The only reader of `params.yaml`: strict, with overlay files and single values from the command line on top."""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from runtime.closure import ROOT
from runtime.errors import UserError, one_line
from runtime.files import write_text

PARAMS_FILE = Path("params.yaml")
FREE_MAPPINGS = (
    "train.mixture",
    "rivals",
    "generate.adapters",
    "generate.names",
    "generate.protocol.references",
    "score.encoders",
)
"""Mappings with user-defined keys. An overlay replaces them: if they were merged, no entry could be removed."""


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Section(pydantic.BaseModel):
    """A section of `params.yaml`. Fields have no defaults: the file is the only source of values. Numbers are finite,
    and true or false is none."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_flag(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError(f"it is {str(value).lower()}, not a number")
        return value


T = TypeVar("T")


def _ascends(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise ValueError(f"{list(band)} must be [lower, upper]")
    return band


Band = Annotated[tuple[float, float], AfterValidator(_ascends)]
"""Lower and upper limit."""


class RunParams(Section):
    """How the work is done; this never changes results, so no DVC stage depends on it."""

    workers: int = Field(ge=1)  # Ray actors per data stage
    threads: int = Field(ge=1)  # CPU threads per actor
    decoders: int = Field(ge=0)  # additional threads per actor that read and decode photos while its model computes
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda if available
    gpus_per_worker: float = Field(ge=0)  # share of a GPU each actor reserves; only used on cuda
    restarts: int = Field(ge=0)  # how often a dead actor is restarted before the run gives up
    work: str = Field(min_length=1)  # folder of finished shards and checkpoints; outside DVC's outs, safe to delete
    purpose: Literal["research", "commercial"]  # of the results; only warnings about licences depend on it

    @field_validator("work")
    @classmethod
    def work_is_below_home(cls, work: str) -> str:
        """Expand `~` in a local path; a URL stays as it is."""
        return work if "://" in work else str(Path(work).expanduser())

    def torch_device(self) -> str:
        """`cpu` or `cuda`; `auto` is resolved on the calling machine."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


class BackbonesParams(Section):
    """The frozen models that the stages use."""

    variant: str  # a JSON in model/backbones (toybox, sd15, sdxl), or the path to one


class Params:
    """A command's parameters: params.yaml with its overlays, and the folder of the tables."""

    def __init__(self, tree: dict[str, Any], data: Path, words: Sequence[str] = ()) -> None:
        """`words`: the shared options that produced `tree` and `data`."""
        self._tree, self.data, self._words = tree, data, tuple(words)

    @classmethod
    def read(cls, files: Sequence[str] = (), settings: Sequence[str] = (), data: str = "data") -> Params:
        """Read params.yaml in the working directory.

        Args:
            files: YAML files merged over it, in order.
            settings: single values, `a.b=value`, applied after them.
            data: folder of the stages' tables.

        Raises:
            UserError: a file or key is missing or unknown, or a file or value is not YAML.
        """
        tree = read_yaml(PARAMS_FILE)
        for file in files:
            overlay(tree, read_yaml(Path(file).expanduser()), file)
        for setting in settings:
            overlay(tree, _setting(setting), "--set")
        words = ["--data", data]
        words += [word for file in files for word in ("--params", file)]
        words += [word for setting in settings for word in ("--set", setting)]
        return cls(tree, Path(data).expanduser(), words)

    def section(self, name: str, model: type[T]) -> T:
        """Return a section as `model` (any type pydantic can validate).

        Raises:
            UserError: the section is missing, or a key is unknown, missing or of the wrong type.
        """
        if name not in self._tree:
            raise UserError(f"{PARAMS_FILE} has no section '{name}'; add it (see the repository's own params.yaml)")
        return parse(name, self._tree[name], model)

    @property
    def run(self) -> RunParams:
        """Section `run`."""
        return self.section("run", RunParams)

    @property
    def variant(self) -> str:
        """Name of the variant of section `backbones`."""
        return self.section("backbones", BackbonesParams).variant

    def tree(self) -> dict[str, Any]:
        """Return all values as plain data, which identify a run."""
        return copy.deepcopy(self._tree)

    def words(self) -> list[str]:
        """Return the options that make another command read the same parameters."""
        return list(self._words)


def parse(section: str, value: Any, model: type[T]) -> T:
    """Validate `value` as `model`; errors name the key as written in params.yaml."""
    try:
        return pydantic.TypeAdapter(model).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([section, *map(str, first["loc"])])
        what = {
            "extra_forbidden": f"unknown key '{key}'; remove it or correct its spelling",
            "missing": f"key '{key}' is missing; add it",
            "value_error": f"{key}: {first.get('ctx', {}).get('error')}; correct it",
        }.get(first["type"], f"'{key}' is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}; correct it")
        raise UserError(f"{PARAMS_FILE}: {what}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the sections of a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if file != PARAMS_FILE:
            raise UserError(f"{file} does not exist; correct its path") from None
        here = f"{file} does not exist in {Path.cwd()}"
        raise UserError(f"{here}; run in the repository's folder {ROOT}, or copy its params.yaml here") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); pass a readable YAML file") from None
    except DuplicateKeyError as error:
        place = f"{file}, line {error.problem_mark.line + 1}"
        raise UserError(f"{place}: {(error.problem or '').split(' with value')[0]}; remove one of the two") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} has no sections; expected a mapping such as the repository's params.yaml")
    return tree


def parse_yaml(text: str) -> Any:
    """Return what YAML 1.2 text says. DVC reads params.yaml by the same rules: `1e-3` is a number, a key is given once.

    Raises:
        ruamel.yaml.error.YAMLError: it is not YAML, or a key is given twice.
    """
    return YAML(typ="safe", pure=True).load(text)


def overlay(tree: dict[str, Any], patch: dict[str, Any], origin: str, prefix: str = "") -> None:
    """Merge `patch` into `tree`, the values below `prefix`, in place.

    Mappings are merged; everything else, and FREE_MAPPINGS, is replaced. `origin` names the patch in errors.

    Raises:
        UserError: a key is not in `tree`.
    """
    for key, value in patch.items():
        name = f"{prefix}{key}"
        if key not in tree:
            raise UserError(f"{origin}: unknown key '{name}' is not in {PARAMS_FILE}; correct its spelling")
        if isinstance(value, dict) and isinstance(tree[key], dict) and name not in FREE_MAPPINGS:
            overlay(tree[key], value, origin, f"{name}.")
        else:
            tree[key] = value


def _setting(setting: str) -> dict[str, Any]:
    """Return `a.b=value` as nested mappings."""
    key, equals, value = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting}: write KEY=VALUE, as in train.steps=100")
    try:
        patch: Any = parse_yaml(value)
    except YAMLError as error:
        raise UserError(f"--set {setting}: the value is not YAML ({one_line(error)[:120]})") from None
    for part in reversed(key.split(".")):
        patch = {part: patch}
    found: dict[str, Any] = patch
    return found


def lay_over(files: Sequence[str]) -> None:
    """Merge YAML files into params.yaml permanently, in place, keeping its comments.

    Raises:
        UserError: as `Params.read`.
    """
    read_yaml(PARAMS_FILE)
    with_comments = YAML()
    with_comments.preserve_quotes = True
    with_comments.width = 4096
    with_comments.indent(mapping=2, sequence=4, offset=2)
    tree = with_comments.load(PARAMS_FILE)
    for file in files:
        overlay(tree, read_yaml(Path(file).expanduser()), file)
    stream = io.StringIO()
    with_comments.dump(tree, stream)
    write_text(PARAMS_FILE.resolve(), stream.getvalue())  # a link stays one


def section_text(name: str) -> str:
    """Return a section of params.yaml as written, comments included; empty if there is none."""
    lines = PARAMS_FILE.read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line[:1].isalpha()]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start].split(":")[0] == name:
            found = lines[start:end]
            while found and (not found[-1].strip() or found[-1].startswith("#")):
                found.pop()  # comments of the next section
            return "\n".join(found)
    return ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `customcontrast params`."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="YAML with some of the keys of params.yaml, merged in order"
    )


def main(options: argparse.Namespace) -> None:
    """Merge files such as configs/sd15.yaml into params.yaml permanently."""
    lay_over(options.files)
    names = ", ".join(options.files)
    print(f"{PARAMS_FILE}: merged {names}; git diff {PARAMS_FILE} shows the changes")
