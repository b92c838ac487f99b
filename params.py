"""The one reader of `params.yaml`: strict, and the home of what every command line shares.

`python -m params FILE` lays a file such as `configs/sd15.yaml` over params.yaml for good, comments kept.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import Field

PARAMS_FILE = Path("params.yaml")
# Mappings whose keys are the user's to choose: laid over, they replace, for else no entry could be taken out again.
FREE_MAPPINGS = ("train.mixture", "generate.protocol.references", "score.encoders")


class UserError(Exception):
    """What the user can mend: one sentence that says what was found, where, and what to do."""


class Section(pydantic.BaseModel):
    """A section of `params.yaml`. Fields carry no defaults: the file is the only place of values."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


T = TypeVar("T")


class RunParams(Section):
    """How the work is done, never what comes out of it: no DVC stage depends on this section."""

    workers: int = Field(ge=1)  # Ray actors of a data stage
    threads: int = Field(ge=1)  # CPU threads of one actor
    decoders: int = Field(ge=0)  # further threads of an actor that read and decode photos while its model computes
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is one
    gpus_per_worker: float = Field(ge=0)  # share of a GPU one actor reserves; counts only on cuda
    restarts: int = Field(ge=0)  # how often a dead actor is started again before the run ends
    work: str  # folder of finished shards and checkpoints; outside DVC's outs, safe to delete

    def torch_device(self) -> str:
        """`cpu` or `cuda`, `auto` resolved on the machine that asks."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


class BackbonesParams(Section):
    """Which frozen models the stages use."""

    variant: str  # a JSON in model/backbones (toybox, sd15, sdxl), or the path of one


def load(section: str, model: type[T]) -> T:
    """Return one section of the params as `model` (any type pydantic can validate).

    Overlays (`--params FILE`) and single values (`--set a.b=value`) of the command line are applied first.

    Raises:
        UserError: the file or section is missing, or a key is unknown, missing or of the wrong type.
    """
    tree = _tree(tuple(sys.argv[1:]))
    if section not in tree:
        raise UserError(f"{PARAMS_FILE} has no section '{section}'; add it (see the repository's own params.yaml)")
    return parse(section, tree[section], model)


def parse(section: str, value: Any, model: type[T]) -> T:
    """Validate `value` as `model`; errors name the key as it is written in params.yaml."""
    try:
        return pydantic.TypeAdapter(model).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([section, *map(str, first["loc"])])
        what = {
            "extra_forbidden": f"unknown key '{key}'; remove it or correct its spelling",
            "missing": f"key '{key}' is missing; add it",
            "value_error": f"{key}: {first.get('ctx', {}).get('error')}; correct it",
        }.get(first["type"], f"'{key}' is {first['input']!r}: {first['msg'].lower()}; correct it")
        raise UserError(f"{PARAMS_FILE}: {what}") from None


def resolved() -> dict[str, Any]:
    """Return all params as plain data, overlays applied: what a run is identified by."""
    return copy.deepcopy(_tree(tuple(sys.argv[1:])))


def data_dir() -> Path:
    """Return the folder of the stages' tables: `data`, or `--data DIR` of the command line."""
    return Path(_options(tuple(sys.argv[1:])).data)


def passed_on() -> list[str]:
    """Return the shared options of this command line, to hand to a command started from here."""
    options = _options(tuple(sys.argv[1:]))
    words = ["--data", options.data]
    for file in options.params:
        words += ["--params", file]
    for value in options.set:
        words += ["--set", value]
    return words


def option_parser(add_help: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the options every stage shares; a command with its own options takes it as a parent."""
    parser = argparse.ArgumentParser(add_help=add_help, allow_abbrev=False)
    parser.add_argument("--params", action="append", default=[], metavar="FILE", help="YAML laid over params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one value, e.g. train.steps=9")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the tables (default: data)")
    return parser


def cli(main: Callable[[], None]) -> None:
    """Run a stage's `main`; what the user can mend is printed as one sentence, with exit code 1."""
    from model.errors import ModelError

    try:
        main()
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _options(words: tuple[str, ...]) -> argparse.Namespace:
    return option_parser().parse_known_args(words)[0]


@cache
def _tree(words: tuple[str, ...]) -> dict[str, Any]:
    options = _options(words)
    tree = _read(PARAMS_FILE)
    for file in options.params:
        _overlay(tree, _read(Path(file)), file)
    for setting in options.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write KEY=VALUE, as in train.steps=100")
        try:
            patch: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {setting}: the value is not YAML ({' '.join(str(error).split())[:120]})") from None
        for part in reversed(key.split(".")):
            patch = {part: patch}
        _overlay(tree, patch, "--set")
    return tree


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; run from the repository's root or name another file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); name a YAML file that can") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no sections; expected a mapping such as the repository's params.yaml")
    return tree


def _overlay(tree: dict[str, Any], patch: dict[str, Any], origin: str, prefix: str = "") -> None:
    """Lay `patch` over `tree`, which is what stands below `prefix`, in place: mappings merge, everything else and
    FREE_MAPPINGS replace."""
    for key, value in patch.items():
        name = f"{prefix}{key}"
        if key not in tree:
            raise UserError(f"{origin}: unknown key '{key}' is not in {PARAMS_FILE}; correct its spelling")
        if isinstance(value, dict) and isinstance(tree[key], dict) and name not in FREE_MAPPINGS:
            _overlay(tree[key], value, origin, f"{name}.")
        else:
            tree[key] = value


def main() -> None:
    """Lay the files of the command line over params.yaml, in place."""
    from ruamel.yaml import YAML  # keeps comments, which PyYAML drops

    if not sys.argv[1:]:
        raise UserError("name a file to lay over params.yaml, such as configs/sd15.yaml")
    _read(PARAMS_FILE)
    yaml_with_comments = YAML()
    yaml_with_comments.preserve_quotes = True
    yaml_with_comments.width = 4096
    yaml_with_comments.indent(mapping=2, sequence=4, offset=2)
    tree = yaml_with_comments.load(PARAMS_FILE)
    for file in sys.argv[1:]:
        _overlay(tree, _read(Path(file)), file)
    with PARAMS_FILE.open("w", encoding="utf-8") as stream:
        yaml_with_comments.dump(tree, stream)
    print(f"{PARAMS_FILE}: {', '.join(sys.argv[1:])} laid over it; git diff {PARAMS_FILE} shows the changes")


if __name__ == "__main__":
    cli(main)
