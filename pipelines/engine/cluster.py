"""Ray: joined or started, what an actor reserves, and how many fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from runtime.params import RunParams


def reservation(run: RunParams, device: str) -> dict[str, float]:
    """Return what an actor reserves: beside a GPU its CPU work is decoding, without one the model's."""
    return {
        "num_cpus": max(run.threads, run.decoders),
        "num_gpus": run.gpus_per_worker if device == "cuda" else 0,
    }


def room(nodes: Sequence[dict[str, Any]], options: dict[str, float]) -> int:
    """Return how many actors fit on the machines of `ray.nodes()`: one more would wait for ever, with its shard."""
    needs = {name: amount for name, amount in zip(("CPU", "GPU"), options.values(), strict=True) if amount}
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(m.get(name, 0) / need + 1e-6) for name, need in needs.items()) for m in machines)


def connect(run: RunParams) -> bool:
    """Join the cluster named by RAY_ADDRESS, or start Ray on this machine, on loopback, telling nobody.

    Return whether Ray was started or joined here, and so is to be left here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's name for its loopback-only mode; without it, 127.0.0.1 below is replaced by the machine's address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray would give its workers niceness 15, and beside any other work on the machine a stage would stand still.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Nobody reads the metrics of such a Ray, and the thread that exports them every ten seconds has ended a driver
        # of five minutes with a segmentation fault.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_enable_open_telemetry", "0")
    import ray

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return True
    ray.init(
        address="local",
        num_cpus=max(run.workers * max(run.threads, run.decoders), 1),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=128 * 2**20,  # only items and paths travel through it
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return True
