# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of a GPU machine, without one: what fits, what is counted, what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_arena, gpu_link, gpu_step
from benchmarks._common import Result, available_memory_bytes
from benchmarks.gpu_step import Arm, Model, arena_bytes, arm_results, config_of, measure_cycles, shortage
from megatron_moetion.plan.costs import RankState

ROOT = Path(__file__).parents[3]
GIB = 1 << 30


class Loop:
    """A trainer whose steps take no time, and a session that notes which iterations it saw."""

    def __init__(self) -> None:
        self.progress = SimpleNamespace(iteration=0)
        self.seen: list[int] = []
        self.session = SimpleNamespace(
            running=SimpleNamespace(pipeline=SimpleNamespace(counts=SimpleNamespace(dropped={"missed": 0})))
        )

    def train_step(self) -> None:
        self.progress.iteration += 1

    def on_step_end(self, iteration: int) -> None:
        """The first snapshot after an idle block is dropped, as the chains of mode ``exact`` begin anew."""
        if not self.seen or iteration > self.seen[-1] + 1:
            self.session.running.pipeline.counts.dropped["missed"] += 1
        self.seen.append(iteration)


@pytest.mark.parametrize(("mode", "skipped"), [("full", 1), ("popularity", 1), ("exact", gpu_step.PERIOD + 4)])
def test_idle_blocks_and_blocks_with_snapshots_take_turns(mode: str, skipped: int) -> None:
    loop, arm = Loop(), Arm(mode=mode)
    measure_cycles(loop, arm, loop, Model(flags="", counted=3), until=time.monotonic())
    assert len(arm.ratios) == gpu_step.FEWEST_CYCLES, "even without time"
    assert len(arm.idle) == len(arm.active) == 3 * gpu_step.FEWEST_CYCLES
    cycle = 4 + skipped + 3
    assert loop.seen == [c * cycle + i for c in range(gpu_step.FEWEST_CYCLES) for i in range(5, cycle + 1)]
    assert arm.dropped == 0, "what is dropped while a block begins is not counted"


def test_cycles_go_on_while_there_is_time() -> None:
    loop, arm = Loop(), Arm(mode="full")
    measure_cycles(loop, arm, loop, Model(flags="", counted=1), until=time.monotonic() + 0.05)
    assert len(arm.ratios) > gpu_step.FEWEST_CYCLES


STATE = RankState(
    dense_parameters=10**8, expert_parameters=10**9, num_experts=32, gradient_bytes=2, replicas=0, ranks_per_node=1
)


@pytest.mark.parametrize("mode", gpu_step.ARMS)
def test_an_arena_of_a_billion_parameters_fits_a_gpu_node(tmp_path: Path, mode: str) -> None:
    need = arena_bytes(mode, STATE, config_of(mode, tmp_path))
    assert 12 * 1.1e9 < need < 50 * GIB


def test_an_arena_without_room_is_refused_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "free_bytes", lambda folder: 40 * GIB)
    assert shortage(30 * GIB, tmp_path, 100 * GIB) is None
    assert shortage(30 * GIB, tmp_path, 32 * GIB) == "its arena takes 30.0 GiB of 32.0 GiB of memory"
    assert shortage(41 * GIB, tmp_path, 100 * GIB) == (
        f"its arena takes 41.0 GiB and {tmp_path} has 40.0 GiB free (--store DIR)"
    )


def test_a_mode_is_left_out_where_the_arenas_before_it_took_too_long() -> None:
    """Figures of some modes are better than a process that is stopped before it has written any."""
    slow = Arm(mode="full", arena_bytes=30 * GIB, start_s=30.0)
    times: dict[str, Any] = {"iteration_s": 0.5, "counted": 4}
    assert gpu_step.no_time(40 * GIB, [], left_s=1.0, **times) is None, "nobody knows"
    assert gpu_step.no_time(40 * GIB, [slow], left_s=61.0, **times) is None
    assert gpu_step.no_time(40 * GIB, [slow], left_s=59.0, **times) == "it takes some 60 s, and 59 s are left"
    refused = Arm(mode="full", arena_bytes=30 * GIB, problem="no room")
    assert gpu_step.no_time(40 * GIB, [refused], left_s=1.0, **times) is None


