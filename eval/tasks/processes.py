"""A pool of processes on this machine, each with its own models.

A run is a few long tasks; an idle process takes the next one. This needs none of the Ray features the data stages use.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.errors import ModelError, UserError

SECONDS_TO_END = 10.0
"""Grace period between SIGTERM and SIGKILL."""

Start = Callable[[], Callable[[Path, Any], None]]
T = TypeVar("T")


@dataclass
class Member(Generic[T]):
    """A process and its current task; None while idle."""

    process: BaseProcess
    pipe: Connection
    task: T | None


def deal_out(
    stage: str, starts: Sequence[Start], todo: Iterator[tuple[Path, T]], payload: Callable[[T], Any]
) -> Iterator[T]:
    """Yield each task when its file is written, in order of completion.

    A task goes to the first idle process. Process i starts with its first task, from `starts[i]`, and is stopped when
    the iterator is closed.

    Args:
        starts: one per process, called in it: loads the models and returns the function that writes a task's file.
            Picklable.
        todo: file and task.
        payload: the part of a task that is sent to the process; picklable.

    Raises:
        UserError: a process hit an error the user can fix, or died.
    """
    # A forked child cannot use CUDA, and may inherit locks held by its parent's threads.
    context = multiprocessing.get_context("spawn")
    crew: list[Member[T]] = []
    try:
        for file, task in todo:
            member = next((m for m in crew if m.task is None), None)
            if member is None and len(crew) < len(starts):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(starts[len(crew)], theirs), daemon=True)
                process.start()
                theirs.close()
                member = Member(process, ours, None)
                crew.append(member)
            while member is None:
                for finished, done in _finished(stage, crew):
                    member = finished
                    yield done
            try:
                member.pipe.send((file, payload(task)))
            except ConnectionError:
                raise _death(stage, member) from None
            member.task = task
        while any(m.task is not None for m in crew):
            for _, done in _finished(stage, crew):
                yield done
    finally:
        for member in crew:
            member.process.terminate()
        for member in crew:
            member.process.join(SECONDS_TO_END)
            member.process.kill()
            member.process.join()


def _finished(stage: str, crew: Sequence[Member[T]]) -> Iterator[tuple[Member[T], T]]:
    """Wait until a process replies; yield each process that finished, with its task."""
    busy = {member.pipe: member for member in crew if member.task is not None}
    for pipe in wait(list(busy)):
        member = busy[pipe]  # type: ignore[index]  # only connections were waited for
        task, member.task = member.task, None
        assert task is not None
        try:
            complaint = member.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise _death(stage, member) from None
        if complaint is not None:
            raise UserError(complaint)
        yield member, task


def _death(stage: str, member: Member[T]) -> UserError:
    """Return the error for a process that died."""
    member.process.join()
    code = member.process.exitcode
    how = f"ended with exit code {code} (see above)"
    if code is not None and code < 0:
        how = f"was killed ({signal.Signals(-code).name})"
    return UserError(
        f"a process of stage {stage} {how}; finished tasks are kept, so run the same command again, with fewer "
        f"processes if it ran out of memory"
    )


def work(start: Start, pipe: Connection) -> None:
    """Run tasks from the pipe until it closes; reply None or an error message."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the parent shuts it down in order
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exit cleanly, so that libraries release their semaphores
    threading.Thread(target=_die_with_parent, daemon=True).start()
    write: Callable[[Path, Any], None] | None = None
    while True:
        try:
            file, payload = pipe.recv()
        except EOFError:
            return
        complaint = None
        try:
            write = write or start()
            write(file, payload)
        except (UserError, ModelError) as error:
            complaint = str(error)
        pipe.send(complaint)


def _die_with_parent() -> None:
    """Exit with the parent: children of a killed parent would hold their GPUs until their tasks end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
