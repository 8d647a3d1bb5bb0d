# SPDX-License-Identifier: Apache-2.0
"""The bundled trainer, started again: with the same flags, with others, and after it died where it saves or ends."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery, content, logs, places

from megatron_moetion.pretrain.loop import UNHEALTHY_MAX

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 48 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --mock-data --eval-iters 0 "
    "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer --log-interval 1 --distributed-timeout-minutes 1"
)
MODES = ("full", "popularity --moetion-lost-token-budget 0", "exact --moetion-period 3")
WORLD_SIZE = 4


@dataclass(frozen=True)
class Attempt:
    codes: list[int]
    output: str
    """Of all ranks, rank 0 first."""
    metrics: list[dict[str, Any]]
    """Of this attempt."""

    @property
    def rates(self) -> dict[int, str]:
        """The learning rate after each iteration, as it is logged."""
        found = re.findall(r"iteration +(\d+)/.*learning rate: (\S+) \|", self.output)
        return {int(iteration): rate for iteration, rate in found}

    @property
    def losses(self) -> dict[int, tuple[str, float]]:
        """Every bit of each iteration's loss, and the gradients' norm."""
        return {m["iteration"]: (m["loss_hex"], m["grad_norm"]) for m in self.metrics if "loss_hex" in m}

    @property
    def evaluations(self) -> list[tuple[int, str]]:
        return [(m["iteration"], m["validation_loss_hex"]) for m in self.metrics if "validation_loss" in m]

    def lines(self, start: str) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(start)]


class Run:
    """Attempts that share a run id, a store and a folder."""

    def __init__(self, nursery: Nursery, folder: Path, store: Path, flags: str) -> None:
        self.folder, self.store = folder, store
        self._nursery = nursery
        self._flags = flags
        self.attempts = 0

    def attempt(
        self, flags: str = "", *, die_in_save: int | None = None, poison: tuple[int, int] | None = None
    ) -> Attempt:
        folder = self.folder / str(self.attempts)
        folder.mkdir(parents=True)
        where = f"--moetion-store {self.store} --moetion-run-id restarts" if "--moetion " in self._flags else ""
        argv = f"{MODEL} {self._flags} {where} --metrics-path {folder / 'metrics.jsonl'} {flags}".split()
        environments = places(WORLD_SIZE, self.attempts)
        self.attempts += 1
        faults = {"die_in_save": die_in_save, "poison": poison}
        codes = self._nursery.launch(100, folder=str(folder), argv=argv, ranks=environments, **faults)
        path = folder / "metrics.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        output = "".join(p.read_text() for p in sorted(folder.glob("rank*.log")))
        return Attempt(codes, output, metrics)

    def finish(self, flags: str = "") -> Attempt:
        done = self.attempt(flags)
        assert done.codes == [0] * WORLD_SIZE, logs(self.folder / str(self.attempts - 1))
        return done


@pytest.fixture(scope="module")
def trainers() -> Iterator[Nursery]:
    found = Nursery("trainer")
    yield found
    found.close()


@pytest.fixture
def runs(trainers: Nursery, tmp_path: Path, store: Path) -> Any:
    """Makes runs; the mode is empty for one without in-memory checkpoints."""
    made: list[Run] = []

    def make(mode: str, flags: str) -> Run:
        moetion = f"--moetion --moetion-mode {mode} --moetion-ranks-per-node 2" if mode else ""
        name = f"run{len(made)}"
        made.append(Run(trainers, tmp_path / name, store / name, f"{moetion} {flags}"))
        return made[-1]

    return make


# -- other flags ----------------------------------------------------------------------------------------------------

NEW_SCHEDULE = "--lr 2e-3 --lr-decay-style cosine --min-lr 1e-3"
OLD_RATES = {6: "4.000000E-03", 7: "3.000000E-03", 8: "2.000000E-03", 9: "1.000000E-03", 10: "0.000000E+00"}
NEW_RATES = dict(enumerate(("1.345492E-03", "1.206107E-03", "1.095492E-03", "1.024472E-03", "1.000000E-03"), start=6))
LISTED = (
    "> flags changed since the last start: --lr 0.01 -> 0.002, --min-lr 0.0 -> 0.001, --lr-decay-style linear -> cosine"
)


@pytest.mark.parametrize("mode", MODES)
def test_another_schedule_acts_as_given_and_another_model_is_refused(runs: Any, mode: str) -> None:
    """The rates are those of the new schedule from its own beginning; a refusal changes nothing for the old flags."""
    run = runs(mode, "--lr 1e-2")
    run.finish("--exit-interval 5")
    kept = run.store.with_name("kept")
    shutil.copytree(run.store, kept)

    def restart(flags: str = "") -> Attempt:
        """From what the first attempt left."""
        shutil.rmtree(run.store)
        shutil.copytree(kept, run.store)
        return run.finish(flags)

    refused = run.attempt("--num-attention-heads 4 --seed 99")
    assert refused.codes == [2] * WORLD_SIZE
    (error,) = refused.lines("error: ")
    assert "--num-attention-heads 2 -> 4, --seed 1234 -> 99" in error
    assert refused.losses == {}
    assert content(run.store).keys() == content(kept).keys()
    same = run.finish()
    assert same.rates == OLD_RATES
    assert same.lines("> flags") == []
    assert "settings that differ" not in same.output
    assert same.losses == restart().losses, "bitwise as without the refused start"
    other = restart(NEW_SCHEDULE)
    assert other.rates == NEW_RATES
    assert other.lines("> flags") == [LISTED]
    assert len(re.findall("settings that differ .* act from here on: max_lr 0.01 -> 0.002,", other.output)) == 1


@pytest.mark.parametrize("gradients", ["", "--grad-reduce-in-bf16"])
def test_replayed_steps_are_taken_with_the_settings_of_their_time(runs: Any, gradients: str) -> None:
    """Mode ``exact`` goes back to 7 and replays steps; only those after it have the new settings.

    A run in mode ``full`` replays none, so its steps after 7 show what is right.
    """
    new = f"{NEW_SCHEDULE} --adam-beta1 0.8 --adam-beta2 0.99 --adam-eps 1e-6 --weight-decay 0.1 --clip-grad 0.01"
    found = []
    for mode in ("full", "exact --moetion-period 3"):
        run = runs(mode, f"--lr 1e-2 --clip-grad 0.05 {gradients}")
        run.finish("--exit-interval 7")
        last = run.finish(new)
        assert (
            "--weight-decay 0.01 -> 0.1, --clip-grad 0.05 -> 0.01, --adam-beta1 0.9 -> 0.8" in last.lines("> flags")[0]
        )
        assert min(last.losses) == 8
        found.append(last.losses)
    assert found[0] == found[1]


def test_a_fault_soon_after_other_settings_replays_steps_of_both(runs: Any) -> None:
    new = f"{NEW_SCHEDULE} --adam-beta1 0.8 --weight-decay 0.1"
    run = runs("exact --moetion-period 3", "--lr 1e-2")
    run.finish("--exit-interval 5")
    copy = run.store.with_name("copy")
    shutil.copytree(run.store, copy)
    whole = run.finish(new).losses
    shutil.rmtree(run.store)
    copy.rename(run.store)
    fault = f"{new} --moetion-inject-fault {run.attempts}:2:7:before-select"
    assert -9 in run.attempt(fault).codes
    again = run.finish(new)
    assert min(again.losses) in (7, 8)
    assert again.losses == {i: v for i, v in whole.items() if i >= min(again.losses)}
    assert again.lines("> flags") == []


@pytest.mark.parametrize("mode", ["", MODES[0]])
def test_another_batch_size_keeps_the_place_in_data_and_schedule(runs: Any, tmp_path: Path, mode: str) -> None:
    """From disk as well as from memory: five iterations of ten are done, whatever a batch is."""
    saved = f"--save {tmp_path / 'saved'} --load {tmp_path / 'saved'}" if not mode else ""
    run = runs(mode, f"--lr 1e-2 {saved}")
    run.finish("--exit-interval 5" if mode else "--train-iters 5 --lr-decay-iters 10")
    last = run.finish("--global-batch-size 16")
    assert last.rates == OLD_RATES
    assert "--global-batch-size 8 -> 16" in last.lines("> flags")[0]
    consumed = re.findall(r"consumed samples: +(\d+) ", last.output)
    assert consumed == ["56", "72", "88", "104", "120"]


def test_a_checkpoint_on_disk_gives_way_to_the_flags_as_well(runs: Any, tmp_path: Path) -> None:
    run = runs("", f"--save {tmp_path / 'saved'} --load {tmp_path / 'saved'}")
    run.finish("--lr 1e-2 --train-iters 5 --lr-decay-iters 10")
    before = (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text()
    refused = run.attempt("--lr 1e-2 --num-attention-heads 4 --seed 99")
    assert refused.codes == [2] * WORLD_SIZE
    assert "the checkpoint is of another model: --num-attention-heads 2 -> 4. Go back" in refused.lines("error: ")[0]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == before
    other = run.finish(f"{NEW_SCHEDULE} --adam-beta1 0.8 --seed 99")
    assert other.rates == NEW_RATES
    (line,) = other.lines("> flags changed since the checkpoint was saved: ")
    assert "--seed 1234 -> 99, --lr 0.01 -> 0.002" in line


# -- where a run dies -----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_cut_short_is_written_by_the_restart(runs: Any, tmp_path: Path) -> None:
    """Killed while it saves 6, of which memory has a snapshot: 6 is saved before training goes on, and not again."""
    saved = tmp_path / "saved"
    run = runs(MODES[0], f"--lr 1e-2 --save {saved} --save-interval 3")
    first = run.attempt(die_in_save=6)
    assert -9 in first.codes
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (saved / "iter_0000006").is_dir()
    last = run.finish()
    assert "recovered" in last.output
    assert re.findall(r"saved the checkpoint of iteration (\d+)", last.output) == ["6", "9", "10"]
    shutil.rmtree(run.store)
    (saved / "latest_checkpointed_iteration.txt").write_text("6")
    resumed = runs("", f"--lr 1e-2 --load {saved}").finish()
    assert resumed.losses == {i: v for i, v in last.losses.items() if i > 6}


def test_what_was_saved_and_evaluated_at_the_end_is_not_repeated(runs: Any, tmp_path: Path) -> None:
    """Killed before the tracker has the last checkpoint: the same state, saved once; evaluated once, by the first."""
    saved = tmp_path / "saved"
    flags = f"--lr 1e-2 --save {saved} --eval-iters 1 --eval-interval 5"
    run = runs(MODES[0], flags)
    first = run.attempt(die_in_save=10)
    assert -9 in first.codes
    assert [iteration for iteration, _ in first.evaluations] == [5, 10]
    second = run.finish()
    assert second.evaluations == []
    assert re.findall(r"saved the checkpoint of iteration (\d+)", second.output) == ["10"]
    third = run.finish()
    assert (third.evaluations, third.losses) == ([], {})
    assert "saved the checkpoint" not in third.output


# -- a state that is lost -------------------------------------------------------------------------------------------


def test_after_recoveries_in_vain_the_checkpoint_on_disk_is_taken_and_the_run_is_as_if_nothing_had_happened(
    runs: Any, tmp_path: Path
) -> None:
    """Killed in iteration 6 each time. What memory has is newer than what disk has, and is given up in the end."""
    run = runs(MODES[0], f"--lr 1e-2 --save {tmp_path / 'saved'} --load {tmp_path / 'saved'} --save-interval 4")
    killed = [run.attempt(f"--moetion-inject-fault {run.attempts}:2:6:before-select")]
    while "without getting further" not in killed[-1].output:
        assert len(killed) < 6
        killed.append(run.attempt(f"--moetion-inject-fault {run.attempts}:2:6:before-select"))
    assert "which memory holds, 3 times without getting further" in killed[-1].output
    assert sum("recovered, epoch" in attempt.output for attempt in killed) == len(killed) - 2
    assert min(killed[-1].losses) == 5, "from disk"
    last = run.finish()
    assert "without getting further" not in last.output
    undisturbed = runs("", "--lr 1e-2").finish()
    assert last.losses == {i: v for i, v in undisturbed.losses.items() if i in last.losses}
    assert max(last.losses) == 10


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_no_number_is_not_what_a_restart_begins_with(runs: Any, mode: str) -> None:
    """After iteration 5 one rank has a NaN, and all hear of it in the next loss."""
    run = runs(mode, "--lr 1e-2")
    poisoned = run.attempt(poison=(1, 5))
    assert 4 in poisoned.codes, (poisoned.codes, poisoned.output[-3000:])
    assert set(poisoned.codes) <= {4, -9}
    assert max(poisoned.losses) == 5 + UNHEALTHY_MAX
    assert len(re.findall("the loss or the gradients of this iteration are not healthy", poisoned.output)) <= 2
    healed = run.finish()
    assert min(healed.losses) == 5
    if not mode.startswith("popularity"):
        undisturbed = runs(mode, "--lr 1e-2").finish()
        assert healed.losses == {i: v for i, v in undisturbed.losses.items() if i >= 5}
