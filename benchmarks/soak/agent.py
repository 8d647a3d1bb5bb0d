# SPDX-License-Identifier: Apache-2.0
"""torch's elastic agent, as ``torchrun`` runs it, whose ranks are forked from a process that has imported everything.

An attempt so begins within a second, where ``torchrun`` spends most of a restart on imports. Everything else is
torch's: rendezvous, restarts, signals.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MANY_RESTARTS = 10_000


def rank(program: Sequence[str], armed: str) -> None:
    """One rank: the script and its flags, and the faults that the file ``armed`` has for this attempt."""
    flags = [*program[1:]]
    if armed:
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        faults = [f"{attempt}:{coordinate}" for coordinate in json.loads(Path(armed).read_text())]
        flags += ["--moetion-inject-fault", ",".join(faults)]
    sys.argv = [program[0], *flags]
    sys.path.insert(0, str(Path(program[0]).parent))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts a soak in the background has it ignored
    code = 0
    try:
        runpy.run_path(program[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as where the script is the whole process
        code = 1
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Run ranks until they are done."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--nodes", type=int, required=True)
    options.add_argument("--ranks", type=int, required=True, help="of a node")
    options.add_argument("--job", required=True, help="name of the rendezvous")
    options.add_argument("--endpoint", required=True, help="HOST:PORT of the rendezvous")
    options.add_argument("--hosts-it", type=int, required=True, help="1: this agent does")
    options.add_argument("--address", required=True, help="of this agent")
    options.add_argument("--warm", required=True, help="module that is imported before ranks are forked")
    options.add_argument("--armed", default="", help="file with faults")
    options.add_argument("program", nargs="+")
    args = options.parse_args()
    multiprocessing.set_forkserver_preload([args.warm])
    launch = LaunchConfig(
        min_nodes=args.nodes,
        max_nodes=args.nodes,
        nproc_per_node=args.ranks,
        run_id=args.job,
        rdzv_backend="c10d",
        rdzv_endpoint=args.endpoint,
        # A heartbeat is missed after 6 seconds and not after 15.
        rdzv_configs={"is_host": bool(args.hosts_it), "keep_alive_interval": 2, "timeout": 120},
        max_restarts=MANY_RESTARTS,
        monitor_interval=0.05,
        start_method="forkserver",
        local_addr=args.address,
        shutdown_timeout=5,
    )
    elastic_launch(launch, rank)(args.program, args.armed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
