# SPDX-License-Identifier: Apache-2.0
"""Ours beside what a user would take instead: one training, the same links, the same faults.

    python -m benchmarks.peers                      everything that is not there yet, then the table and the picture
    python -m benchmarks.peers --systems full lm    some of it
    python -m benchmarks.peers --report             only the table and the picture, from what is there

Exit codes: 0, 1 if a configuration did not run to its end, 2 if hosts cannot be emulated here.
Every system runs in a virtual environment of its own, which is made first. Each configuration leaves a JSON file in
``--results``, and is not run again while that file is there. Needs root, for two emulated hosts (benchmarks/testbed).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._common import compile_package, hardware
from benchmarks.peers import faults, pages, tables
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.environments import python_of
from benchmarks.peers.jobs import HOSTS, RANKS, Job, JobStuck
from benchmarks.peers.judge import Truth
from benchmarks.testbed import Testbed, TestbedUnavailable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers"
LAYOUTS = ("2x2", "1x4")
SLOW_MBIT = 400.0
LINKS: dict[str, float | None] = {"free": None, "slow": SLOW_MBIT}
CYCLES, QUICK_CYCLES = 3, 1
MEASURE_LIMIT_S = 540.0
FAULTS: dict[str, Callable[[Job, Truth, int], dict[str, Any]]] = {
    "killed-rank": faults.run_killed_rank,
    "lost-host": faults.run_lost_host,
    "flipped-bit": faults.run_flipped_bit,
}
FAULT_LAYOUT = LAYOUTS[0]
PACKAGES = (
    "torch", "megatron-core", "lm-resiliency", "nvidia-resiliency-ext", "torch-checkpointing", "dlrover",
)  # fmt: skip


def main() -> int:
    """Run what is asked for and missing, then report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--systems", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    options.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="PP x EP")
    options.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS), help=f"slow: {SLOW_MBIT:g} Mbit/s")
    options.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    options.add_argument("--no-measure", action="store_true", help="only faults")
    options.add_argument("--quick", action="store_true", help="one cycle of blocks in place of three")
    options.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options.add_argument("--venvs", type=Path, default=ROOT / "out" / "peers" / "venvs", metavar="DIR")
    options.add_argument("--work", type=Path, default=ROOT / "out" / "peers" / "work", metavar="DIR", help="logs")
    options.add_argument("--report", action="store_true", help="run nothing")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw the picture there")
    options.add_argument("--pages", action="store_true", help="put the tables into README.md and docs/peers.md")
    args = options.parse_args()
    failed: list[str] = []
    if not args.report:
        try:
            runs = Runs(args)
            runs.all()
            failed = runs.failed
        except TestbedUnavailable as error:
            print(f"error: {error}", file=sys.stderr)
            return TestbedUnavailable.exit_code
    records = tables.read(args.results)
    print(tables.render(records))
    if args.plot is not None:
        tables.draw(records, args.plot)
    if args.pages:
        pages.fill(ROOT / "docs" / "peers.md", tables.render(records))
        pages.fill(ROOT / "README.md", tables.summary(records))
    if failed:
        print(f"not run to the end: {', '.join(failed)}; their logs are in {args.work}", file=sys.stderr)
    return 1 if failed else 0


class Runs:
    """What was asked for, configuration by configuration."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.failed: list[str] = []
        args.results.mkdir(parents=True, exist_ok=True)
        compile_package()  # peers are installed, and have theirs

    def all(self) -> None:
        """Everything that has no file yet; a configuration that fails is noted, and the next one runs."""
        for name in self.args.systems:
            peer = PEERS[name]
            for layout in [] if self.args.no_measure or peer.only_flip else self.args.layouts:
                for link in self.args.links:
                    self._once(name, f"{layout}-{link}", self._measure(peer, layout, LINKS[link]))
            for fault in self.args.faults if peer.system else []:
                if fault == "flipped-bit" or not peer.only_flip:
                    self._once(name, fault, self._fault(peer, FAULTS[fault]))

    def _once(self, system: str, what: str, run: Callable[[], dict[str, Any]]) -> None:
        name = f"{system}-{what}"
        path = self.args.results / f"{name}.json"
        if path.exists():
            return
        print(f"{name} ...", flush=True)
        try:
            found = run()
        except JobStuck as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            self.failed.append(name)
            return
        facts = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": versions(python_of(PEERS[system].environment, self.args.venvs)),
            "nice": os.nice(0),
            "load_average": os.getloadavg()[0],
            "command": f"python -m benchmarks.peers --systems {system}{' --quick' if self.args.quick else ''}",
        }
        path.write_text(json.dumps(facts | found, indent=1) + "\n")

    def _measure(self, peer: Peer, layout: str, rate_mbit: float | None) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with self._job(peer, layout, rate_mbit) as job:
                job.start("measure", "--cycles", str(QUICK_CYCLES if self.args.quick else CYCLES))
                job.await_all(lambda event: event["event"] == "ended", MEASURE_LIMIT_S)
                return {"layout": layout, "rate_mbit": rate_mbit, "ranks": [job.events(rank) for rank in range(RANKS)]}

        return run

    def _fault(self, peer: Peer, do: Callable[[Job, Truth, int], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            truth = self._truth(peer)
            with self._job(peer, FAULT_LAYOUT, None) as job:
                return {"layout": FAULT_LAYOUT, **do(job, truth, peer.fault_at)}

        return run

    def _truth(self, peer: Peer) -> Truth:
        """The run without faults; kept, since it is one and the same with these versions."""
        found = versions(python_of(peer.environment, self.args.venvs))
        path = self.args.work / "truth-{python}-{torch}-{megatron-core}.json".format(**found)
        if not path.exists():
            with self._job(Peer(title="", environment=peer.environment), FAULT_LAYOUT, None) as job:
                truth = faults.run_truth(job)
            path.write_text(json.dumps({"digests": truth.digests, "needles": truth.needles}))
        read = json.loads(path.read_text())
        return Truth(**{what: [{int(i): v for i, v in rank.items()} for rank in ranks] for what, ranks in read.items()})

    @contextmanager
    def _job(self, peer: Peer, layout: str, rate_mbit: float | None) -> Iterator[Job]:
        python = python_of(peer.environment, self.args.venvs)
        self.args.work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.args.work))
        with Testbed(HOSTS, rate_mbit) as testbed:
            job = Job(testbed, python, peer.system, layout, folder, peer.agent)
            try:
                yield job
            finally:
                job.end()
        shutil.rmtree(folder)  # kept where it failed: it has the logs


def versions(python: Path) -> dict[str, str | None]:
    """Of what an environment has."""
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {n: found.get(n) for n in sys.argv[1:]}))"
    )
    said = subprocess.run([str(python), "-c", script, *PACKAGES], check=True, capture_output=True, text=True)
    return dict(json.loads(said.stdout))


if __name__ == "__main__":
    sys.exit(main())
