"""One writer per stage."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError


@contextlib.contextmanager
def exclusive(stage: str, work: Path) -> Iterator[None]:
    """Hold the stage's lock in `work`; the kernel releases it when the process exits, however it exits.

    Raises:
        UserError: another process holds it; the message names it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{stage}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"stage {stage} is already being run by {holder}; wait for it or stop it") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield
