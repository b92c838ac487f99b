"""The command line of the page."""

from __future__ import annotations

import socket

import pytest

from model.demo import command
from model.sampler import ADAPTERS, is_ready
from runtime.cli import main


def fails(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *words])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_without_gradio_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "needs the package gradio, which is not installed; install the extra demo with" in fails([], capsys)


def test_port_that_is_taken_is_one_sentence(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = fails(["--port", str(port)], capsys)
    assert f"port {port} of 127.0.0.1 cannot be used (address already in use); pass another with --port" in said
    assert "port 99999 of 127.0.0.1 cannot be used" in fails(["--port", "99999"], capsys)


def test_adapter_that_is_not_there_is_one_sentence(capsys, tmp_path):
    assert "pass the folder of a trained adapter" in fails(["--adapter", str(tmp_path)], capsys)


def test_ready_adapters_are_offered_and_a_given_one_alone():
    assert list(command.offered(None)) == [name for name in ADAPTERS if is_ready(name)]
    assert command.offered(ADAPTERS["realcustom"]) == {"realcustom": ADAPTERS["realcustom"]}


def test_door_is_open_to_this_machine_only():
    with command.listening(0) as door:
        assert door.getsockname()[0] == "127.0.0.1"
