"""`python -m tests.world.two_nodes FOLDER COUNT FATES 2`: the stage of `shard_workers` on two nodes.

One of the nodes is taken away. A worker of each node waits for `FOLDER/gate`; it opens when the second node is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from runtime.cli import guarded
from tests.world import shard_workers

# A dead node is noticed within seconds, and a slow one is not taken for dead.
NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 3,
}


def main() -> None:
    folder = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": NOTICE})
    second = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address

    def take_away() -> None:
        while len(list(folder.glob("gate.*.pid"))) < 2:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        (folder / "gate").touch()

    threading.Thread(target=take_away, daemon=True).start()
    try:
        shard_workers.main()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    guarded(main)
