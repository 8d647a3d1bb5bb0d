# SPDX-License-Identifier: Apache-2.0
"""``moetion export``: a job is killed for good, and what its nodes held goes on as a checkpoint in another layout.

The undisturbed run saves every iteration by Megatron's own way; an export of iteration T has to equal its checkpoint
of T bit for bit, and so has what another layout saves after it has loaded the export.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Nursery, damage_captures, logs
from megatron.core import dist_checkpointing
from test_restarts import MODEL, WORLD_SIZE, Attempt, Run
from torch import distributed as dist

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import NothingRecoverable
from megatron_moetion.export.assemble import Stretch, memory_bytes, write_rank
from megatron_moetion.export.export import replayer
from megatron_moetion.export.meeting import Meeting
from megatron_moetion.export.survey import Owner, survey
from megatron_moetion.export.writer import Service, Settings
from megatron_moetion.inspect.look import node_folders
from megatron_moetion.mcore.torch_dist import PartWriter
from megatron_moetion.persist.tracker import checkpoint_folder, latest_iteration, write_tracker
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.reading import read_only
from megatron_moetion.store.spec import arena_name
from megatron_moetion.units import UnitKind

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

ITERATIONS = 7
DIES = 6
COMMON = f"--lr 1e-2 --train-iters {ITERATIONS} --lr-decay-iters 20 --swiglu --moe-router-enable-expert-bias"
COMMON += " --moe-router-score-function sigmoid --disable-bias-linear"
PLACED = f"{COMMON} --pipeline-model-parallel-size 2"
EXACT = "exact --moetion-period 3"
FRAGMENTS = "full --moetion-ranks-per-node 1 --moetion-replicas 2 --moetion-coding-nodes 4"
FEW_EXPERTS = "popularity --moetion-experts-per-snapshot 1 --moetion-max-experts-per-snapshot 1"


@pytest.fixture(scope="module")
def trainers() -> Iterator[Nursery]:
    found = Nursery("trainer")
    yield found
    found.close()


class Dead:
    """Runs that were killed in iteration ``DIES``, by mode, and the one that was not."""

    def __init__(self, trainers: Nursery, folder: Path, store: Path) -> None:
        self._trainers, self._folder, self._store = trainers, folder, store
        self._stores: dict[str, Path] = {}
        self._saved: Path | None = None

    def run(self, name: str, flags: str, model: str = MODEL) -> Run:
        return Run(self._trainers, self._folder / name, self._store / name, flags, model)

    def saved(self, iteration: int) -> dict[str, Any]:
        """The undisturbed run's own checkpoint."""
        if self._saved is None:
            self._saved = self._folder / "saved"
            self.run("undisturbed", f"{PLACED} --save {self._saved} --save-interval 1").finish()
        return content_of(checkpoint_folder(str(self._saved), iteration))

    def store(self, mode: str, copy: Path) -> Path:
        """A copy of what the dead run of this mode has left: a folder with one for each node."""
        if mode not in self._stores:
            run = self.run(
                f"dead{len(self._stores)}", f"{PLACED} --moetion --moetion-ranks-per-node 2 --moetion-mode {mode}"
            )
            attempt = run.attempt(f"--moetion-inject-fault 0:1:{DIES}:before-select")
            assert -9 in attempt.codes, logs(run.folder / "0")
            self._stores[mode] = run.store / "restarts"
        return Path(shutil.copytree(self._stores[mode], copy))

    @cached_property
    def reference(self) -> Attempt:
        """The undisturbed run, without any checkpoint."""
        return self.run("reference", PLACED).finish()


@pytest.fixture(scope="module")
def dead(trainers: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dead]:
    store = Path("/dev/shm") / f"moetion-export-{os.getpid()}"
    yield Dead(trainers, tmp_path_factory.mktemp("runs"), store)
    shutil.rmtree(store, ignore_errors=True)


def export(output: Path, *stores: Path, more: str = "", run_id: str = "restarts") -> tuple[int, dict[str, Any], str]:
    """The program, as a user calls it: exit code, document, and what it says."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "megatron_moetion.cli",
            "export",
            run_id,
            "--json",
            "--output",
            str(output),
            "--store",
            *map(str, stores),
            *more.split(),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def content_of(folder: Path) -> dict[str, Any]:
    """All that a checkpoint has, read by Megatron-Core: tensors by key, random states, and what is common."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = dist_checkpointing.load_plain_tensors(str(folder))
    finally:
        dist.destroy_process_group()
    return dict(found)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys of one alone, and of what differs in any bit."""
    return [k for k in sorted({*a, *b}) if k not in a or k not in b or not _same(a[k], b[k])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def but(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in names}


RUN_S_OWN = ("progress",)
"""Holds the record of all flags; those of saving and of in-memory checkpoints differ."""


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        pytest.param(FRAGMENTS, (("node0", "node2"), ("node1", "node3")), id="full, fragments"),
        pytest.param(EXACT, (("node0",), ("node1",)), id="exact, copies"),
    ],
)
def test_a_dead_jobs_memory_is_the_checkpoint_that_it_would_have_saved(
    dead: Dead, tmp_path: Path, mode: str, parts: tuple[tuple[str, ...], ...]
) -> None:
    """Of all nodes; of either one alone, whose replicas stand in for the other; of two that have fragments of four."""
    store = dead.store(mode, tmp_path / "store")
    iteration = None
    for number, folders in enumerate(([store], *([store / name for name in names] for names in parts))):
        output = tmp_path / f"out{number}"
        code, found, said = export(output, *folders)
        assert code == 0, said
        assert iteration in (None, found["iteration"]), "each part has the same iteration"
        iteration = found["iteration"]
        assert DIES - 2 <= iteration < DIES
        assert latest_iteration(str(output)) == iteration
        exported = content_of(checkpoint_folder(str(output), iteration))
        saved = dead.saved(iteration)
        assert differing(but(saved, *RUN_S_OWN), but(exported, *RUN_S_OWN)) == []
        assert {k: v for k, v in exported["progress"].items() if k != "flags"} == {
            k: v for k, v in saved["progress"].items() if k != "flags"
        }
        assert sum(k.startswith("optimizer.state.") for k in exported) > 30
    assert found["replayed_steps"] == (pytest.approx(2, abs=1) if mode == EXACT else 0)


@pytest.mark.parametrize("precision", ["--bf16", ""])
def test_optimizers_that_each_rank_has_whole(dead: Dead, tmp_path: Path, precision: str) -> None:
    """Without ``--use-distributed-optimizer`` main values have another name on disk, or are the model's parameters."""
    model = MODEL.replace("--use-distributed-optimizer", "").replace("--bf16", precision)
    flags = f"{COMMON} --save {tmp_path / 'saved'} --save-interval 1 --moetion-save off"
    flags += " --moetion --moetion-ranks-per-node 2"
    run = dead.run(f"whole{precision}", f"{flags} --moetion-mode {EXACT}", model)
    attempt = run.attempt(f"--moetion-inject-fault 0:1:{DIES}:before-select")
    assert -9 in attempt.codes, logs(run.folder / "0")
    code, found, said = export(tmp_path / "out", run.store / "restarts")
    assert code == 0, said
    roots = (tmp_path / "saved", tmp_path / "out")
    contents = [content_of(checkpoint_folder(str(root), found["iteration"])) for root in roots]
    assert differing(*(but(content, "args") for content in contents)) == []
    mains = [key for key in contents[1] if key.startswith("optimizer.state.fp32_param.")]
    assert bool(mains) == bool(precision)


@pytest.mark.parametrize("size", [4, 1])
def test_another_layout_goes_on_from_it(dead: Dead, tmp_path: Path, size: int) -> None:
    """One stage and four-way experts, or none: what it has loaded is what it saves at once, and it trains."""
    output, again = tmp_path / "out", tmp_path / "again"
    for_it = f"--expert-model-parallel-size {size}"
    code, found, said = export(output, dead.store("full", tmp_path / "store") / "node1", more=for_it)
    assert code == 0, said
    iteration = found["iteration"]
    other = f"{COMMON} {for_it} --load {output}"
    loaded = dead.run(f"other{size}", f"{other} --save {again}").finish(f"--train-iters {iteration}")
    assert loaded.lines(f"> training from iteration {iteration} to {iteration}"), loaded.output[-2000:]
    exported, saved = (content_of(checkpoint_folder(str(f), iteration)) for f in (output, again))
    tensors = [{k: v for k, v in c.items() if isinstance(v, torch.Tensor)} for c in (exported, saved)]
    assert differing(*tensors) == []
    trained = dead.run(f"trained{size}", other).finish()
    assert list(trained.losses) == list(range(iteration + 1, ITERATIONS + 1))


def test_the_same_layout_goes_on_bitwise(dead: Dead, tmp_path: Path) -> None:
    undisturbed = dead.reference
    output = tmp_path / "out"
    code, found, said = export(output, dead.store(EXACT, tmp_path / "store"))
    assert code == 0, said
    resumed = dead.run("resumed", f"{PLACED} --load {output}").finish()
    assert resumed.losses == {i: loss for i, loss in undisturbed.losses.items() if i > found["iteration"]}


def test_the_trainer_rebuilds_what_two_of_four_nodes_held(dead: Dead) -> None:
    """Ranks 1 and 2, of both pipeline stages, have nothing left but fragments on the nodes of the other two."""
    run = dead.run("rebuilt", f"{PLACED} --moetion --moetion-mode {FRAGMENTS}")
    left = dead.store(FRAGMENTS, run.store / "restarts")
    for node in ("node1", "node2"):
        shutil.rmtree(left / node)
    again = run.finish()
    assert "recovered, epoch 1" in again.output
    assert min(again.losses) in (DIES - 1, DIES)
    assert again.losses == {i: loss for i, loss in dead.reference.losses.items() if i >= min(again.losses)}


def test_stale_experts_are_named(dead: Dead, tmp_path: Path) -> None:
    code, found, said = export(tmp_path / "out", dead.store(FEW_EXPERTS, tmp_path / "store"))
    assert code == 0, said
    exported, saved = content_of(Path(found["checkpoint"])), dead.saved(found["iteration"])
    assert found["stale"]
    assert all(captured < found["iteration"] for captured in found["stale"].values())
    different = differing(but(saved, *RUN_S_OWN), but(exported, *RUN_S_OWN))
    assert different, "experts are older"
    assert all(".experts." in key for key in different)


def test_what_is_there_is_not_overwritten_without_force(dead: Dead, tmp_path: Path) -> None:
    store, output = dead.store("full", tmp_path / "store"), tmp_path / "out"
    _, found, _ = export(output, store)
    marked = Path(found["checkpoint"]) / "mark"
    marked.touch()
    code, _, said = export(output, store)
    assert (code, marked.exists()) == (2, True)
    assert "--force" in said
    code, _, said = export(output, store, more="--force")
    assert (code, marked.exists()) == (0, False), said
    assert sorted(p.name for p in output.iterdir()) == [marked.parent.name, "latest_checkpointed_iteration.txt"]


def test_exports_that_die_leave_what_was_there(dead: Dead, tmp_path: Path) -> None:
    """In any place, or for want of room; the next one clears up behind them, and goes through."""
    store, output = dead.store("full", tmp_path / "store"), tmp_path / "out"
    code, found, said = export(output, store)
    assert code == 0, said
    folder, iteration = Path(found["checkpoint"]), found["iteration"]
    (folder / "mark").touch()
    program = Path(__file__).parent / "dying_exports.py"
    died = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(output), str(store)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    ends = [json.loads(line) for line in died.stdout.splitlines()]
    assert [end["code"] for end in ends] == [-9] * 6 + [2], died.stderr
    for end in ends:
        drafts = [name for name in end["there"] if name.endswith(".draft")]
        assert len(drafts) == (end["code"] == -9 and end["phase"] != "before the tracker file"), end
        assert {folder.name, "latest_checkpointed_iteration.txt"} <= {*end["there"]}, end
    assert "iter_" in died.stderr
    assert "cannot be written: File too large" in died.stderr
    assert latest_iteration(str(output)) == iteration
    assert not (folder / "mark").exists(), "one was complete, and died before the tracker file was written"
    assert differing(content_of(folder), dead.saved(iteration)) == []
    assert sorted(p.name for p in output.iterdir()) == [folder.name, "latest_checkpointed_iteration.txt"]


