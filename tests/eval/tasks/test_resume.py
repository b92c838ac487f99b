"""Tasks by one process and by several; the workers stand in a module of their own, which the processes import."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from eval.tasks.resume import Task, run_tasks
from pipelines import tables
from runtime.errors import UserError

WORKERS = """
import os, signal, time
from runtime.errors import UserError

def start(name):
    with open(name, "a") as log:
        log.write(f"{os.getpid()}\\n")
    return rows

def rows(payload):
    subjects, what = payload
    if what == "user":
        raise UserError("photo 'x' is gone; put it back")
    if what == "crash":
        raise ValueError("unforeseen")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        time.sleep(0.2)
    return [
        {"method": method, "subject_id": subject, "class_name": "cup", "partner": None, "prompt_id": 0,
         "group": "scene", "prompt": "a cup", "index": index, "seed": 7, "reference": "a/b", "image": b"png"}
        for subject in subjects for method in ("ours", "another") for index in range(3)
    ]
"""


@pytest.fixture
def do(tmp_path, monkeypatch, run):
    """Run tasks (subjects, what happens) with so many processes; returns the tally."""
    (tmp_path / "workers_of_test.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import workers_of_test

    def do(works, processes, out="out", **changes):
        tasks = [Task("+".join(subjects), [], 1, (subjects, what)) for subjects, what in works]
        start = [partial(workers_of_test.start, str(tmp_path / f"log{n}")) for n in range(processes)]
        return run_tasks(
            "generate",
            "generations",
            tasks,
            len(works),
            identity="x",
            start=start,
            out=tmp_path / out,
            run=run.model_copy(update={"work": str(tmp_path / changes.get("work", "work"))}),
        )

    return do


def bytes_of(folder: Path):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


WORKS = [(["b/x"], "wait"), (["b/c", "b/x/y"], ""), (["a/z"], ""), (["a"], "wait"), (["b/d"], "")]


def test_rows_are_the_same_bytes_in_key_order_whatever_the_number_of_processes(do, tmp_path):
    works = WORKS
    do(works, 1, "one", work="w1")
    tally = do(works, 2, "two", work="w2")
    assert (tally.subjects, tally.computed, tally.done_before) == (5, 5, 0)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    rows = tables.read(tmp_path / "one", "generations").to_pylist()
    assert [row["subject_id"] for row in rows[::3]] == ["a", "a/z", "b/c", "b/d", "b/x", "b/x/y"] * 2
    here, others = (tmp_path / "log0").read_text().split(), (tmp_path / "log1").read_text().split()
    assert here[0] == str(os.getpid())
    assert len({*here, *others}) == 3
    assert do(works, 2, "two", work="w2").done_before == 5
    assert (tmp_path / "log1").read_text().split() == others  # nothing missing, nothing started


def test_a_killed_process_is_one_sentence_and_costs_what_was_being_worked_on_only(do, tmp_path):
    works = [(["a"], ""), (["b"], ""), (["c"], "kill")]
    with pytest.raises(UserError, match=r"process of stage generate was killed \(SIGKILL\).*run the same command"):
        do(works, 2)
    assert not (tmp_path / "out").exists()
    tally = do([*works[:2], (["c"], "")], 1)
    assert tally.done_before >= 1
    assert tally.done_before + tally.computed == 3


@pytest.mark.parametrize(
    ("what", "said"), [("user", "photo 'x' is gone; put it back"), ("crash", r"ended with exit code 1 \(see above\)")]
)
def test_an_error_in_a_process_stops_the_run(do, what, said):
    with pytest.raises(UserError, match=said):
        do([(["a"], what), (["b"], "wait")], 2)


def test_processes_do_not_outlive_the_run(do, tmp_path):
    do([(["a"], ""), (["b"], "wait")], 2)
    for log in ("log0", "log1"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / log).read_text()), signal.SIG_DFL)
