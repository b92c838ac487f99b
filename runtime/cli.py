"""The one command: `customcontrast <command>`, strict about every word, and what each command line shares."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import ModelError, UserError
from runtime.params import Params, section_text
from runtime.stages import Stage, stages

PROGRAM = "customcontrast"


@dataclass(frozen=True)
class Command:
    """A command that is no stage; `module` has `arguments(parser)` and `main(options)`."""

    module: str
    summary: str


COMMANDS = {
    "data": Command("pipelines.run", "run the data stages on photos of your own"),
    "sample": Command("model.sample", "generate images of a subject from its photos"),
    "export": Command("model.export", "write an adapter in the layout of IP-Adapter"),
    "show": Command("pipelines.tables.show", "print rows of a table"),
    "compare": Command("eval.report.compare", "compare the scores of several runs side by side"),
    "params": Command("runtime.overlays", "lay a file such as configs/sd15.yaml over params.yaml"),
    "submit": Command("pipelines.engine.submit", "run a data stage as a job of a Ray cluster"),
    "memory": Command("train.distributed.memory", "estimate what a training run takes of each device"),
    "bench data": Command("benchmarks.data.command", "measure the data stages"),
    "bench model": Command("benchmarks.model.command", "measure the network"),
    "bench train": Command("benchmarks.train.command", "measure training"),
    "bench eval": Command("benchmarks.eval.command", "measure scoring"),
}


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviation and names the nearest right word for a wrong one."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`; an option that there is not is a usage error with the nearest one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "argument"
            near = nearest(word, self._option_string_actions) if kind == "option" else ""
            self.error(f"unknown {kind} '{word}'{near}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print the usage and one sentence; exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def nearest(word: str, known: Sequence[str] | Any) -> str:
    """Return `, did you mean '...'?`, or nothing where no known word is like `word`."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""


def shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command which reads params.yaml shares."""
    group = parser.add_argument_group("parameters")
    group.add_argument("--params", action="append", default=[], metavar="FILE", help="YAML laid over params.yaml")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one value: train.steps=9")
    group.add_argument("--data", default="data", metavar="DIR", help="folder of the tables (default: %(default)s)")


def read_params(options: argparse.Namespace) -> Params:
    """Return what the shared options of a command line say."""
    return Params.read(options.params, options.set, options.data)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command that `words` say (default: those of this process) and exit with its code."""
    words = sys.argv[1:] if words is None else list(words)
    known = stages()
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(known))
        return
    name, *rest = words
    if name == "bench" and rest and not rest[0].startswith("-"):
        name, rest = f"bench {rest[0]}", rest[1:]
    if name in known:
        guarded(lambda: run_stage(known[name], rest))
    elif name in COMMANDS:
        guarded(lambda: run_command(name, rest))
    else:
        print(f"usage: {PROGRAM} COMMAND ...", file=sys.stderr)
        hint = nearest(name, [*known, *COMMANDS])
        print(f"error: unknown command '{name}'{hint}; {PROGRAM} --help lists all", file=sys.stderr)
        sys.exit(2)


def run(*words: str) -> None:
    """Run a command with the rest of this process's command line: for `python -m <package>`."""
    main([*words, *sys.argv[1:]])


def overview(known: dict[str, Stage]) -> str:
    """Return the help of the whole: every command in one line."""
    lines = [f"usage: {PROGRAM} COMMAND [OPTIONS]", "", "Stages, in the order of `dvc repro`:"]
    lines += [f"  {stage.name:11} {stage.summary}" for stage in known.values()]
    lines += ["", "Other commands:"]
    lines += [f"  {name:11} {command.summary}" for name, command in COMMANDS.items() if " " not in name]
    rooms = ", ".join(name.split()[1] for name in COMMANDS if " " in name)
    lines += [f"  {'bench ROOM':11} measure what the code costs beside the work itself: {rooms}"]
    lines += ["", f"{PROGRAM} COMMAND --help shows its options and, for a stage, its section of params.yaml."]
    return "\n".join(lines)


def stage_parser(stage: Stage) -> Parser:
    """Return the parser of a stage's command; its help shows the stage's section with the comments."""
    try:
        text = section_text(stage.name)
    except OSError:  # not in a repository's root: reading the params says so
        text = ""
    own = f"its section of params.yaml:\n\n{text}" if text else None
    parser = Parser(prog=f"{PROGRAM} {stage.name}", description=stage.summary, epilog=own)
    for flag, keywords in stage.options.items():
        parser.add_argument(flag, **dict(keywords))
    shared_options(parser)
    return parser


def run_stage(stage: Stage, words: Sequence[str]) -> None:
    """Run a stage as its command line says."""
    options = stage_parser(stage).parse_args(words)
    params = read_params(options)
    own = {name: value for name, value in vars(options).items() if name not in ("params", "set", "data")}
    importlib.import_module(stage.module).main(params, **own)


def run_command(name: str, words: Sequence[str]) -> None:
    """Run a command that is no stage; what its `main` returns is the exit code."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.arguments(parser)
    code = module.main(parser.parse_args(words))
    if code:
        sys.exit(code)


def guarded(work: Callable[[], None]) -> None:
    """Run `work`; an error the user can fix is printed as one sentence, with exit code 1."""
    try:
        work()
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
