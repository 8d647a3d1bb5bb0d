# SPDX-License-Identifier: Apache-2.0
"""The runtime under faults in a simulated cluster: a fixed set of seeds, a fresh one, and proof that it can fail."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutations import MUTATIONS, look_for

from megatron_moetion.sim.faults import KINDS
from megatron_moetion.sim.story import Story

ROOT = Path(__file__).parents[2]
FIXED = (
    (1, 4, "full", "whole"), (2, 4, "popularity", "whole"), (3, 4, "exact", "whole"), (4, 8, "any", "whole"),
    (1, 4, "full", "fragments"), (3, 5, "popularity", "fragments"),
    (1, 6, "any", "whole"),  # a newer checkpoint on disk when memory is lost
    (4000119, 5, "any", "whole"),  # a report that takes redundancy back, which one rank has not come to
    (25, 6, "any", "whole"), (58, 6, "any", "whole"),  # copies that were damaged long before their owners are lost
)  # fmt: skip
"""Seed, ranks, mode, copies."""
ON_DEVICE = (
    (6, 4, "full"), (7, 4, "popularity"), (8, 4, "exact"),
    (4000232, 6, "any"),  # a bit flips while verified bytes are on their way to a device
)  # fmt: skip
DOMAINS = ((5, 8, "full", 4, "whole"), (4, 8, "full", 4, "fragments"))
"""Seed, ranks, mode, failure domains, copies."""
FOUND = {each["mutation"]: each for each in json.loads((Path(__file__).parent / "mutations_found.json").read_text())}
QUICK = (
    "a recovery does not begin an epoch",
    "the oldest iteration is chosen, not the newest",
    "T follows the last result, also back",
    "the optimizer does not wait for the copy",
    "copies of a state share a failure domain",
    "one loss more is said to be survived than fragments are left for",
    "holders that lack fragments get none in a recovery",
    "training's stream does not wait for the copies that read live state",
    "chains end one iteration too early",
)
"""Mutations that the first seed finds within a second or two."""


def simulate(*flags: str, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-m", "megatron_moetion.cli", "simulate", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "ranks", "mode", "copies"), FIXED)
def test_no_promise_is_broken_under_faults(seed: int, ranks: int, mode: str, copies: str) -> None:
    story = Story(seed=seed, ranks=ranks, mode=mode, copies=copies)
    assert (story.shape.coding_nodes > 0) == (copies == "fragments")
    outcome = story.play()
    assert outcome.problem is None, f"{story.line}\n" + "\n".join(outcome.story[-30:])
    assert outcome.faults.total() >= 30, "faults take place"
    assert outcome.attempts > 3, "and end processes"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "ranks", "mode"), ON_DEVICE)
def test_no_promise_is_broken_where_state_lies_on_devices(seed: int, ranks: int, mode: str) -> None:
    story = Story(seed=seed, ranks=ranks, mode=mode, faults=40, state="device")
    outcome = story.play()
    assert outcome.problem is None, f"{story.line}\n" + "\n".join(outcome.story[-30:])
    assert outcome.faults.total() >= 20, "faults take place"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "ranks", "mode", "domains", "copies"), DOMAINS)
def test_the_loss_of_a_failure_domain_costs_nothing(
    seed: int, ranks: int, mode: str, domains: int, copies: str
) -> None:
    kinds = ("lose-domain", "lose-node", "kill", "move")
    story = Story(seed=seed, ranks=ranks, mode=mode, copies=copies, faults=12, kinds=kinds, domains=domains)
    outcome = story.play()
    assert outcome.problem is None, f"{story.line}\n" + "\n".join(outcome.story[-30:])
    assert outcome.faults["lose-domain"] >= 2, outcome.faults


@pytest.mark.timeout(300)
def test_a_fresh_seed() -> None:
    story = Story(seed=random.SystemRandom().randrange(1 << 30), ranks=4, copies="any")
    outcome = story.play()
    assert outcome.problem is None, f"{story.line}\n" + "\n".join(outcome.story[-30:])


@pytest.mark.timeout(300)
def test_one_seed_is_one_order_of_events_in_any_process() -> None:
    flags = ("--first", "5", "--seeds", "1", "--ranks", "2", "--faults", "8", "--json")
    first, second = simulate(*flags, hash_seed=1), simulate(*flags, hash_seed=2)
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stdout + second.stderr
    assert first.stdout == second.stdout
    document: dict[str, Any] = json.loads(first.stdout)
    assert len(document["traces"]) == 1
    assert document["failures"] == []
    assert document["fault_events"] == sum(document["by_kind"].values()) > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_of_our_own_is_found(name: str) -> None:
    mutation = next(m for m in MUTATIONS if m.name == name)
    seed = FOUND[name]["seed"]
    found = look_for(mutation, range(seed, seed + 1), ranks=4, limit_s=200.0)
    assert found.get("problem"), found


def test_every_mutation_has_its_place_and_a_seed_that_found_it() -> None:
    for mutation in MUTATIONS:
        assert mutation.mutated() != (ROOT / "megatron_moetion" / mutation.file).read_text()
        assert not set(filter(None, mutation.kinds.split(","))) - KINDS.keys()
    assert {m.name for m in MUTATIONS} == FOUND.keys()
    assert all(each["seed"] is not None for each in FOUND.values())


def test_a_failure_is_shortened_and_repeated_from_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_moetion.cli import main
    from megatron_moetion.sim import story as module
    from megatron_moetion.sim.run import Outcome

    def run(seed: int, shape: Any, faults: Any) -> Outcome:
        """Fails where two faults that belong together both take place."""
        kinds = [fault.kind for fault in faults]
        problem = "Violation: of old" if kinds.count("kill") and kinds.count("flip") else None
        return Outcome(problem=problem, trace=1, attempts=1)

    monkeypatch.setattr(module, "run", run)
    assert (
        main(["simulate", "--seeds", "1", "--first", "8", "--faults", "40", "--kinds", "kill,flip,stop", "--json"]) == 1
    )
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    kept = failure["shortest"].partition("--keep ")[2].split(",")
    assert len(kept) == 2
    assert main([*failure["shortest"].split()[1:], "--no-shrink"]) == 1
    assert "Violation: of old" in capsys.readouterr().out
    assert not logging.root.manager.disable, "whoever called it logs again"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks", "1"], "--ranks is from 2 to 64"),
        (["--keep", "1,x"], "numbers of faults"),
        (["--keep", "99"], "0 to 59"),
        (["--kinds", "flood"], "no kind of fault"),
        (["--kinds", "lose-domain"], "needs --domains"),
        (["--domains", "-1"], "must not be negative"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_moetion.cli import main

    assert main(["simulate", *flags]) == 2
    assert said in capsys.readouterr().err
