# SPDX-License-Identifier: Apache-2.0
"""A soak in short: several real faults in one run of the bundled trainer, on two hosts where they can be emulated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.soak.hosts import hosts
from benchmarks.soak.judge import NOT_MET, RECOVERED, SURVIVED, differences, gaps
from benchmarks.soak.run import Run, reference
from benchmarks.soak.story import causes_restart, story
from benchmarks.soak.trainers import TRAINERS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

ITERATIONS = 36
DECK = ("LINK_DOWN", "STORE_FULL", "STORE_DELETED", "BIT_FLIP+SIGKILL", "SEGFAULT", "SIGSTOP_SIGCONT")


def test_training_with_faults_is_the_one_without_bit_for_bit(tmp_path: Path) -> None:
    trainer = TRAINERS["bundled"]
    with hosts(Path("/dev/shm") / f"moetion-soak-{os.getpid()}") as machines:
        faults = story(3, ITERATIONS, machines.left_out, DECK)
        expected = reference(machines, trainer, "", ITERATIONS, tmp_path / "reference")
        run = Run(machines, trainer, "full", ITERATIONS, faults, tmp_path / "run")
        run.train()
    assert differences(run.steps, expected["losses"], ITERATIONS) == []
    assert gaps(run.steps, run.starts) == []
    became = {fault.kind: run.outcomes[fault.number].outcome for fault in faults}
    assert NOT_MET not in became.values()
    assert {became[kind] for kind in became if causes_restart(kind)} == {RECOVERED}
    assert SURVIVED in became.values()
