# SPDX-License-Identifier: Apache-2.0
"""What ``gpu_check`` makes of training runs: the trainer is stood in for, its files and lines are as it leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from gpu_check import training
from gpu_check.part import CheckFailed, NotRun, Setting
from gpu_check.training import FAULT_AT, ITERATIONS, LAYOUTS, Run, read_run, run_several, run_training
from gpu_check_support import setting

CURVE = {i: (f"0x{i:x}", 1.0) for i in range(1, ITERATIONS + 1)}
ON_GPU = "> GPU path on node0: 1 rank(s), NVIDIA H200"
ON_CPU = "> CPU path on node0: 1 rank(s), no GPU"
PINNED = "[moetion] rank 0 iteration -1: arena pinned; captures land in it, packed on 4 SMs, small ones by kernel"
UNPINNED = "[moetion] rank 1 iteration -1: the arena could not be pinned (out of memory): captures go by way of 64 MiB"


class Trainer:
    """In place of ``execute``: a trainer that writes its files. A launch with ``--moetion`` has one or two attempts."""

    def __init__(self, **curves: Mapping[int, tuple[str, float]]) -> None:
        self.curves = curves
        """Of runs that end otherwise than the reference, by name."""
        self.on_gpu = True
        self.said = [ON_GPU, PINNED, "RuntimeError: killed", ON_GPU, PINNED]
        self.lost_tokens, self.fetched_units = 7, 3
        self.commands: list[Sequence[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(
        self,
        command: Sequence[str],
        log: Path,
        limit_s: float,
        environment: Mapping[str, str],
        *,
        may_fail: bool = False,
    ) -> str:
        assert limit_s > 0
        self.commands.append(command)
        self.environments.append(environment)
        assert command[-2:] == ["--device", "gpu" if self.on_gpu else "cpu"]
        folder, name = log.parent, log.parent.name.removeprefix("train-")
        if may_fail:
            store, run_id = (Path(command[command.index(f"--moetion-{flag}") + 1]) for flag in ("store", "run-id"))
            (store / run_id / "node1").mkdir(parents=True)
            return "\n".join(self.said[:3])
        curve = self.curves.get(name, CURVE)
        steps = [{"iteration": i, "loss_hex": h, "grad_norm": n} for i, (h, n) in curve.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        if "--moetion" not in command:
            return "\n".join(line for line in self.said[:1] if line != PINNED)
        lost = self.lost_tokens if "popularity" in command else 0
        recovered = {"event": "recovered", "iteration": 10, "lost_tokens": lost, "fetched_units": self.fetched_units}
        events = [recovered, {"event": "summary", "plt": 0.01}]
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        return "\n".join(self.said if "--moetion-inject-fault" in command else self.said[3:])


def installed(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> Trainer:
    monkeypatch.setattr(training, "execute", trainer)
    return trainer


def one_gpu(folder: Path) -> Setting:
    return setting(folder, gpus=1)


def test_training_passes_only_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Trainer())
    text = run_training(one_gpu(tmp_path)).text
    assert "full resumed from 10, exact from 10, all 20 losses bitwise; popularity from 10, 7 tokens lost" in text
    for mode in ("full", "exact"):
        installed(monkeypatch, Trainer(**{mode: CURVE | {13: ("0xff", 1.0)}}))
        with pytest.raises(CheckFailed, match=rf"{mode}: 1 of 20 iterations differ from the reference, first \[13\]"):
            run_training(one_gpu(tmp_path))


def test_popularity_must_reach_the_end_and_count_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Trainer(popularity={i: v for i, v in CURVE.items() if i < 20}))
    with pytest.raises(CheckFailed, match="reached 19"):
        run_training(one_gpu(tmp_path))
    installed(monkeypatch, Trainer()).lost_tokens = 0
    with pytest.raises(CheckFailed, match="popularity lost 0 tokens"):
        run_training(one_gpu(tmp_path))


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        ([ON_CPU, PINNED, "killed", ON_GPU, PINNED], "reference: 0 of 1 attempts say"),
        ([ON_GPU, PINNED], "full: 1 of 2 attempts say that they were on a GPU"),
        ([ON_GPU, PINNED, "killed", ON_CPU], "full: 1 of 2 attempts say"),
        ([ON_GPU, PINNED, "killed", ON_GPU, PINNED, ON_CPU], "full: 2 of 2 attempts say"),
        ([ON_GPU, PINNED, "killed", ON_GPU, UNPINNED], r"full: the arena was pinned in 1 of 2 .*out of memory"),
        ([ON_GPU, PINNED, "killed", ON_GPU, PINNED, UNPINNED], r"full: the arena was pinned in 2 of 2 .*rank 1"),
        ([ON_GPU, ON_GPU], "full: the arena was pinned in 0 of 2 attempts: no line says so"),
    ],
)
def test_training_on_anything_but_a_gpu_with_pinned_arenas_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], finding: str
) -> None:
    installed(monkeypatch, Trainer()).said = said
    with pytest.raises(CheckFailed, match=finding):
        run_training(one_gpu(tmp_path))


def test_a_run_without_losses_or_without_a_recovery_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckFailed, match="no losses"):
        read_run(tmp_path)
    found = Run(curve=CURVE, resumed_from=None, fetched_units=0, lost_tokens=0, plt=0.0)
    installed(monkeypatch, Trainer())
    monkeypatch.setattr(training, "read_run", lambda folder: found)
    with pytest.raises(CheckFailed, match="ended without a recovery"):
        run_training(one_gpu(tmp_path))


def test_without_room_for_arenas_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's shared memory has 64 MB unless somebody enlarged it."""
    monkeypatch.setattr(training, "ARENA_BYTES", 1 << 60)
    for action, gpus in ((run_training, 1), (run_several, 2)):
        with pytest.raises(NotRun, match="free and the arenas need"):
            action(setting(tmp_path, gpus=gpus))


