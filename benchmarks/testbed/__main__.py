# SPDX-License-Identifier: Apache-2.0
"""Run a training script under torchrun on several emulated hosts of this machine.

python -m benchmarks.testbed --hosts 2 --nproc-per-host 2 --rate-mbit 200 -- pretrain_gpt_moe.py --num-layers 4 ...

Needs root and iproute2. Exit codes: 0, 1 if the job fails, 2 if hosts cannot be emulated here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.testbed.hosts import Testbed
from benchmarks.testbed.launch import JobFailed, run_torchrun
from benchmarks.testbed.namespaces import TestbedUnavailable


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--hosts", type=int, default=2, metavar="N", help="hosts (default 2)")
    options.add_argument("--nproc-per-host", type=int, default=1, metavar="P", help="ranks on each host (default 1)")
    options.add_argument("--rate-mbit", type=float, metavar="R", help="rate of each link, Mbit/s (default no limit)")
    options.add_argument("--limit-s", type=float, default=3600, metavar="S", help="end the job then (default 3600)")
    options.add_argument("--logs", type=Path, default=Path("out/testbed"), metavar="DIR", help="(default out/testbed)")
    options.add_argument("--torchrun", default="", metavar="ARGS", help='more for torchrun: "--max-restarts=3 ..."')
    options.add_argument("script", nargs="+", help="after --: the script and its flags")
    return options.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    try:
        with Testbed(args.hosts, args.rate_mbit) as testbed:
            run_torchrun(testbed, args.script, args.nproc_per_host, args.limit_s, args.logs, shlex.split(args.torchrun))
            for host in range(testbed.num_hosts):
                sent, received = testbed.link_bytes(host)
                print(f"host {host}: {sent / 1e6:.1f} MB sent, {received / 1e6:.1f} MB received", flush=True)
    except (TestbedUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"logs: {args.logs}/host*.log")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
