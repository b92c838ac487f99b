"""Tasks dealt out to several processes of this machine, each with models of its own.

A run is a few long tasks, so whoever is free takes the next; what the data stages need of Ray, it does not.
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
"""What a process that is told to stop is given before it is killed."""

Start = Callable[[], Callable[[Path, Any], None]]
T = TypeVar("T")


@dataclass
class Member(Generic[T]):
    """A process and the task it works on; None while it has none."""

    process: BaseProcess
    pipe: Connection
    task: T | None


def deal_out(
    stage: str, starts: Sequence[Start], todo: Iterator[tuple[Path, T]], payload: Callable[[T], Any]
) -> Iterator[T]:
    """Yield each task when its file is written, in the order in which they are finished.

    A task goes to whoever is free. A process begins when its first task does, with the `start` at its place in
    `starts`, and is stopped when the iterator is closed.

    Args:
        starts: a process each, called there: load the models and return what writes a task's file. Picklable.
        todo: file and task.
        payload: what of a task is sent to the process; picklable.

    Raises:
        UserError: a process met an error that the user can mend, or died.
    """
    # A forked child could not use CUDA, nor trust the locks of its parent's threads.
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
    """Wait until a process has something to tell; yield those that finished their task, with it."""
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
    """Return what to say of a process that is gone."""
    member.process.join()
    code = member.process.exitcode
    how = f"ended with exit code {code} (see above)"
    if code is not None and code < 0:
        how = f"was killed ({signal.Signals(-code).name})"
    return UserError(
        f"a process of stage {stage} {how}; what is finished is kept, so run the same command again, with fewer "
        f"processes if memory was short"
    )


def work(start: Start, pipe: Connection) -> None:
    """Do what comes through the pipe until it is closed; answer None, or the sentence of an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends it in order
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in order too: libraries hand their semaphores back
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
    """A parent that is killed cannot tell; its children would hold their GPUs until their tasks end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
