"""One strict command: every word is known or refused with the nearest right one."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import cli
from runtime.cli import COMMANDS, guarded, main, overview, stage_parser
from runtime.errors import ModelError, UserError
from runtime.params import section_text
from runtime.stages import stages

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_help_fits_a_screen_and_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    lines = text.rstrip().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    for name in (*stages(), *(name.split()[0] for name in COMMANDS)):
        assert f"\n  {name}" in text
    main([])
    assert capsys.readouterr().out == text == overview(stages()) + "\n"


@pytest.mark.parametrize("name", stages())
def test_help_of_a_stage_shows_its_section_with_the_comments(name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert section_text(name) in text and len(section_text(name).splitlines()) > 2
    assert "--set KEY=VALUE" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_printed_and_nothing_is_run(name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0 and f"usage: customcontrast {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["msk"], "unknown command 'msk', did you mean 'mask'?"),
        (["frobnicate"], "unknown command 'frobnicate'; customcontrast --help lists all"),
        (["bench", "dat"], "unknown command 'bench dat', did you mean 'bench data'?"),
        (["similarity", "--parms", "configs/sd15.yaml"], "unknown option '--parms', did you mean '--params'?"),
        (["similarity", "--workers", "9"], "unknown option '--workers'"),
        (["mask", "--par", "x"], "unknown option '--par', did you mean '--params'?"),
        (["mask", "frames"], "unknown argument 'frames'"),
        (["mask", "--set"], "argument --set: expected one argument"),
        (["sample"], "the following arguments are required: --reference"),
        (["sample", "--refrence=a.png"], "unknown option '--refrence', did you mean '--reference'?"),
        (["data", "--layout", "foldr", "--root", "x"], "invalid choice: 'foldr'"),
        (["train", "--resum", "x"], "unknown option '--resum', did you mean '--resume'?"),
    ],
)
def test_unknown_words_and_options_are_refused_with_the_nearest(words: list[str], said: str, capsys, monkeypatch):
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=only_commands(importlib.import_module)))
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error and error.startswith("usage: customcontrast")
    assert len(error.strip().splitlines()[-1].split("error: ")) == 2


def only_commands(load):
    """No stage is run for a command line that is refused."""
    stage_modules = {stage.module for stage in stages().values()}

    def checked(name: str):
        assert name not in stage_modules
        return load(name)

    return checked


def test_unknown_key_of_params_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--set", "report.titel=x"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: --set: unknown key 'report.titel' is not in params.yaml; correct its spelling\n"
    )


@pytest.mark.parametrize("error", [UserError, ModelError])
def test_an_error_the_user_can_fix_is_one_sentence_and_exit_code_1(error: type[Exception], capsys):
    def work() -> None:
        raise error("data/x is empty; run curate first")

    with pytest.raises(SystemExit) as stop:
        guarded(work)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: data/x is empty; run curate first\n"


def test_interrupted_command_exits_as_a_shell_expects(capsys):
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        guarded(work)
    assert stop.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_stage_gets_its_parsed_params_and_its_own_options(monkeypatch):
    given = {}
    module = importlib.import_module(stages()["generate"].module)
    monkeypatch.setattr(module, "main", lambda params, **options: given.update(params=params, **options))
    main(["generate", "--adapter", "x", "--data", "d", "--set", "generate.steps=3"])
    assert given["adapter"] == "x" and given["params"].words() == ["--data", "d", "--set", "generate.steps=3"]


@pytest.mark.parametrize("name", stages())
def test_options_of_a_stage_are_those_its_main_takes(name: str):
    import inspect

    stage = stages()[name]
    taken = list(inspect.signature(importlib.import_module(stage.module).main).parameters)
    assert taken == ["params", *(flag.strip("-").replace("-", "_") for flag in stage.options)]
    assert stage_parser(stage).parse_args([]).data == "data"


def test_exit_code_of_a_command_is_that_of_its_main(monkeypatch):
    from pipelines import run

    monkeypatch.setattr(run, "main", lambda options: 3)
    with pytest.raises(SystemExit) as stop:
        main(["data", "--layout", "folder", "--root", "x"])
    assert stop.value.code == 3


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pipelines.mask", "train", "eval.score", "benchmarks.model"])
def test_packages_are_commands(module: str):
    """As `ray job submit -- python -m pipelines.mask` runs them."""
    done = subprocess.run([sys.executable, "-m", module, "--helq"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean '--help'?" in done.stderr


@pytest.mark.slow
def test_help_needs_no_heavy_library():
    code = "import sys; from runtime.cli import main; main(['--help'])\n"
    code += "assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.slow
def test_reader_that_has_seen_enough_ends_the_command_without_a_traceback():
    command = f"{sys.executable} customcontrast.py --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode in (0, 128 + signal.SIGPIPE), "all was written before head ended, or not"
    assert done.stderr == ""
    assert done.stdout.startswith("usage: customcontrast COMMAND [OPTIONS]") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_closed_streams_are_no_error_and_no_file_takes_their_place():
    code = "from runtime.cli import main; main(['--help']); "
    code += "print(open('params.yaml').fileno(), file=open('/dev/fd/9', 'w'))"
    command = f'{sys.executable} -c "{code}" 9>&1 <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 2


def test_file_names_that_are_not_read_as_utf_8_are_refused_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 1
    assert (
        capsys.readouterr().err
        == "error: file names are read as iso8859-1; set the environment variable PYTHONUTF8=1\n"
    )


def test_installing_it_as_a_package_is_refused_in_one_sentence():
    from runtime import no_wheel

    for hook in (no_wheel.build_wheel, no_wheel.build_sdist, no_wheel.build_editable):
        with pytest.raises(SystemExit, match="is an application to clone"):
            hook("dist")


def test_every_command_s_module_has_what_the_command_calls():
    for command in COMMANDS.values():
        module = importlib.import_module(command.module)
        assert callable(module.arguments) and callable(module.main) and module.__doc__
    assert cli.PROGRAM == "customcontrast"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(errno.ENOSPC, "full", "data/x"), "data/x: no space left on its disk; free some"),
        (OSError(errno.EDQUOT, "full"), "no space left on its disk; free some"),
        (OSError(errno.EROFS, "Read-only file system", "data/x"), "data/x: read-only file system; correct its"),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), "data/x: permission denied; correct its"),
    ],
)
def test_storage_that_is_full_or_closed_is_one_sentence(fault: OSError, said: str, capsys):
    def work() -> None:
        raise fault

    with pytest.raises(SystemExit) as stop:
        guarded(work)
    assert stop.value.code == 1 and f"error: {said}" in capsys.readouterr().err


def test_other_faults_of_files_keep_their_traceback():
    def work() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        guarded(work)


@pytest.mark.slow
def test_command_works_in_another_folder_with_params_of_its_own(tmp_path: Path):
    """It starts the stages as processes, which have to find the code too."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    words = ["data", "--layout", "folder", "--root", ".", "--data", "tables", "--stages", "mask"]
    command = [sys.executable, str(REPOSITORY / "customcontrast.py"), *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "curate" in done.stderr, done.stderr
