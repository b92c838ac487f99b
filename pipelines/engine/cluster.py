"""Ray: connecting to a cluster, the resources an actor reserves, and how many actors fit."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError, one_line
from runtime.params import RunParams

SHORT = "/tmp"
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store_1")
"""Bytes of a folder in which a session's sockets have paths that Linux accepts."""


def reservation(run: RunParams, device: str) -> dict[str, float]:
    """Return the resources an actor reserves: its CPU work is decoding if it has a GPU, else the model."""
    return {
        "num_cpus": max(run.threads, run.decoders),
        "num_gpus": run.gpus_per_worker if device == "cuda" else 0,
    }


def room(nodes: Sequence[dict[str, Any]], options: dict[str, float]) -> int:
    """Return how many actors fit on the machines of `ray.nodes()`: one more would wait forever, with its shard."""
    needs = {name: amount for name, amount in zip(("CPU", "GPU"), options.values(), strict=True) if amount}
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(m.get(name, 0) / need + 1e-6) for name, need in needs.items()) for m in machines)


def session_folder() -> str | None:
    """Return the folder of a local Ray's sessions; None: its own choice, in RAY_TMPDIR or TMPDIR.

    A session has sockets in it, whose paths the kernel limits. /tmp replaces a folder that is too long or that cannot
    be written.

    Raises:
        UserError: /tmp cannot be written either.
    """
    chosen = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", SHORT))
    fits = len(os.fsencode(Path(chosen).absolute())) <= LONGEST_FOLDER
    if fits and os.access(chosen, os.W_OK | os.X_OK):
        return None
    if not os.access(SHORT, os.W_OK | os.X_OK):
        fault = "cannot be written" if fits else f"is longer than {LONGEST_FOLDER} bytes, too long for Ray's sockets"
        raise UserError(f"temporary folder {chosen} {fault}, nor can {SHORT}; set TMPDIR to a short, writable folder")
    return f"{SHORT}/ray"


def connect(run: RunParams) -> bool:
    """Join the cluster at RAY_ADDRESS, or start a local Ray on loopback without usage reports.

    Return whether this call joined or started Ray, so that the caller has to disconnect.

    Raises:
        UserError: Ray cannot be started, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Enables Ray's loopback-only mode; otherwise Ray replaces 127.0.0.1 below by the machine's address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's default niceness of 15 for workers stalls a stage under any other load on the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Nobody reads the metrics of a local Ray, and the thread that exports them every ten seconds has crashed a
        # five-minute driver with a segmentation fault.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_enable_open_telemetry", "0")
    import ray

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        with _one_sentence(
            "the Ray cluster at RAY_ADDRESS cannot be joined", "check the address, or unset it to use this machine"
        ):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return True
    if not home_can_be_written():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray makes one and keeps it there
    folder = session_folder()
    place = folder or os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", SHORT))
    advice = f"wait until the machine is less busy, free some space in {place} or set TMPDIR to another folder"
    with _one_sentence("Ray cannot be started", advice):
        ray.init(
            address="local",
            num_cpus=max(run.workers * max(run.threads, run.decoders), 1),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            object_store_memory=128 * 2**20,  # only items and paths pass through it
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return True


def home_can_be_written() -> bool:
    """Whether the user has a home folder that takes files."""
    try:
        return os.access(Path.home(), os.W_OK | os.X_OK)
    except RuntimeError:  # without HOME and an entry in /etc/passwd
        return False


@contextlib.contextmanager
def _one_sentence(what: str, advice: str) -> Iterator[None]:
    """Turn what Ray raises, of all kinds and many lines, into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{what} ({one_line(error)[:200].rstrip('. ')}); {advice}, and run the same command again"
        ) from None