def test_memory_is_what_a_container_may_take(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 50 << 10
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1024\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 50 << 10
    (tmp_path / "memory.max").write_text("11264\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 10 << 10
    assert available_memory_bytes() > 1 << 20


def named(results: list[Result]) -> dict[str, Result]:
    return {r.name: r for r in results}


def measured(**changes: Any) -> Arm:
    arm = Arm(mode="full", active=[1.0] * 9 + [2.0], idle=[1.0] * 10, ratios=[1.0, 1.01], pinned=True)
    return Arm(**{**vars(arm), **changes})


def test_an_arm_is_held_to_its_target_on_a_gpu_only() -> None:
    name = "full: iteration over none, median"
    found = named(arm_results(measured(), [1.0] * 10, on_gpu=True))
    assert (found[name].value, found[name].met) == (0.0, True)
    assert found["full: the same, 99th percentile"].value == pytest.approx(0.91)
    assert named(arm_results(measured(active=[1.02] * 5), [1.0], on_gpu=True))[name].met is False
    assert named(arm_results(measured(active=[1.02] * 5), [1.0], on_gpu=False))[name].met is None


def test_snapshots_that_are_dropped_cost_nothing_and_do_not_pass() -> None:
    found = named(arm_results(measured(dropped=1), [1.0], on_gpu=True))
    assert found["full: snapshots dropped"].met is False
    assert named(arm_results(measured(pinned=False), [1.0], on_gpu=True))["full: arena pinned"].met is False


def test_what_was_not_measured_is_null() -> None:
    (only,) = arm_results(Arm(mode="full", problem="no room"), [1.0], on_gpu=True)
    assert (only.value, only.met) == (None, None)


def test_the_large_arena_is_smaller_where_memory_is_short() -> None:
    assert gpu_arena.affordable(32 * GIB, 128 * GIB) == 32 * GIB
    assert gpu_arena.affordable(32 * GIB, 10 * GIB) == 6 * GIB
    assert gpu_arena.affordable(32 * GIB, 1 << 20) == 0
    assert gpu_arena.spec_of(gpu_arena.SLOTS << 20).nbytes >= gpu_arena.SLOTS << 20


def document(path: Path, *command: str) -> dict[str, Any]:
    subprocess.run([sys.executable, *command, "--json", str(path)], check=True, cwd=ROOT, timeout=200)
    results = json.loads(path.read_text())["results"]
    return {r["name"]: r for r in results}


def test_a_small_arena_is_made_and_registered_with_the_model(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    found = document(
        tmp_path / "a.json", "benchmarks/gpu_arena.py", "--device", "model:0", "--mib", "32", "--store", str(store)
    )
    assert found["arena"]["value"] == 1 / 32
    assert found["pinned"]["value"] is not None
    assert list(store.iterdir()) == []


ON_A_GPU = """
import sys
import torch
from megatron_moetion.mcore import cpu_device

cpu_device.install()  # stands in for a GPU: everything of torch that has "cuda" in its name
torch.cuda.is_available = lambda: True
from megatron_moetion.pretrain import startup
from megatron_moetion.pretrain.rendezvous import Device

startup._device = lambda process: Device(host="here", index=None)  # gloo in place of NCCL
from benchmarks import _common, gpu_step

_common._gpus = lambda: ["a GPU"]
gpu_step.no_time = lambda *args: None  # each mode gets its fewest cycles
sys.argv = ["gpu_step.py", *sys.argv[1:]]
sys.exit(gpu_step.main())
"""


def test_the_step_runs_as_on_a_gpu(tmp_path: Path) -> None:
    """All that this process does on a GPU machine, the GPU stood in for."""
    store = tmp_path / "store"
    store.mkdir()
    found = document(
        tmp_path / "s.json", "-c", ON_A_GPU, "--model", "toy", "--seconds", "1", "--store", str(store), "--quick"
    )
    for mode in gpu_step.ARMS:
        assert found[f"{mode}: iteration over none, median"]["met"] in (True, False)
        assert found[f"{mode}: iterations counted"]["value"] >= gpu_step.FEWEST_CYCLES * 4
        assert found[f"{mode}: arena pinned"]["met"] is False, "this is no GPU, and it must not look like one"
        assert found[f"{mode}: snapshots dropped"]["value"] < 1
    assert list(store.iterdir()) == []


LINK_OF_A_GPU = """
import contextlib, sys, time, types
import torch
from megatron_moetion import _C
from megatron_moetion.mcore import cpu_device

cpu_device.install()  # stands in for a GPU
empty = torch.empty
torch.empty = lambda *sizes, pin_memory=False, **settings: empty(*sizes, **settings)

class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.at = time.perf_counter()
    def synchronize(self): pass
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)

torch.cuda.Event = Event
from benchmarks import _common, gpu_link

def pool(device, **settings):
    assert device == "cuda:0"
    return _C.DevicePool("model:0", **settings)

gpu_link._C = types.SimpleNamespace(DevicePool=pool)
gpu_link.engines.SAMPLE_BYTES = gpu_link.engines.SIZES_BYTES[-1]
gpu_link.SPEED_BYTES = 64 << 20
_common._gpus = lambda: ["a GPU"]
sys.argv = ["gpu_link.py", *sys.argv[1:]]
sys.exit(gpu_link.main())
"""


@pytest.mark.parametrize(
    "command", [["-c", LINK_OF_A_GPU], ["benchmarks/gpu_link.py", "--device", "model:0"]], ids=["as on a GPU", "model"]
)
def test_the_link_is_asked_its_questions(tmp_path: Path, command: list[str]) -> None:
    """All that this process does on a GPU machine, the GPU stood in for; and the same with the model of a device."""
    found = document(tmp_path / "l.json", *command, "--quick")
    assert (found["different choices in 5"]["met"] is None) == ("model:0" in command)
    assert found["link: plain copy to pinned memory"]["value"] > 0
    for label in gpu_link.SEGMENTS:
        assert found[f"snapshot of segments of {label}"]["value"] > 0
    for limit in gpu_link.LIMITS:
        assert found[f"multiprocessors of a kernel that may use {limit}"]["met"] is True


def test_pieces_and_chunks_bring_all_bytes_in_another_order() -> None:
    memory = gpu_link.Memory("model:0", 4 << 20)
    pieces, chunks = gpu_link.tables(memory, 64 << 10)
    assert pieces[:, 2].sum() == chunks[:, 1].sum() == memory.nbytes
    assert sorted(pieces[:, 0] - memory.source) == sorted(pieces[:, 1] - memory.target)
    assert (pieces[:, 0] - memory.source != pieces[:, 1] - memory.target).any()
    rows = len(pieces)
    pool = gpu_link._C.DevicePool("model:0", rank=0, max_pieces=rows, max_chunks=rows)
    with gpu_link.packed(pool, pieces, chunks, 0, None):
        pass
