"""The `customcontrast <command>` command line: strict parsing, and the options that commands share."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import ModelError, UserError, storage_fault
from runtime.params import Params, section_text
from runtime.repro import stage_begins
from runtime.stages import Stage, stages

PROGRAM = "customcontrast"


@dataclass(frozen=True)
class Command:
    """A command that is not a stage; `module` has `arguments(parser)` and `main(options)`."""

    module: str
    summary: str


COMMANDS = {
    "repro": Command("runtime.repro", "run the pipeline with DVC: all stages that are out of date"),
    "data": Command("pipelines.run", "run the data stages on your own photos"),
    "sample": Command("model.sample", "generate images of a subject from its photos"),
    "demo": Command("model.demo.command", "open a page that generates images of a subject, in a browser"),
    "export": Command("model.export", "export an adapter in IP-Adapter's layout"),
    "export-pairs": Command("pipelines.export.command", "write the training pairs in formats of other trainers"),
    "show": Command("pipelines.tables.show", "print rows of a table"),
    "trial": Command("eval.trial.command", "put the similarity metrics on trial on your own captures"),
    "compare": Command("eval.report.compare", "compare the scores of several runs side by side"),
    "params": Command("runtime.params", "merge a file such as configs/sd15.yaml into params.yaml"),
    "forget": Command("pipelines.forget.command", "delete a person or other subject from tables, caches and images"),
    "submit": Command("pipelines.engine.submit", "run a data stage as a job on a Ray cluster"),
    "memory": Command("train.distributed.memory", "estimate a training run's memory per device"),
    "bench data": Command("benchmarks.data.command", "benchmark the data stages"),
    "bench model": Command("benchmarks.model.command", "benchmark the network"),
    "bench train": Command("benchmarks.train.command", "benchmark training"),
    "bench eval": Command("benchmarks.eval.command", "benchmark scoring"),
}


class Parser(argparse.ArgumentParser):
    """A parser that rejects abbreviations and suggests the closest match for an unknown option."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`. An unknown option is a usage error that suggests the closest one, whatever else is missing."""
        words = list(args or [])
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(f"unknown option '{option}'{nearest(option, self._option_string_actions)}")
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown {'option' if unknown[0].startswith('-') else 'argument'} '{unknown[0]}'")
        return found

    def error(self, message: str) -> NoReturn:
        """Print the usage and a one-sentence error; exit with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def nearest(word: str, known: Sequence[str] | Any) -> str:
    """Return `, did you mean '...'?`, or an empty string if no known word is similar to `word`."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{found[0]}'?" if found else ""


def shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by all commands that read params.yaml."""
    group = parser.add_argument_group("parameters")
    group.add_argument("--params", action="append", default=[], metavar="FILE", help="YAML merged over params.yaml")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value: train.steps=9"
    )
    group.add_argument("--data", default="data", metavar="DIR", help="folder of the tables (default: %(default)s)")


def read_params(options: argparse.Namespace) -> Params:
    """Return the parameters given by a command line's shared options."""
    return Params.read(options.params, options.set, options.data)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command in `words` (default: this process's arguments) and exit with its code."""
    reopen_streams()
    words = sys.argv[1:] if words is None else list(words)
    if sys.getfilesystemencoding().lower() != "utf-8":
        found = sys.getfilesystemencoding()
        print(f"error: file names are read as {found}; set the environment variable PYTHONUTF8=1", file=sys.stderr)
        sys.exit(1)
    known = stages()
    if not words or words[0] in ("-h", "--help", "help"):
        guarded(lambda: print(overview(known)))
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
        print(f"error: unknown command '{name}'{hint}; {PROGRAM} --help lists all commands", file=sys.stderr)
        sys.exit(2)


def run(*words: str) -> None:
    """Run a command with this process's arguments appended, for `python -m <package>`."""
    main([*words, *sys.argv[1:]])


def overview(known: dict[str, Stage]) -> str:
    """Return the top-level help: one line per command."""
    lines = [f"usage: {PROGRAM} COMMAND [OPTIONS], where COMMAND is a stage, in the order of `dvc repro`,"]
    lines += [f"  {stage.name:12} {stage.summary}" for stage in known.values()]
    lines += ["or another command; COMMAND --help shows its options and a stage's section of params.yaml:"]
    lines += [f"  {name:12} {command.summary}" for name, command in COMMANDS.items() if " " not in name]
    names = ", ".join(name.split()[1] for name in COMMANDS if " " in name)
    lines += [f"  {'bench NAME':12} measure the code's overhead over the work itself: {names}"]
    return "\n".join(lines)


def stage_parser(stage: Stage) -> Parser:
    """Return the parser of a stage's command; its help shows the stage's section of params.yaml with comments."""
    try:
        text = section_text(stage.name)
    except OSError:  # not in the repository root; reading params.yaml reports that
        text = ""
    own = f"its section of params.yaml:\n\n{text}" if text else None
    parser = Parser(prog=f"{PROGRAM} {stage.name}", description=stage.summary, epilog=own)
    for flag, keywords in stage.options.items():
        parser.add_argument(flag, **dict(keywords))
    shared_options(parser)
    return parser


def run_stage(stage: Stage, words: Sequence[str]) -> None:
    """Run a stage with the options of its command line."""
    options = stage_parser(stage).parse_args(words)
    params = read_params(options)
    own = {name: value for name, value in vars(options).items() if name not in ("params", "set", "data")}
    stage_begins(stage.name)
    importlib.import_module(stage.module).main(params, **own)


def run_command(name: str, words: Sequence[str]) -> None:
    """Run a command that is not a stage; the return value of its `main` is the exit code."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.arguments(parser)
    code = module.main(parser.parse_args(words))
    if code:
        sys.exit(code)


def reopen_streams() -> None:
    """Open closed standard streams (`>&-`) on the null device: the next file opened would be in their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def guarded(work: Callable[[], None]) -> None:
    """Run `work`; print an error the user can fix as one sentence and exit with code 1."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if (fault := storage_fault(error)) is None:
            raise
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
