# SPDX-License-Identifier: Apache-2.0
"""How much of its experts' state does the busiest rank send in mode ``popularity``, where ranks share experts?

Megatron's distributed optimizer gives each rank of an expert data parallel group one contiguous span of the flattened
experts. A snapshot is as late as the rank that sends most. Two choices are compared over the same made-up tokens: by
value alone, and with a bound for every rank, as in a run. What that costs is shown too: the tokens that a fault would
lose on average.

First by that rule for groups of several sizes. Then for the layouts of real models: four processes build each with
Megatron-Core, take the inventory that a run would take, and compare what lies on whom.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, parser, report
from megatron_moetion.config import MoetionConfig
from megatron_moetion.select.book import ExpertBook, Rules
from megatron_moetion.select.budget import Limits, experts_per_snapshot
from megatron_moetion.select.shares import Shares

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 4, 8, 16)
"""That share experts, by the rule."""
EXPERTS = (16, 64)
"""Of a rank's layers, by the rule."""
EXPERT_BYTES = 1 << 20
SNAPSHOTS, QUICK_SNAPSHOTS = 2000, 300
DRIFT = 50
"""Snapshots after which other experts are popular."""
WORLD_SIZE = 4
REAL = {
    "expert-DP 2 (EP 2)": "--expert-model-parallel-size 2",
    "expert-DP 2 (PP 2)": "--pipeline-model-parallel-size 2",
    "expert-DP 4": "",
}
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 8 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 128 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data "
    "--eval-iters 0 --bf16 --disable-bias-linear --use-distributed-optimizer --distributed-timeout-minutes 2"
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Shares of the experts' bytes that one rank sends of what it would send in mode ``full``, over all snapshots."""

    mean: float
    busiest: float
    at_risk: float
    """Tokens that a fault would lose on average, in those of one iteration."""


# -- by the rule ---------------------------------------------------------------------------------------------


def spans(experts: int, ranks: int) -> npt.NDArray[np.int64]:
    """Bytes of each expert on each rank, int64[experts, ranks]."""
    total = experts * EXPERT_BYTES
    cuts = [total * r // ranks for r in range(ranks + 1)]
    starts = np.arange(experts)[:, None] * EXPERT_BYTES
    overlap = np.minimum(starts + EXPERT_BYTES, cuts[1:]) - np.maximum(starts, cuts[:-1])
    return np.maximum(overlap, 0).astype(np.int64)


def show(nbytes: npt.NDArray[np.int64], snapshots: int, *, is_spread: bool) -> Shown:
    """Choose experts as a run with the default settings and K in the middle of its range does; no snapshot is lost."""
    experts = len(nbytes)
    config = MoetionConfig()
    limits: Limits = experts_per_snapshot(config, experts)
    rules = Rules(
        policy=config.selection,
        reserved=limits.fewest,
        most=limits.most,
        staleness_cap=config.staleness_cap,
        interval=1,
        shares=Shares.of(nbytes, limits.usual, limits.most) if is_spread else None,
    )
    book = ExpertBook(names=[str(e) for e in range(experts)], layers=["layer"] * experts, rules=rules)
    noise = np.random.default_rng(0)
    totals = np.zeros(experts, dtype=np.int64)
    book.choose_all(0, totals.tolist())
    busiest, mean, at_risk = [], [], []
    for iteration in range(1, snapshots + 1):
        if iteration % DRIFT == 1:  # a few experts have most tokens, as in a model without a strong balancing loss
            popular = noise.permutation(1 / np.arange(1, experts + 1))
        tokens = noise.poisson(10_000 * popular / popular.sum())
        totals = totals + tokens
        book.ledger.update(totals.tolist())
        chosen = book.choose(iteration, totals.tolist(), limits.usual)
        book.ledger.settle(iteration, whole=True)
        shares = nbytes[list(chosen)].sum(axis=0) / nbytes.sum(axis=0).max()
        busiest.append(shares.max())
        mean.append(shares.mean())
        at_risk.append(sum(book.ledger.unsaved) / tokens.sum())
    return Shown(mean=float(np.mean(mean)), busiest=float(np.mean(busiest)), at_risk=float(np.mean(at_risk)))


def results_of(name: str, nbytes: npt.NDArray[np.int64], snapshots: int) -> list[Result]:
    """Before and after."""
    by_value, spread = (show(nbytes, snapshots, is_spread=is_spread) for is_spread in (False, True))
    return [
        Result(name=f"{name}: mean share", value=spread.mean, unit="of full"),
        Result(name=f"{name}: busiest rank, by value alone", value=by_value.busiest, unit="of full"),
        Result(name=f"{name}: busiest rank, spread", value=spread.busiest, unit="of full"),
        Result(name=f"{name}: at risk, by value alone", value=by_value.at_risk, unit="iterations' tokens"),
        Result(name=f"{name}: at risk, spread", value=spread.at_risk, unit="iterations' tokens"),
    ]


# -- real layouts --------------------------------------------------------------------------------------------


def tables_of_real_layouts() -> dict[str, list[list[list[int]]]]:
    """By layout: for each group of ranks the bytes of each expert on each of them, [experts][ranks]."""
    found = {}
    for name, flags in REAL.items():
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "measured.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
            command += [__file__, "--worker", str(measured), "--flags", flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=600)
            found[name] = groups_of(json.loads(measured.read_text()))
    return found


def groups_of(ranks: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
    """From what each rank found: its peers, its experts' names, and the bytes of those that it holds."""
    found = []
    for peers in sorted({tuple(r["peers"]) for r in ranks}):
        names = ranks[peers[0]]["experts"]
        found.append([[ranks[p]["nbytes"].get(name, 0) for p in peers] for name in names])
    return found


def examine(path: Path, flags: str) -> int:
    """One of four ranks: what it holds of which expert."""
    from benchmarks._common import start_trainer

    place, trainer = start_trainer(f"{MODEL} {flags}")

    from torch import distributed as dist

    from megatron_moetion.mcore.state import MegatronState

    state = MegatronState(
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        user_state=trainer.progress,
        count_tokens=True,
    )
    assert state.tokens is not None
    mine = {
        "peers": state.expert_peers(),
        "experts": [c.expert for c in state.tokens.token_counters()],
        "nbytes": {u.name: u.nbytes for u in state.inventory().units if u.expert is not None},
    }
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, mine)
    if place.rank == 0:
        path.write_text(json.dumps(gathered))
    dist.barrier()
    return 0


def main() -> int:
    """Show both and report."""
    options = parser(__doc__ or "")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--flags", default="", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker is not None:
        return examine(args.worker, args.flags)
    snapshots = QUICK_SNAPSHOTS if args.quick else SNAPSHOTS
    results: list[Result] = []
    for experts in EXPERTS:
        for ranks in RANKS:
            results += results_of(f"{experts} experts, expert-DP {ranks}", spans(experts, ranks), snapshots)
    for name, groups in tables_of_real_layouts().items():
        worst = max(groups, key=lambda table: float(np.max(table)))
        results += results_of(f"Megatron, {len(worst)} experts, {name}", np.array(worst, dtype=np.int64), snapshots)
    notes = [
        f"{snapshots} snapshots; K is a quarter of the experts; shares are of what the rank with most of them holds",
    ]
    report("busiest_rank", results, args.json, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
