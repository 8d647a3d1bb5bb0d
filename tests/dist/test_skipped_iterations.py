# SPDX-License-Identifier: Apache-2.0
"""Iterations without an optimizer step: the bundled trainer with ``--iterations-to-skip``, killed around them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery
from test_restarts import MODES, Attempt, Run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SKIPPED = (1, 4, 5, 6, 9)
FLAGS = f"--lr 1e-2 --iterations-to-skip {' '.join(map(str, SKIPPED))} --moetion-state-hash-interval 1"
FAULTS = ((0, 1, None), (1, 5, 1), (2, 6, None), (3, 7, 0), (2, 9, None))
"""Which rank is killed after which iteration, and which node's memory goes with it: the first of all, within several in
a row, the last of them, right after them, and one before the end."""


@pytest.fixture(scope="module")
def trainers() -> Iterator[Nursery]:
    found = Nursery("trainer")
    yield found
    found.close()


@pytest.fixture
def runs(trainers: Nursery, tmp_path: Path, store: Path) -> Callable[[str, str], Run]:
    def make(name: str, flags: str) -> Run:
        report = f"--moetion-report {tmp_path / name}.jsonl" if "--moetion " in flags else ""
        return Run(trainers, tmp_path / name, store / name, f"{flags} {report}")

    return make


def events(tmp_path: Path, name: str, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == event]


def moetion(mode: str) -> str:
    return f"--moetion --moetion-mode {mode} --moetion-ranks-per-node 2 {FLAGS}"


@pytest.mark.proves("Iterations without an optimizer step", "recovery")
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]])
def test_a_run_is_bitwise_the_same_when_it_is_killed_in_and_around_them(
    runs: Callable[[str, str], Run], tmp_path: Path, mode: str
) -> None:
    undisturbed = runs("undisturbed", moetion(mode)).finish()
    run = runs("killed", moetion(mode))
    attempts: list[Attempt] = []
    for number, (rank, iteration, node) in enumerate(FAULTS):
        attempts.append(run.attempt(f"--moetion-inject-fault {number}:{rank}:{iteration}:before-select"))
        assert -9 in attempts[-1].codes, attempts[-1].output[-3000:]
        if node is not None:
            shutil.rmtree(run.store / "restarts" / f"node{node}")
    attempts.append(run.finish())
    hashes = [{e["iteration"]: e["hash"] for e in events(tmp_path, n, "state_hash")} for n in ("undisturbed", "killed")]
    assert hashes[0] == hashes[1]
    assert set(hashes[0]) == set(range(1, 11))
    assert set(undisturbed.losses) == set(range(1, 11)) - set(SKIPPED)
    found = [(i, loss) for attempt in attempts for i, loss in attempt.losses.items()]
    assert {i for i, _ in found} == set(undisturbed.losses)
    assert [i for i, loss in found if undisturbed.losses[i] != loss] == []
    recovered = [e["iteration"] for e in events(tmp_path, "killed", "recovered")]
    assert all(0 < at - back <= 2 for (_, at, _), back in zip(FAULTS, recovered, strict=True)), recovered
    assert "captured anew" not in "".join(a.output for a in attempts), "no iteration is a hole"
    assert "iteration 9 is skipped" in attempts[-1].output


def test_mode_popularity_goes_on_after_them(runs: Callable[[str, str], Run], tmp_path: Path) -> None:
    run = runs("killed", moetion(MODES[1]))
    killed = run.attempt("--moetion-inject-fault 0:1:6:before-select")
    assert -9 in killed.codes
    assert set(killed.losses) == {2, 3}
    last = run.finish()
    (recovered,) = events(tmp_path, "killed", "recovered")
    assert recovered["iteration"] in (4, 5)
    assert set(last.losses) == {7, 8, 10}


def test_samples_are_consumed_and_neither_schedule_nor_state_moves(runs: Callable[[str, str], Run]) -> None:
    """As in Megatron-LM, also without checkpoints in memory."""
    plain = runs("plain", "--lr 1e-2").finish("--train-iters 4 --lr-decay-iters 10")
    skipping = runs("skipping", "--lr 1e-2 --iterations-to-skip 3").finish("--train-iters 4 --lr-decay-iters 10")
    assert {i: skipping.losses[i] for i in (1, 2)} == {i: plain.losses[i] for i in (1, 2)}
    assert set(skipping.losses) == {1, 2, 4}
    assert skipping.losses[4] != plain.losses[4]
    assert skipping.rates[4] == plain.rates[3]
    assert re.findall(r"consumed samples: +(\d+) ", skipping.output) == ["8", "16", "32"]
