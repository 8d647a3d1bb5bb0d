# SPDX-License-Identifier: Apache-2.0
"""Flags of Megatron-LM beside ``--moetion``, in Megatron's own ``pretrain()``: PP 2 x EP 2 on two emulated nodes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from jobs import KILLED, Nursery, logs, notes_in, places
from official_flags import MODEL, STAGES

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.training") is None, reason="this Megatron comes without its training loop"
    ),
]
WORLD_SIZE = 4
ALONE = 7
"""Exit code of a rank that leaves alone."""
RERUN, FAILED = 16, 17
"""Exit codes of Megatron's rerun state machine: to be run again elsewhere, and not to be trusted."""
BITS = "--bf16 --global-batch-size 8 --train-iters 13"
UNDER = "Megatron's own pretrain() under megatron_lm"
Act = tuple[int, int, str]
"""Rank, iteration, and what happens there: see ``megatron_lm_ranks``."""


class Run:
    """Attempts that share a run id, a store, and a folder for checkpoints; without a mode they train without ours."""

    def __init__(self, nursery: Nursery, folder: Path, flags: str, mode: str = "", store: Path | None = None) -> None:
        self._nursery, self._folder, self._store = nursery, folder, store
        self._flags = shlex.split(flags)
        if mode:
            self._flags += f"--moetion --moetion-mode {mode} --moetion-ranks-per-node 2 --moetion-run-id job".split()
            self._flags += f"--moetion-store {store} --moetion-timeout-s 30".split()
        self._attempts = 0
        self.losses: dict[int, set[str]] = {}
        """Every bit of the losses of each iteration, in all its executions."""
        self.output = ""
        """Of the last attempt."""

    def attempt(self, acts: Sequence[Act] = (), more: str = "") -> list[int]:
        """The exit codes."""
        folder = self._folder / str(self._attempts)
        folder.mkdir(parents=True)
        ranks = places(WORLD_SIZE, self._attempts)
        self._attempts += 1
        argv = [*self._flags, *more.split()]
        codes = self._nursery.launch(100, folder=str(folder), argv=argv, acts=acts, ranks=ranks)
        for step in notes_in(folder / "losses.jsonl"):
            self.losses.setdefault(step["iteration"], set()).add(step["loss"])
        self.output = "".join(p.read_text() for p in sorted(folder.glob("rank*.log")))
        return codes

    def end(self, acts: Sequence[Act], codes: set[int], more: str = "") -> None:
        """An attempt that ends with these codes."""
        assert set(self.attempt(acts, more)) == codes, logs(self._folder / str(self._attempts - 1))

    def lose_node_1(self) -> None:
        assert self._store is not None
        shutil.rmtree(self._store / "job" / "node1")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Nursery]:
    with Nursery("megatron_lm", start_limit_s=120) as nursery:
        yield nursery


def undisturbed(nursery: Nursery, folder: Path, flags: str) -> dict[int, set[str]]:
    """The losses of the same training without checkpoints and without a fault."""
    run = Run(nursery, folder, flags)
    run.end([], {0})
    return run.losses


@pytest.mark.proves(
    "Megatron's own pretrain() under megatron_lm, with --fp16, a batch size schedule and asynchronous saves", "recovery"
)
def test_fp16_a_growing_batch_and_megatrons_own_saves(ranks: Nursery, tmp_path: Path, store: Path) -> None:
    """It is left by ``--exit-duration-in-mins``, then a node is lost while Megatron may be saving.

    The loss scaler skips steps, and the batch grows before and after the fault.
    """
    flags = (
        f"{MODEL} {STAGES} --fp16 --initial-loss-scale 1048576 --loss-scale-window 3 --hysteresis 1 "
        "--step-batch-size-schedule '0:2 192:4 640:8' --train-samples 72 --eval-interval 3 --eval-iters 1"
    )
    saves = (
        f"--save {tmp_path / 'saved'} --load {tmp_path / 'saved'} --save-interval 4 --async-save "
        "--async-strategy mcore --non-persistent-save-interval 2 --non-persistent-ckpt-type global "
        "--exit-duration-in-mins 600"
    )
    expected = undisturbed(ranks, tmp_path / "undisturbed", flags)
    run = Run(ranks, tmp_path / "run", f"{flags} {saves} --moetion-save off", "full", store)
    run.end([(2, 5, "late")], {0})
    assert "exiting program after" in run.output
    run.end([(3, 9, "SIGKILL")], {KILLED})
    run.lose_node_1()
    run.end([], {0})
    assert "number of skipped iterations:   1" in run.output + (tmp_path / "run" / "0" / "rank0.log").read_text()
    assert re.search(r"iteration [78]: recovered, epoch 2.* \(disk holds iteration [68]\)", run.output), run.output
    assert run.losses == expected
    assert len(expected) == 17


@pytest.mark.proves(
    "Megatron's own pretrain() under megatron_lm, with virtual pipeline stages, left by a signal", "recovery"
)
def test_virtual_stages_and_every_way_to_leave(ranks: Nursery, tmp_path: Path, store: Path) -> None:
    """By a signal to one rank, on all; by ``sys.exit`` on one rank alone; by the loss of a node."""
    flags = f"{MODEL} {STAGES} {BITS} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --eval-interval 3 "
    flags += "--eval-iters 1"
    expected = undisturbed(ranks, tmp_path / "undisturbed", flags)
    run = Run(ranks, tmp_path / "run", f"{flags} --exit-signal-handler", "exact", store)
    run.end([(1, 4, "SIGTERM")], {0})
    assert "exiting program after receiving SIGTERM" in run.output
    codes = run.attempt([(1, 7, "leaves")])
    assert codes[1] == ALONE, run.output
    assert "iteration 4: recovered, epoch 1" in run.output, "the last snapshot was whole before the ranks left"
    left, gone = (float(re.findall(rf"{word} (\d+\.\d+)", run.output)[0]) for word in ("left", "gone"))
    assert gone - left < 5, "it waits for nobody"
    run.end([(3, 10, "SIGKILL")], {KILLED})
    run.lose_node_1()
    run.end([], {0})
    assert run.losses == expected
    assert set(expected) == set(range(1, 14))


@pytest.mark.proves(
    "Megatron's own pretrain() under megatron_lm, a step put off by the rerun state machine", "recovery"
)
def test_a_step_that_the_rerun_state_machine_has_put_off_is_run_again(
    ranks: Nursery, tmp_path: Path, store: Path
) -> None:
    """Memory has the state, and the checkpoint on disk what Megatron knows of the step: with one of both it would
    accept the result that it rejects."""
    flags = f"{MODEL} {STAGES} {BITS} --eval-interval 100 --eval-iters 0"
    saves = f"--save {tmp_path / 'saved'} --load {tmp_path / 'saved'} --save-interval 100"
    errors = "--error-injection-rate 24 --error-injection-type persistent_error"
    expected = undisturbed(ranks, tmp_path / "undisturbed", flags)
    run = Run(ranks, tmp_path / "run", f"{flags} {saves}", "full", store)
    run.end([], {RERUN}, errors)
    run.end([], {RERUN}, errors)
    assert "Got rescheduled on the same GPU" in run.output
    run.end([(rank, 0, "elsewhere") for rank in range(WORLD_SIZE)], {FAILED}, errors)
    assert "Possible persistent error!" in run.output
    run.end([], {0}, "--rerun-mode disabled")
    assert "recovered, epoch 3" in run.output
    assert run.losses == expected
