# SPDX-License-Identifier: Apache-2.0
"""Measures real iterations on the testbed, for the model to be calibrated with and held to.

One job trains on two emulated hosts with two ranks each. It goes through configurations (sequences an iteration, rate
of the links), and in each through blocks of iterations without snapshots and with those of several arms, in random
order.
The first blocks of a configuration are left out. The process that holds the testbed sets the links' rate and counts
their bytes when rank 0 asks it to, through files.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.replication_overhead import HOSTS, RANKS_PER_HOST, Layout, Size, open_session, run_block

ARMS = ("off", "full-eager", "popularity-eager", "popularity-bubble")
SETTLING_ITERATIONS, BLOCK_ITERATIONS, CYCLES = 1, 3, 3
SEQUENCE_BYTES = 512 * 256 * 4
"""Of one sequence's hidden states: tokens, width, bytes of fp32."""
LIMIT_S = 1500
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is trained, over which links."""

    pp: int
    ep: int
    batch: int
    """Sequences an iteration."""
    rate_mbit: float | None
    """Of each host's link; None: not limited."""
    is_known: bool
    """Whether the model is calibrated with it; the others are predicted."""

    @property
    def name(self) -> str:
        """For tables."""
        rate = "unlimited" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        return f"PP {self.pp} x EP {self.ep}, {self.batch} sequences, {rate}"


def _all(
    pp: int, ep: int, known: Sequence[tuple[int, float | None]], predicted: Sequence[tuple[int, float | None]]
) -> Any:
    return [
        Configuration(pp=pp, ep=ep, batch=batch, rate_mbit=rate, is_known=is_known)
        for is_known, several in ((True, known), (False, predicted))
        for batch, rate in several
    ]


CONFIGURATIONS: tuple[Configuration, ...] = (
    *_all(2, 2, [(4, None), (12, None), (8, 100.0)], [(4, 200.0), (8, 200.0), (8, 300.0), (12, 150.0)]),
    *_all(1, 4, [(4, None), (8, None), (4, 200.0)], [(4, 150.0), (4, 300.0), (8, 300.0)]),
)


def measure(pp: int, ep: int, path: Path, *, cycles: int = CYCLES) -> None:
    """Run all configurations of one layout on a testbed of this machine; what was measured goes to ``path``: JSON."""
    from benchmarks.testbed import Job, Testbed

    configurations = [c for c in CONFIGURATIONS if (c.pp, c.ep) == (pp, ep)]
    with tempfile.TemporaryDirectory() as scratch, Testbed(HOSTS) as testbed:
        folder = Path(scratch)
        worker = [str(Path(__file__).with_name("worker.py")), str(folder), str(pp), str(ep), str(cycles)]
        job = Job(testbed, worker, RANKS_PER_HOST, folder)
        job.start()
        for question in range(len(configurations) * (cycles + 2) * 2 + 1):
            asked, told = folder / f"asked-{question}.json", folder / f"told-{question}.json"
            if not _wait_for(asked, job):
                break
            wanted = json.loads(asked.read_text())
            if wanted["is_over"]:
                _write(told, [])
                break
            if wanted["rate_mbit"] != testbed.rate_mbit:
                testbed.set_rate(wanted["rate_mbit"])
            _write(told, [testbed.link_bytes(host)[0] for host in range(HOSTS)])
        try:
            job.wait(LIMIT_S)
        finally:
            if (folder / "measured.json").exists():  # what there is of a job that has failed
                shutil.copy(folder / "measured.json", path)


