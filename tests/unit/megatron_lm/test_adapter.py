# SPDX-License-Identifier: Apache-2.0
"""What one rank does at each call of Megatron's training loop; a double stands for the loop, and one for the run."""

from __future__ import annotations

import argparse
import math
import random
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore import rng
from megatron_moetion.megatron_lm.adapter import Adapter, LoopState, is_healthy
from megatron_moetion.megatron_lm.flags import newest_on_disk, refuse, takes_part
from megatron_moetion.pretrain.flags import record

ARGS = {
    "moetion": True, "moetion_mode": "full", "load": None, "finetune": False, "save": None, "save_interval": None,
    "iteration": 0, "num_floating_point_operations_so_far": 0, "consumed_train_samples": 0, "ckpt_step": None,
    "consumed_valid_samples": 0, "skipped_train_samples": 0, "distributed_timeout_minutes": 1,
}  # fmt: skip


class Attached:
    """A run that remembers what it is told."""

    def __init__(self, memory: dict[str, Any] | None) -> None:
        self.memory = memory
        self.told: list[Any] = []
        self.baseline: dict[str, Any] | None = None
        fabric = types.SimpleNamespace(reduce=lambda value, both: value)
        self.session = types.SimpleNamespace(running=types.SimpleNamespace(fabric=fabric))
        self.pipeline_arguments = {"p2p_communicator": "watched", "pg_collection": "groups"}
        self.writes_checkpoints = False

    def __call__(self, **arguments: Any) -> Attached:
        self.arguments = arguments
        self.state: LoopState = arguments["user_state"]
        return self

    def start(self, load_persistent: Callable[[], int | None], newest_persistent: Callable[[], int | None]) -> Any:
        newest = newest_persistent()
        if self.memory is not None and (newest or -1) <= self.memory["iteration"]:
            self.state.load_state_dict(self.memory)
            return types.SimpleNamespace(iteration=self.memory["iteration"])
        self.told.append(("loaded", load_persistent()))
        self.baseline = self.state.state_dict()
        return None

    def on_step_end(self, iteration: int, *, healthy: bool = True, stepped: bool = True) -> None:
        self.told.append((iteration, healthy, stepped, self.state.state_dict()["consumed_train_samples"]))

    def drain(self) -> None:
        self.told.append("drain")

    def close(self) -> None:
        assert sys.exc_info()[0] is None, "while an exception is handled the real one does not wait either"
        self.told.append("close")

    def abandon(self) -> None:
        self.told.append("abandon")


class Loop:
    """``megatron.training.training``: an iteration consumes 8 samples and costs 100 operations."""

    def __init__(
        self, official: bool = True, ends: BaseException | None = None, decided: str = "", **args: Any
    ) -> None:
        """``ends``: what is raised after the last iteration; ``decided``: by whom, ``step`` or ``exit``, if at all."""
        self.args = argparse.Namespace(**{**ARGS, **args})
        self.module: Any = types.ModuleType("training")
        self.module.get_args = lambda: self.args
        self.module.load_checkpoint = self.load_checkpoint
        self.module.update_num_microbatches = lambda **call: self.calls.append(("batch", call["consumed_samples"]))
        self.module.save_checkpoint = lambda iteration, *a, **k: self.calls.append(("saved", iteration))
        self.module.train = self.train if official else self.older_train
        self.calls: list[Any] = []
        self.on_disk = 0
        self.iterations = range(1, 4)
        self.skipped: set[int] = set()
        self.losses: dict[int, float] = {}
        self.ends = ends
        self.saves_locally_at = 0
        self.writes_checkpoints = False
        self.decided = decided
        self.adapter: Any = None

    def load_checkpoint(self, model: Any, checkpointing_context: Any = None) -> tuple[int, int]:
        self.calls.append(("load", model, checkpointing_context))
        return self.on_disk, self.on_disk * 100

    def setup(self, model_type: Any, checkpointing_context: Any = None) -> tuple[Any, Any, Any]:
        if self.args.load is not None:
            loaded = self.module.load_checkpoint(["model"], checkpointing_context=checkpointing_context)
            self.args.iteration, self.args.num_floating_point_operations_so_far = loaded
        return ["model"], "optimizer", "scheduler"

    def train(
        self, model: Any, optimizer: Any, opt_param_scheduler: Any, train_data_iterator: Any,
        checkpointing_context: Any, p2p_communicator: Any = None, pg_collection: Any = None,
    ) -> Any:  # fmt: skip
        self.calls.append(("train", p2p_communicator, pg_collection))
        operations = self.args.num_floating_point_operations_so_far
        for iteration in self.iterations:
            if iteration in self.skipped:
                self.adapter.dummy_train_step(lambda data: None, "data")
                self.args.consumed_train_samples += 8
                continue
            leaves = self.decided == "step" and iteration == self.iterations[-1]
            self.adapter.train_step(self.step, self.losses.get(iteration, 1.0), leaves)
            if leaves:
                if self.args.save_interval:
                    self.adapter.save_checkpoint_and_time(self.save_and_time, iteration, "model")
                break
            self.args.consumed_train_samples += 8
            operations += 100
            self.adapter.checkpoint_and_decide_exit(self.decide, "model", iteration, operations)
        if self.ends is not None:
            raise self.ends
        return iteration, operations

    def older_train(
        self, model: Any, optimizer: Any, opt_param_scheduler: Any, train_data_iterator: Any, checkpointing_context: Any
    ) -> Any:
        return self.train(model, optimizer, opt_param_scheduler, train_data_iterator, checkpointing_context)

    @staticmethod
    def step(loss: float, leaves: bool) -> tuple[Any, ...]:
        return {"lm loss": loss}, 0, leaves, leaves, 16 if leaves else 0, 2.0, None, 0

    def decide(self, model: Any, iteration: int, num_floating_point_operations_so_far: int) -> bool:
        self.calls.append(("decide", iteration))
        if self.args.save_interval and iteration % self.args.save_interval == 0:
            self.adapter.save_checkpoint_and_time(self.save_and_time, iteration, model)
        if iteration == self.saves_locally_at:
            self.adapter.save_checkpoint_and_time(self.save_and_time, iteration, model, non_persistent_ckpt=True)
        return self.decided == "exit" and iteration == self.iterations[-1]

    def save_and_time(self, iteration: int, model: Any, non_persistent_ckpt: bool = False) -> None:
        self.calls.append(("saved in time", iteration, non_persistent_ckpt))

    def run(self, memory: dict[str, Any] | None = None, between: Callable[[], Any] = lambda: None) -> Attached:
        attached = Attached(memory)
        attached.writes_checkpoints = self.writes_checkpoints
        self.adapter = Adapter(self.module, attached)
        self.adapter.setup_model_and_optimizer(self.setup, "type", checkpointing_context="context")
        between()  # data loaders are built
        self.adapter.train(self.module.train, ["model"], "optimizer", "scheduler", "data", "context")
        return attached


@pytest.fixture(autouse=True)
def python_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for all generators: the real ones are on a device."""
    monkeypatch.setattr(rng, "rng_states", random.getstate)
    monkeypatch.setattr(rng, "load_rng_states", random.setstate)


def in_memory(iteration: int, **state: Any) -> dict[str, Any]:
    samples = {"consumed_train_samples": 8 * iteration, "consumed_valid_samples": 3, "skipped_train_samples": 0}
    flags = record(argparse.Namespace(**ARGS))
    return {
        "flags": flags,
        "iteration": iteration,
        "operations": 100.0 * iteration,
        "has_loaders": True,
        **samples,
        **state,
    }


def test_a_run_from_the_beginning_tells_each_iteration_before_training_decides_to_leave() -> None:
    loop = Loop()
    attached = loop.run()
    assert attached.told == [("loaded", None), (1, True, True, 8), (2, True, True, 16), (3, True, True, 24), "close"]
    assert attached.arguments["model"] == ["model"]
    assert attached.arguments["config"].mode == "full"
    assert attached.state.state_dict() == {**in_memory(3), "consumed_valid_samples": 0}


def test_flags_that_make_a_run_what_it_is_must_stay_and_others_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A restart from memory is compared with the start before, as with the bundled trainer."""
    began = {"seed": 1, "moe_router_topk": 2, "lr": 1e-3, "moe_layer_freq": [0, 1]}
    memory = {**in_memory(3), "flags": record(argparse.Namespace(**began))}
    with caplog.at_level("WARNING"):
        Loop(**{**began, "lr": 2e-3}).run(memory)
    assert "flags changed since the last start: --lr 0.001 -> 0.002" in caplog.text
    for name, value in (("seed", 7), ("moe_router_topk", 1)):
        with pytest.raises(ConfigError, match=f"{name.replace('_', '-')} {began[name]} -> {value}"):
            Loop(**{**began, name: value}).run(memory)