@pytest.mark.parametrize(
    ("gpus", "layouts"),
    [(2, ["ep2", "pp2"]), (3, ["ep2", "pp2"]), (4, ["ep2", "pp2", "pp2-ep2"]), (8, ["ep2", "pp2", "pp2-ep2"])],
)
def test_several_gpus_train_each_layout_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, layouts: list[str]
) -> None:
    trainer = installed(monkeypatch, Trainer())
    text = run_several(setting(tmp_path, gpus=gpus)).text
    assert text.startswith("NCCL; a node lost with its memory: ep2 (full) resumed from 10, pp2 (exact) resumed from 10")
    chosen = [layout for layout in LAYOUTS if layout.name in layouts]
    assert len(trainer.commands) == 3 * len(chosen)
    for number, layout in enumerate(chosen):
        reference, first, second = trainer.commands[3 * number : 3 * number + 3]
        for command in (reference, first, second):
            assert command[command.index("--nproc-per-node") + 1] == str(layout.ranks)
            assert set(layout.flags) <= set(command)
        assert "--moetion" not in reference
        assert f"0:{layout.ranks_per_node}:{FAULT_AT}:mid-pack" in first
        assert "--moetion-inject-fault" not in second
        assert "--moetion-replicas" not in second, "the default keeps a replica, which this run needs"
    assert list(tmp_path.glob("moetion-check-*")) == []


def test_one_gpu_is_not_several(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="needs 2 GPUs, this machine has 1"):
        run_several(one_gpu(tmp_path))


def test_without_gpus_two_ranks_of_the_cpu_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = installed(monkeypatch, Trainer())
    trainer.on_gpu = False
    assert run_several(setting(tmp_path, quick=True)).text.startswith("gloo; a node lost with its memory: ep2 (full)")
    assert len(trainer.commands) == 3
    assert all(environment["CUDA_VISIBLE_DEVICES"] == "" for environment in trainer.environments)


def test_a_lost_node_must_come_back_from_another_ones_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Trainer()).fetched_units = 0
    with pytest.raises(CheckFailed, match="ep2: nothing came from the other node's memory"):
        run_several(setting(tmp_path, gpus=2))
    installed(monkeypatch, Trainer(**{"ep2-full": CURVE | {12: ("0xff", 1.0)}}))
    with pytest.raises(CheckFailed, match="ep2, full: 1 of 20 iterations differ"):
        run_several(setting(tmp_path, gpus=2))


def test_a_first_launch_that_never_trained_is_no_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Trainer):
        def __call__(self, *args: object, may_fail: bool = False, **changes: object) -> str:
            return "error" if may_fail else super().__call__(*args, **changes)  # type: ignore[arg-type]

    installed(monkeypatch, Broken())
    with pytest.raises(CheckFailed, match=r"no memory of node 1 to lose, see train-ep2-full/first.txt"):
        run_several(setting(tmp_path, gpus=2))


def test_verdicts_that_are_bitwise_need_kernels_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = installed(monkeypatch, Trainer())
    run_training(one_gpu(tmp_path))
    for environment in trainer.environments:
        assert environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert "CUDA_VISIBLE_DEVICES" not in environment
    flags = training.MODEL_FLAGS
    assert int(flags[flags.index("--moe-router-topk") + 1]) <= 2, "more than two addends are summed in any order"