def _wait_for(path: Path, job: Any) -> bool:
    """Whether the file came before the job ended."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        if time.monotonic() > deadline or any(agent.poll() is not None for agent in job.agents.values()):
            return False
        time.sleep(POLL_S)
    return True


def _write(path: Path, document: Any) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document))
    draft.rename(path)


# -- one rank ------------------------------------------------------------------------------------------------


class Asking:
    """How rank 0 talks to the holder of the testbed; all ranks wait for the answer."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._questions = folder, rank, 0

    def ask(self, rate_mbit: float | None, *, is_over: bool = False) -> list[int]:
        """Set the links' rate; returns bytes that each host has sent so far. Collective."""
        from torch import distributed as dist

        dist.barrier()
        told = self._folder / f"told-{self._questions}.json"
        if self._rank == 0:
            question = {"rate_mbit": rate_mbit, "is_over": is_over}
            _write(self._folder / f"asked-{self._questions}.json", question)
        deadline = time.monotonic() + LIMIT_S
        while not told.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the holder of the testbed did not answer question {self._questions}")
            time.sleep(POLL_S)
        self._questions += 1
        dist.barrier()
        found: list[int] = json.loads(told.read_text())
        return found


def work(folder: Path, pp: int, ep: int, cycles: int) -> None:
    """One rank of the job; rank 0 writes what all have measured."""
    from benchmarks._common import start_trainer

    configurations = [c for c in CONFIGURATIONS if (c.pp, c.ep) == (pp, ep)]
    most = max(c.batch for c in configurations)
    place, trainer = start_trainer(f"{Layout(pp=pp, ep=ep).flags} --global-batch-size {most}")

    from torch import distributed as dist

    store = Path("/dev/shm/moetion-cluster")
    sessions = {arm: open_session(trainer, arm, store, None) for arm in ARMS[1:]}
    asking, order = Asking(folder, place.rank), random.Random(0)
    found = []
    for configuration in configurations:
        trainer.args.global_batch_size = configuration.batch
        trainer.args.num_microbatches = configuration.batch // trainer.args.data_parallel_size
        size = Size(
            batch=configuration.batch,
            cycles=cycles,
            block_iterations=BLOCK_ITERATIONS,
            settling_iterations=SETTLING_ITERATIONS,
            limit_s=LIMIT_S,
        )
        asking.ask(configuration.rate_mbit)
        blocks = []
        for cycle in range(cycles + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                sent = asking.ask(configuration.rate_mbit) if arm == "off" and cycle == 1 else None
                block = run_block(trainer, sessions.get(arm), size)
                if sent is not None:
                    iterations = SETTLING_ITERATIONS + BLOCK_ITERATIONS
                    over = asking.ask(configuration.rate_mbit)
                    block["link_bytes"] = max(b - a for a, b in zip(sent, over, strict=True)) / iterations
                if cycle:
                    blocks.append({"cycle": cycle, "arm": arm, **block})
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, blocks)
        if place.rank == 0:
            found.append(summary(configuration, gathered))
            _write(folder / "measured.json", found)
            print(f"{configuration.name}: measured", flush=True)
    for session in reversed(sessions.values()):
        session.close()
    asking.ask(None, is_over=True)
    shutil.rmtree(store, ignore_errors=True)


def summary(configuration: Configuration, ranks: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Medians by arm, from each rank's blocks of one configuration."""
    arms = {}
    for arm in ARMS:
        blocks = [[b for b in of_rank if b["arm"] == arm] for of_rank in ranks]
        every = [b for of_rank in blocks for b in of_rank]
        arms[arm] = {
            "block_s": [statistics.median(b["seconds"]) for b in blocks[0]],
            "cpu_s": len(ranks) * statistics.median(b["cpu_seconds"] for b in every),
        }
        if arm == "off":
            arms[arm]["link_bytes"] = next(b["link_bytes"] for b in blocks[0] if "link_bytes" in b)
        else:
            arms[arm] |= {
                "snapshot_bytes": sum(of_rank[-1]["bytes"] for of_rank in blocks),
                "dropped": sum(b["dropped"] for b in blocks[0]),
                "mb_per_s": statistics.median(b["mb_per_s"] for b in every),
            }
    return {"configuration": asdict(configuration), "arms": arms}
