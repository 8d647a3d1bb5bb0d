# SPDX-License-Identifier: Apache-2.0
"""The soak's story and judgement: from a seed, and from what was written down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from benchmarks.soak import tables
from benchmarks.soak.hosts import fill, ports_of
from benchmarks.soak.judge import (
    NOT_MET,
    OVERTAKEN,
    RECOVERED,
    SURVIVED,
    Start,
    differences,
    gaps,
    outcome_of,
    wrong_hashes,
)
from benchmarks.soak.run import MISSED_AFTER, Run, flip
from benchmarks.soak.story import APART, DECK, FIRST, HURTS_MEMORY, NEEDS_TESTBED, Fault, story
from benchmarks.soak.trainers import TRAINERS, Lines, Step, read_steps
from megatron_moetion.observe.fault import KINDS, parse_faults

LONG = 1200


def test_a_seed_has_one_story_and_another_seed_another() -> None:
    assert story(3, LONG, ()) == story(3, LONG, ())
    assert story(3, LONG, ()) != story(4, LONG, ())


@pytest.mark.parametrize("seed", range(20))
def test_a_story_keeps_its_rules(seed: int) -> None:
    faults = story(seed, LONG, ())
    assert {fault.kind for fault in faults} == set(DECK)
    assert [fault.number for fault in faults] == list(range(len(faults)))
    own = [fault.iteration for fault in faults if not fault.in_recovery]
    assert own == sorted(set(own))
    assert own[0] >= FIRST
    assert own[-1] <= LONG - FIRST
    hurt = [fault for fault in faults if fault.kind in HURTS_MEMORY]
    for before, after in pairwise(hurt):
        assert before.host == after.host or after.iteration - before.iteration >= APART
    for fault in faults:
        assert (fault.point != "") == (fault.inside != "")
        parse_faults(",".join(f"0:{coordinate}" for coordinate in fault.coordinates))
    assert {fault.host for fault in faults} == {0, 1}
    assert set(KINDS) <= {fault.inside for fault in faults}


def test_what_cannot_be_done_here_is_left_out() -> None:
    kinds = Counter(fault.kind for fault in story(1, LONG, NEEDS_TESTBED))
    assert not NEEDS_TESTBED & set(kinds)
    assert set(kinds) == set(DECK) - NEEDS_TESTBED


def steps(*at: tuple[int, float], attempt: int = 0) -> list[Step]:
    return [Step(iteration=i, loss=f"loss{i}", time_s=t, attempt=attempt) for i, t in at]


KILL = Fault(number=0, kind="SIGKILL", iteration=12, ranks=(3,), point="mid-pack")
STOP = Fault(number=1, kind="SIGSTOP_SIGCONT", iteration=12, ranks=(3,), point="mid-pack", seconds=2.0)
BEFORE = steps((10, 100.0), (11, 101.0), (12, 102.0))


def test_a_recovery_lasts_until_the_first_step_after_it() -> None:
    after = steps((12, 110.0), (13, 111.0), attempt=1)
    assert outcome_of(KILL, 102.5, 102.5, BEFORE, []) is None
    assert outcome_of(KILL, 102.5, 102.5, BEFORE, [Start(time_s=108.0, iteration=11)]) is None
    found = outcome_of(KILL, 102.5, 102.5, BEFORE + after, [Start(time_s=108.0, iteration=11)])
    assert found is not None
    assert (found.outcome, found.seconds, found.lost_iterations, found.iteration) == (RECOVERED, 7.5, 1, 12)


def test_a_start_that_dies_before_its_first_step_is_no_recovery() -> None:
    died = Start(time_s=108.0, iteration=11)
    after = steps((10, 120.0), attempt=2)
    found = outcome_of(KILL, 102.5, 102.5, BEFORE + after, [died, Start(time_s=118.0, iteration=9)])
    assert found is not None
    assert (found.seconds, found.lost_iterations) == (17.5, 3)


def test_a_fault_is_survived_where_training_goes_on_after_it() -> None:
    late = steps((13, 105.0), (14, 105.5))
    assert outcome_of(STOP, 102.5, 104.5, BEFORE + late, []) is None
    found = outcome_of(STOP, 102.5, 104.5, BEFORE + late + steps((15, 106.0)), [])
    assert found is not None
    assert (found.outcome, found.seconds) == (SURVIVED, 3.0)
    assert outcome_of(STOP, 102.5, None, BEFORE + late + steps((15, 106.0)), []) is None, "it is not over"
    assert outcome_of(KILL, 102.5, 102.5, BEFORE + late + steps((15, 106.0)), []) is None, "nobody survives that"


def test_the_restart_of_the_next_fault_is_not_a_recovery_from_one_that_needs_none() -> None:
    after, starts = steps((12, 110.0), attempt=1), [Start(time_s=108.0, iteration=11)]
    overtaken = outcome_of(STOP, 102.5, 104.5, BEFORE + after, starts, next_s=105.0)
    assert overtaken is not None
    assert (overtaken.outcome, overtaken.seconds) == (OVERTAKEN, None)
    by_itself = outcome_of(STOP, 102.5, 104.5, BEFORE + after, starts, next_s=120.0)
    assert by_itself is not None
    assert by_itself.outcome == RECOVERED
    twice = outcome_of(KILL, 102.5, 102.5, BEFORE + after, starts, next_s=105.0)
    assert twice is not None
    assert twice.outcome == RECOVERED


def test_every_execution_counts_and_no_iteration_may_be_missing() -> None:
    reference = {i: f"loss{i}" for i in range(1, 5)}
    run = steps((1, 1.0), (2, 2.0), (3, 3.0))
    assert differences([*run, *steps((2, 8.0), (3, 9.0), (4, 10.0))], reference, 4) == []
    other = Step(iteration=2, loss="another", time_s=4.0, attempt=0)
    assert differences([run[0], other, *run[1:]], reference, 3) == ["iteration 2 in attempt 0: loss another, not loss2"]
    assert differences(run, reference, 4) == ["iterations [4] were never trained"]
    assert wrong_hashes([(10, "a"), (20, "b")], {10: "a", 20: "c"}) == ["state after iteration 20: b, not c"]


def test_training_goes_on_with_the_next_iteration_or_where_a_start_says() -> None:
    run = steps((1, 1.0), (1, 1.1), (2, 2.0), (3, 3.0), (2, 8.0))
    assert gaps(run, [Start(time_s=5.0, iteration=1)]) == []
    assert gaps(run, []) == ["iteration 2 came after 3"]
    assert gaps(steps((1, 1.0), (3, 3.0)), []) == ["iteration 3 came after 1"]


def test_a_fault_that_strikes_late_is_not_one_that_was_missed(tmp_path: Path) -> None:
    """Its point came in no iteration for long; the rank that has it strikes where it comes at last."""
    fault = Fault(number=0, kind="SIGKILL", iteration=6, ranks=(1,), point="mid-pack")
    run = Run(None, TRAINERS["bundled"], "full", 99, [fault], tmp_path / "run")  # type: ignore[arg-type]
    run.steps.append(Step(iteration=6 + MISSED_AFTER, loss="", time_s=10.0, attempt=0))
    run._settle()
    assert run.outcomes[0].outcome == NOT_MET
    said = tmp_path / "run" / "host0.log"
    for kind in ("SIGTERM", "SIGKILL"):
        with said.open("a") as log:
            log.write(f"[moetion] rank 1 iteration 40: injected {kind} at mid-pack, pid 7, 11.000\n")
        run._look()
        assert (0 in run.outcomes) == (kind == "SIGTERM"), "another kind is another fault"


def test_a_line_that_is_cut_short_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = Lines(path)
    assert lines.new() == []
    path.write_text("one\ntw")
    assert lines.new() == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert lines.new() == ["two"]
    assert lines.new() == []


def test_steps_are_read_and_validation_is_not() -> None:
    lines = ['{"iteration": 3, "loss_hex": "0x1", "time": 5.0, "attempt": 1}', '{"iteration": 3, "validation_loss": 1}']
    assert read_steps(TRAINERS["bundled"], lines) == [Step(iteration=3, loss="0x1", time_s=5.0, attempt=1)]


def test_bits_are_flipped_in_the_files_and_nowhere_else(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(bytes(4096))
    flip(files, 9, Random(1))
    ones = sum(byte.bit_count() for file in files for byte in file.read_bytes())
    assert ones == 9
    assert [file.stat().st_size for file in files] == [4096, 4096]


def test_ports_of_a_process_are_those_it_listens_on_for_everybody() -> None:
    code = (
        "import socket, sys\n"
        "all_, own = socket.create_server(('', 0)), socket.create_server(('127.0.0.1', 0))\n"
        "print(all_.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert ports_of([process.pid]) == [port]
        process.kill()


RECORD = {
    "ended": True, "stuck": None, "cut_short": False, "wrong": [], "iterations": 40, "steps": 40, "hashes": 4,
    "faults": [
        {"kind": "SIGKILL", "outcome": "recovered", "seconds": 4.0, "lost_iterations": 1},
        {"kind": "SIGKILL", "outcome": "recovered", "seconds": 6.0, "lost_iterations": 2},
        {"kind": "LINK_DOWN", "outcome": "survived", "seconds": 3.0, "lost_iterations": None},
        {"kind": "SEGFAULT", "outcome": "not met", "seconds": None, "lost_iterations": None},
    ],
}  # fmt: skip


def test_faults_are_told_by_kind_and_only_those_that_happened() -> None:
    figures = {result.name: result for result in tables.figures([RECORD])}
    assert figures["faults"].value == 3
    assert figures["SIGKILL: until the first step, median"].value == 5.0
    assert figures["LINK_DOWN: until the first step, median"].value is None
    assert "SEGFAULT: faults" not in figures
    assert "| `SIGKILL` | 2 | 2: 5.0 (6.0) | 2 (2) |  |" in tables.table([RECORD])
    assert "| `LINK_DOWN` | 1 |  |  | 1: 3.0 |" in tables.table([RECORD])


def test_a_difference_and_a_stuck_run_miss_their_target() -> None:
    bad = RECORD | {"ended": False, "stuck": "nothing has moved", "wrong": ["iteration 2 ..."]}
    missed = {result.name for result in tables.figures([RECORD, bad]) if result.met is False}
    assert missed == {
        "faults", "losses and state hashes that differ from the run without faults",
        "faults after which training did not go on",
    }  # fmt: skip


def test_a_fault_that_nothing_came_of_misses_the_target_unless_the_run_was_cut_short() -> None:
    fault = {"kind": "SIGINT", "outcome": "open", "iteration": 39, "seconds": None, "lost_iterations": None}
    dangling = RECORD | {"faults": [fault]}
    assert tables.happened([dangling]) == []
    assert tables.open_ends([dangling]) == 1
    assert tables.open_ends([RECORD | {"faults": [fault | {"iteration": 40}]}]) == 0, "all iterations were done"
    assert tables.open_ends([dangling | {"cut_short": True, "ended": False}]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_all_room_is_taken(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from benchmarks.soak.hosts import fill\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'small', sys.argv[1]], check=True)\n"
        "fill(Path(sys.argv[1]) / 'filled')\n"
        "try: Path(sys.argv[1], 'more').write_bytes(bytes(1))\n"
        "except OSError as error: print(error.errno)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), str(Path(tables.__file__).parents[2])]
    done = subprocess.run(["unshare", "--mount", *argv], capture_output=True, text=True, timeout=60)
    if "Operation not permitted" in done.stderr:
        pytest.skip("mounts are not allowed here")
    assert done.stdout.split() == ["28"], done.stderr
    assert fill.__doc__