def test_memory_that_is_newer_wins_and_nothing_is_loaded_from_disk(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    loop = Loop(load=str(tmp_path))
    loop.iterations = range(6, 8)
    attached = loop.run(in_memory(5))
    assert loop.calls[0] == ("batch", 40), "the batch size follows the samples that are consumed"
    assert not [call for call in loop.calls if call[0] == "load"]
    assert (loop.args.iteration, loop.args.num_floating_point_operations_so_far) == (5, 500.0)
    assert attached.told[0] == (6, True, True, 48)


def test_disk_that_is_newer_is_loaded_as_megatron_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    loop = Loop(load=str(tmp_path))
    loop.on_disk = 9
    attached = loop.run(in_memory(5))
    assert loop.calls[0] == ("load", ["model"], "context")
    assert attached.told[0] == ("loaded", 9)
    assert attached.baseline is not None
    assert (attached.baseline["iteration"], attached.baseline["operations"]) == (9, 900)
    assert attached.baseline["has_loaders"], "its random states are of a training under way"
    assert loop.module.load_checkpoint == loop.load_checkpoint, "it is Megatron's again"


def test_a_checkpoint_to_begin_from_is_loaded_at_iteration_0(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    loop = Loop(load=str(tmp_path), finetune=True)
    attached = loop.run()
    assert attached.told[0] == ("loaded", None)
    assert attached.baseline is not None
    assert not attached.baseline["has_loaders"]
    assert loop.calls[0] == ("load", ["model"], "context")
    assert Loop(load=str(tmp_path), finetune=True).run(in_memory(5)).told[0] != ("loaded", None), "memory is newer"


@pytest.mark.parametrize("has_loaders", [True, False])
def test_random_states_come_back_after_data_loaders_were_built(has_loaders: bool) -> None:
    """A baseline is older than the loaders: building them again moves the generators to where they were."""
    random.seed(7)
    expected = random.Random(7)
    if not has_loaders:
        expected.random()
    loop = Loop()
    loop.iterations = range(6, 7)
    loop.run(in_memory(5, has_loaders=has_loaders), between=random.random)
    assert random.random() == expected.random()


def test_a_baseline_is_marked_as_older_than_the_loaders() -> None:
    attached = Loop().run()
    assert attached.baseline is not None
    assert attached.baseline["has_loaders"] is False
    assert attached.state.state_dict()["has_loaders"] is True


def test_skipped_iterations_are_told_once_their_samples_are_counted() -> None:
    loop = Loop()
    loop.iterations, loop.skipped = range(1, 6), {2, 3, 5}
    told = loop.run().told
    steps = [(1, True, True, 8), (2, True, False, 16), (3, True, False, 24), (4, True, True, 32), (5, True, False, 40)]
    assert told == [("loaded", None), *steps, "close"]


def test_an_iteration_without_a_finite_loss_is_not_healthy() -> None:
    loop = Loop()
    loop.losses = {2: math.nan}
    assert [step[1] for step in loop.run().told[1:-1]] == [True, False, True]


@pytest.mark.parametrize(
    ("losses", "skipped", "grad_norm", "healthy"),
    [
        ({}, False, 1.0, True),
        ({"lm loss": torch.tensor(1.0), "aux": torch.tensor([1.0, 2.0])}, False, None, True),
        ({"lm loss": torch.tensor(math.inf)}, False, 1.0, False),
        ({}, False, math.nan, False),
        ({"lm loss": torch.tensor(1.0)}, True, math.inf, True),
    ],
)
def test_health(losses: dict[str, Any], skipped: bool, grad_norm: float | None, healthy: bool) -> None:
    assert is_healthy(losses=losses, skipped=skipped, grad_norm=grad_norm) is healthy


@pytest.mark.parametrize(
    ("ends", "decided", "last"),
    [
        (SystemExit(0), "exit", ["close"]),
        (SystemExit(None), "exit", ["close"]),
        (SystemExit(16), "step", ["drain", "abandon"]),
        (SystemExit(0), "", ["abandon"]),
        (SystemExit(3), "", ["abandon"]),
        (RuntimeError("a peer is gone"), "", ["abandon"]),
        (RuntimeError("the disk is full"), "exit", ["abandon"]),
        (KeyboardInterrupt(), "", ["abandon"]),
    ],
)
def test_who_leaves_with_all_others_waits_for_them_and_nobody_else(
    ends: BaseException, decided: str, last: list[str]
) -> None:
    """Nothing is removed at the end of what is to be started again."""
    loop, attached = Loop(ends=ends, decided=decided), Attached(None)
    loop.adapter = Adapter(loop.module, attached)
    loop.adapter.setup_model_and_optimizer(loop.setup, "type")
    with pytest.raises(type(ends)) as caught:
        loop.adapter.train(loop.module.train, ["model"], "optimizer", "scheduler", "data", "context")
    assert caught.value is ends
    assert [what for what in attached.told if isinstance(what, str)] == last
    assert loop.adapter._attached is None


def test_a_start_that_fails_leaves_nothing_behind() -> None:
    loop, attached = Loop(load="somewhere"), Attached(None)
    loop.load_checkpoint = loop.module.load_checkpoint = lambda *_, **__: (_ for _ in ()).throw(OSError("no disk"))
    with pytest.raises(OSError, match="no disk"):
        Adapter(loop.module, attached).setup_model_and_optimizer(loop.setup, "type")
    assert attached.told == ["abandon"]


def test_newer_versions_get_the_communicator_as_an_argument_and_older_ones_in_the_schedule() -> None:
    newer = Loop()
    newer.run()
    assert ("train", "watched", "groups") in newer.calls
    older, given = Loop(official=False), []
    watch: list[Any] = []

    def decide(*_: Any) -> bool:
        schedule = older.adapter.get_forward_backward_func(lambda: lambda **call: given.append(call))
        schedule(num_microbatches=2, p2p_communicator=None)
        watch.append(schedule)
        return False

    older.decide = lambda model, iteration, num_floating_point_operations_so_far: decide()  # type: ignore[assignment]
    older.run()
    assert ("train", None, None) in older.calls
    assert given[0] == {"num_microbatches": 2, "p2p_communicator": "watched", "pg_collection": "groups"}
    watch[0](num_microbatches=2)
    assert given[-1] == {"num_microbatches": 2}, "nothing is watched once the run is closed"


@pytest.mark.parametrize(("last", "saved"), [(4, True), (6, False)])
def test_a_checkpoint_that_a_fault_cut_short_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: int, saved: bool
) -> None:
    from megatron_moetion.pretrain import checkpoint

    monkeypatch.setattr(checkpoint, "last_saved", lambda root: last)
    loop = Loop(save=str(tmp_path), save_interval=2)
    loop.iterations = range(7, 8)
    loop.run(in_memory(6))
    assert (("saved", 6) in loop.calls) is saved


@pytest.mark.parametrize("flag", ["skip_train", "perform_rl_step", "inprocess_restart", "moe_use_upcycling"])
def test_what_cannot_work_is_refused_by_name(flag: str) -> None:
    loop = Loop(**{flag: True})
    name = f"--{flag.replace('_', '-')}"
    with pytest.raises(ConfigError, match=name) as caught:
        Adapter(loop.module).initialize_distributed(lambda store: None, None)
    assert caught.value.shared
    with pytest.raises(ConfigError, match=name):
        refuse(loop.args)


def test_a_conversion_and_a_foreign_parser_take_no_part() -> None:
    assert takes_part(argparse.Namespace(**ARGS))
    assert not takes_part(argparse.Namespace(**ARGS, ckpt_convert_format="torch"))
    assert not takes_part(argparse.Namespace(lr=1))


def test_a_store_of_ones_own_is_kept() -> None:
    given = []
    Adapter(Loop().module).initialize_distributed(lambda ranks, store: given.append(store), None, "own")
    assert given == ["own"]


def test_what_disk_holds(tmp_path: Path) -> None:
    flags = argparse.Namespace(
        **{**ARGS, "load": str(tmp_path)}, non_persistent_ckpt_type="global", non_persistent_global_ckpt_dir=None
    )
    assert newest_on_disk(flags) is None
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("release")
    assert newest_on_disk(flags) is None
    tracker.write_text("4")
    assert newest_on_disk(flags) == 4
    (tmp_path / "non_persistent").mkdir()
    (tmp_path / "non_persistent" / tracker.name).write_text("6")
    assert newest_on_disk(flags) == 6
    flags.non_persistent_ckpt_type, flags.ckpt_step = None, 3
    assert newest_on_disk(flags) == 3
    tracker.write_text("many")
    with pytest.raises(ConfigError, match="holds 'many'"):
        newest_on_disk(flags)


@pytest.mark.parametrize("ends", [None, SystemExit(0)])
@pytest.mark.parametrize(("last", "by_training"), [(2, [("saved", 4)]), (4, [])])
def test_checkpoints_are_left_to_the_processes_beside_training_but_for_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: int, by_training: list[Any], ends: BaseException | None
) -> None:
    """No later iteration shows that all ranks have the last one, so training writes it, unless it is on disk."""
    from megatron_moetion.pretrain import checkpoint

    monkeypatch.setattr(checkpoint, "last_saved", lambda root: last)
    loop = Loop(save=str(tmp_path), save_interval=2, ends=ends, decided="exit" if ends else "")
    loop.writes_checkpoints, loop.iterations, loop.saves_locally_at = True, range(1, 5), 2
    with pytest.raises(SystemExit) if ends else nullcontext():
        loop.run()
    saved = [call for call in loop.calls if call[0].startswith("saved")]
    assert saved == [("saved in time", 2, True), *by_training]


def test_a_step_that_is_to_be_run_again_elsewhere_is_saved_by_megatron(tmp_path: Path) -> None:
    """What its rerun state machine knows of it is in that checkpoint alone."""
    loop = Loop(save=str(tmp_path), save_interval=4, ends=SystemExit(16), decided="step")
    loop.writes_checkpoints, loop.iterations = True, range(1, 5)
    with pytest.raises(SystemExit):
        loop.run()
    assert ("saved in time", 4, False) in loop.calls


def test_where_nobody_writes_beside_training_it_saves_as_ever(tmp_path: Path) -> None:
    loop = Loop(save=str(tmp_path), save_interval=2)
    loop.iterations = range(1, 5)
    loop.run()
    saved = [call for call in loop.calls if call[0].startswith("saved")]
    assert saved == [("saved in time", 2, False), ("saved in time", 4, False)]