def test_the_state_of_a_run_is_never_in_memory_whole(dead: Dead, tmp_path: Path) -> None:
    """Mode ``full``: a unit at a time. Mode ``exact``: the slices of one tensor, with their gradients."""
    for mode in ("full", EXACT):
        found = look(dead.store(mode, tmp_path / mode.split()[0]))
        for owner in found.owners:
            tracemalloc.start()
            write_rank(owner, found.iteration, Nowhere(), HostPool(1), replayer)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            units = owner.sources[0].arena.spec.units
            whole = sum(nbytes for _, kind, nbytes in units if kind != UnitKind.HOST)
            host = next(nbytes for _, kind, nbytes in units if kind == UnitKind.HOST)
            assert memory_bytes(owner) < whole
            assert peak < memory_bytes(owner) + 16 * host, "the document of a rank, and its tables"


class Nowhere:
    """Forgets what it is given."""

    def add(self, stretch: Stretch) -> None:
        pass

    def add_rank(self, owner: Owner, state: Any) -> None:
        pass


def test_what_is_missing_is_named(dead: Dead, tmp_path: Path) -> None:
    store = dead.store("full", tmp_path / "store")
    for node in ("node0", "node1"):
        (store / node / "rank00002.arena").unlink()
    code, _, said = export(tmp_path / "out", store)
    assert code == 3
    assert "no copy of rank(s) 2 of 4" in said
    assert not (tmp_path / "out").exists()


def look(store: Path, say: Callable[[str], None] = lambda line: None) -> Any:
    return survey(node_folders([store], "restarts"), "restarts", HostPool(1), say)


def test_damaged_captures_give_way_to_whole_copies(dead: Dead, tmp_path: Path) -> None:
    store = dead.store("full", tmp_path / "store")
    whole = look(store)
    own, replica = store / "node0/rank00000.arena", store / "node1/rank00000.arena"
    damage_captures(own, [whole.iteration])
    found = look(store)
    assert found.iteration == whole.iteration
    assert [n for n in found.notes if str(own) in n and "1 capture(s)" in n]
    for other in [i for i in whole.reachable if i != whole.iteration]:
        damage_captures(replica, [other])
        damage_captures(own, [other])
    damage_captures(replica, [whole.iteration])
    with pytest.raises(NothingRecoverable, match=rf"iteration {whole.iteration}: rank 0 has no copy of "):
        look(store)


def test_arenas_of_other_settings_are_passed_over(dead: Dead, tmp_path: Path) -> None:
    both = dead.store("full", tmp_path / "a")
    shutil.rmtree(both / "node0")
    dead.store(EXACT, tmp_path / "b").joinpath("node0").rename(both / "node0")
    found = look(both)
    others = {"full": "node0", "exact": "node1"}[found.identity.mode]
    assert len([n for n in found.notes if f"/{others}/" in n and "is of other settings: mode" in n]) == WORLD_SIZE


def test_each_rank_has_its_places(dead: Dead, tmp_path: Path) -> None:
    guides = [owner.sheet.guide for owner in look(dead.store("full", tmp_path / "store")).owners]
    assert [len(guides), {g["problem"] for g in guides}] == [WORLD_SIZE, {None}]
    assert all(g["left_out"] == [] for g in guides)


# -- beside training ------------------------------------------------------------------------------------------------


def test_what_is_written_beside_training_is_what_training_would_have_written(dead: Dead, tmp_path: Path) -> None:
    """From memory, by other processes; the last checkpoint, which no later iteration has made stable, by training."""
    folder = tmp_path / "beside"
    run = dead.run(
        "beside",
        f"{PLACED} --moetion --moetion-mode {EXACT} --moetion-ranks-per-node 2 --save {folder} --save-interval 2",
    )
    done = run.finish()
    (line,) = [line for line in done.output.splitlines() if "checkpoint written to" in line]
    assert line.startswith("[moetion] rank 0 iteration 2: "), line
    assert sorted(p.name for p in folder.glob("iter_*")) == ["iter_0000002", f"iter_{ITERATIONS:07d}"]
    assert latest_iteration(str(folder)) == ITERATIONS
    written, saved = content_of(checkpoint_folder(str(folder), 2)), dead.saved(2)
    assert differing(but(saved, *RUN_S_OWN), but(written, *RUN_S_OWN)) == []


