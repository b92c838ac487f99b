"""Run a data stage as a Ray job and exit with its status: `ray job submit` exits with 0 when a job is stopped.

`customcontrast submit --address http://127.0.0.1:8265 -- python -m pipelines.mask --data /shared/data`
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from typing import Any

from runtime.errors import UserError

# Polling interval; a job takes minutes to days.
SECONDS_BETWEEN_LOOKS = 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.usage = "%(prog)s [options] -- COMMAND"
    parser.add_argument(
        "--address", default="http://127.0.0.1:8265", help="address of the dashboard (default: %(default)s)"
    )
    parser.add_argument(
        "--working-dir",
        default=".",
        help="folder sent to the nodes, without files that git ignores (default: %(default)s)",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="environment variable to pass on to the nodes"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run on the cluster")


def main(options: argparse.Namespace) -> None:
    """Submit the job and follow it.

    Raises:
        UserError: no command, an unset variable, a cluster that does not accept the job, or a job that fails.
    """
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise UserError("name the command after --, as in `-- python -m pipelines.mask`")
    unset = [name for name in options.env if name not in os.environ]
    if unset:
        raise UserError(f"--env {unset[0]}: no such environment variable; export it first")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    environment = {name: os.environ[name] for name in options.env}
    try:
        client = JobSubmissionClient(options.address)
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": options.working_dir, "env_vars": environment},
        )
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"the cluster at {options.address} does not accept the job ({message}); check the address and token"
        ) from None
    print(f"job {job}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # how schedulers stop a command
    try:
        follow(client, job)
    except (KeyboardInterrupt, SystemExit):
        client.stop_job(job)
        raise


def follow(client: Any, job: str) -> None:
    """Print the job's log until it ends.

    Raises:
        UserError: the job failed or was stopped.
    """
    printed = 0
    while True:
        status = client.get_job_status(job)  # read before the log, so that the log's end is printed
        log = client.get_job_logs(job)
        print(log[printed:], end="", flush=True)
        printed = len(log)
        if status.is_terminal():
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if status != "SUCCEEDED":
        message = " ".join(str(client.get_job_info(job).message).split())[:300]
        raise UserError(f"job {job} ended with status {status.value} ({message}); its log is above")