class Asking:
    """A rank that asks its writer for some iterations, and then is gone or is told to end."""

    def __init__(self, *iterations: int, is_ending: bool = False) -> None:
        self._wanted = [{"iteration": i, "why": None, "free": 1 << 40} for i in iterations]
        self.is_ending = is_ending
        self.is_there = True
        self.heard: list[dict[str, Any]] = []

    def next(self) -> Any:
        return self._wanted.pop(0) if self._wanted else None

    def say(self, **document: Any) -> None:
        self.heard.append(document)

    @property
    def fates(self) -> list[tuple[str, int]]:
        return [(h["what"], h["iteration"]) for h in self.heard if h["what"] != "ready"]

    @property
    def why(self) -> str:
        return " ".join(h["why"] for h in self.heard if h["what"] == "failed")


class Writers:
    """The writers of all ranks of a dead run, in threads of this process."""

    def __init__(self, store: Path, root: Path, limit_s: float = 60.0, history: str = "a-0") -> None:
        self.root = root
        self._settings = [
            Settings(
                arena=str(store / f"node{rank // 2}" / arena_name(rank)), root=str(root), rank=rank, pid=os.getpid(),
                world_size=WORLD_SIZE, local_ranks=2, history=history, limit_s=limit_s, is_waited_for=False,
            )
            for rank in range(WORLD_SIZE)
        ]  # fmt: skip

    @property
    def stable(self) -> int:
        pages = [read_only(Path(s.arena)).page for s in self._settings]
        return max(page.stable for page in pages)

    def serve(self, *ranks: Asking | None) -> None:
        services = [
            Service(settings, rank, 1, SystemClock())
            for settings, rank in zip(self._settings, ranks, strict=True)
            if rank is not None
        ]
        with ThreadPoolExecutor(len(services)) as threads:
            for done in [threads.submit(each.run) for each in services]:
                done.result()

    @property
    def left(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir()) if self.root.exists() else []


TRACKER_AND = ["iter_{:07d}", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("is_told_to_end", [False, True])
def test_the_writers_of_all_ranks_make_one_checkpoint(dead: Dead, tmp_path: Path, is_told_to_end: bool) -> None:
    writers = Writers(dead.store("full", tmp_path / "store"), tmp_path / "disk")
    wanted = () if is_told_to_end else (writers.stable,)
    ranks = [Asking(*wanted, is_ending=is_told_to_end) for _ in range(WORLD_SIZE)]
    writers.serve(*ranks)
    iteration = latest_iteration(str(writers.root))
    assert iteration == writers.stable
    assert writers.left == [name.format(iteration) for name in TRACKER_AND]
    if not is_told_to_end:
        assert [rank.fates for rank in ranks] == [[("copied", iteration), ("saved", iteration)]] * WORLD_SIZE
    written, saved = content_of(checkpoint_folder(str(writers.root), iteration)), dead.saved(iteration)
    assert differing(but(saved, *RUN_S_OWN), but(written, *RUN_S_OWN)) == []
    writers.serve(*(Asking(is_ending=True) for _ in range(WORLD_SIZE)))
    assert writers.left == [name.format(iteration) for name in TRACKER_AND], "it is there already"


def _damage(store: Path, rank: int, iteration: int) -> None:
    damage_captures(store / f"node{rank // 2}" / arena_name(rank), [iteration])


def _delete(store: Path, rank: int, iteration: int) -> None:
    (store / f"node{rank // 2}" / arena_name(rank)).unlink()


@pytest.mark.parametrize(
    ("harm", "why"), [(_damage, "released before the copy of them was complete"), (_delete, "cannot be read")]
)
@pytest.mark.parametrize("rank", [0, 3])
def test_captures_that_are_not_there_cost_that_checkpoint(
    dead: Dead, tmp_path: Path, harm: Callable[[Path, int, int], None], why: str, rank: int
) -> None:
    """The older one stays the newest, nothing is left over, and every rank hears of it."""
    store = dead.store("full", tmp_path / "store")
    writers = Writers(store, tmp_path / "disk", limit_s=15.0)  # who comes after rank 0 has tidied up waits as long
    iteration = writers.stable
    harm(store, rank, iteration)
    writers.root.mkdir()
    (writers.root / "latest_checkpointed_iteration.txt").write_text("1")
    ranks = [Asking(iteration) for _ in range(WORLD_SIZE)]
    writers.serve(*ranks)
    assert latest_iteration(str(writers.root)) == 1
    assert [name for name in writers.left if name.startswith("iter")] == []
    assert all(each.fates[-1] == ("failed", iteration) for each in ranks)
    assert why in ranks[rank].why
    assert why in ranks[0].why, "rank 0 speaks for all"


def test_a_disk_that_is_full_costs_that_checkpoint_and_the_next_one_is_written(
    dead: Dead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = Writers(dead.store("full", tmp_path / "store"), tmp_path / "disk")
    iteration = writers.stable
    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "close", _full)
        ranks = [Asking(iteration) for _ in range(WORLD_SIZE)]
        writers.serve(*ranks)
    assert "No space left on device" in ranks[0].why
    assert latest_iteration(str(writers.root)) is None
    assert [name for name in writers.left if name.startswith("iter")] == []
    assert [p.name for p in writers.root.glob(".*/*") if "failed" not in p.name] == [], "the room is free again"
    Writers(tmp_path / "store", writers.root, history="b-0").serve(*(Asking(iteration) for _ in range(WORLD_SIZE)))
    assert latest_iteration(str(writers.root)) == iteration
    assert writers.left == [name.format(iteration) for name in TRACKER_AND]


def _full(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk")


@pytest.mark.parametrize("absent", [0, 2])
def test_a_writer_that_is_gone_keeps_the_others_waiting_no_longer_than_the_limit(
    dead: Dead, tmp_path: Path, absent: int
) -> None:
    writers = Writers(dead.store("full", tmp_path / "store"), tmp_path / "disk", limit_s=8.0)
    iteration = writers.stable
    ranks = [None if rank == absent else Asking(iteration) for rank in range(WORLD_SIZE)]
    writers.serve(*ranks)
    heard = [each for each in ranks if each is not None]
    assert all(each.fates[-1] == ("failed", iteration) for each in heard)
    assert ("rank 2 of 4 never wrote" if absent else "has not put the parts together") in heard[0].why
    assert latest_iteration(str(writers.root)) is None


def test_a_writer_whose_time_is_over_takes_no_part_out_of_the_checkpoint(
    dead: Dead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part comes when rank 1 has just given up, and rank 0 has a moment left."""
    parts, wait, leave = Meeting.parts, Meeting.wait_for_rank_0, Meeting.leave
    given_up = threading.Event()

    def parts_at_last(meeting: Meeting, iteration: int, time_left: Callable[[], float]) -> list[bytes]:
        assert given_up.wait(60)
        while len(list(meeting.folder.glob("moetion-part-*"))) < WORLD_SIZE:
            time.sleep(0.01)
        return parts(meeting, iteration, time_left)

    def give_up(meeting: Meeting, time_left: Callable[[], float]) -> None:
        wait(meeting, (lambda: 0.0) if meeting._rank == 1 else time_left)

    def leave_and_say(meeting: Meeting) -> None:
        leave(meeting)
        if meeting._rank == 1:
            given_up.set()

    monkeypatch.setattr(Meeting, "parts", parts_at_last)
    monkeypatch.setattr(Meeting, "wait_for_rank_0", give_up)
    monkeypatch.setattr(Meeting, "leave", leave_and_say)
    writers = Writers(dead.store("full", tmp_path / "store"), tmp_path / "disk")
    iteration = writers.stable
    ranks = [Asking(iteration) for _ in range(WORLD_SIZE)]
    writers.serve(*ranks)
    assert [rank.fates[-1][0] for rank in ranks] == ["saved", "failed", "saved", "saved"]
    written, saved = content_of(checkpoint_folder(str(writers.root), iteration)), dead.saved(iteration)
    assert differing(but(saved, *RUN_S_OWN), but(written, *RUN_S_OWN)) == []


def test_an_older_checkpoint_that_comes_late_does_not_become_the_newest(
    dead: Dead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training has written its last checkpoint by itself meanwhile."""
    writers = Writers(dead.store("full", tmp_path / "store"), tmp_path / "disk")
    iteration = writers.stable
    tidy = Meeting.tidy

    def tidy_late(meeting: Meeting) -> None:
        write_tracker(writers.root, iteration + 5)
        tidy(meeting)

    monkeypatch.setattr(Meeting, "tidy", tidy_late)
    writers.serve(*(Asking(iteration) for _ in range(WORLD_SIZE)))
    assert latest_iteration(str(writers.root)) == iteration + 5
    assert checkpoint_folder(str(writers.root), iteration).is_dir()
