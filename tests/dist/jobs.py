# SPDX-License-Identifier: Apache-2.0
"""Starts attempts of a toy job, takes nodes away in between, and checks what came back against what was."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import numpy as np
from toy_trainer import Toy, uninterrupted

from megatron_moetion.store.manifest import PAGE_MAGIC
from megatron_moetion.store.sharedfile import open_arena

HERE = Path(__file__).parent
HOST = "host"
DENSE = ("layers.0.dense", "frozen", HOST)
KILLED = -9


class Nursery:
    """The process that ranks are forked from."""

    def __init__(self, kind: str, start_limit_s: float = 60) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py"), kind],
            env=os.environ | quiet | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read(start_limit_s) == "ready"

    def launch(self, limit_s: float, **request: Any) -> list[int]:
        """Run one attempt to its end; the exit codes by rank, negative for a signal."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"limit_s": limit_s, **request}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._read(limit_s + 30))
        assert not answer["late"], f"the ranks were not done after {limit_s} s: {answer}\n{logs(request['folder'])}"
        return list(answer["codes"])

    def notes(self, limit_s: float, folder: Path, **request: Any) -> list[list[dict[str, Any]]]:
        """Four ranks that work to the end; what each has noted in ``folder``."""
        environments = [{"RANK": str(rank)} for rank in range(4)]
        codes = self.launch(limit_s, folder=str(folder), ranks=environments, **request)
        assert codes == [0] * 4, logs(folder)
        return [notes_in(folder / f"rank{rank:05d}.0.jsonl") for rank in range(4)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, limit_s: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select([self._process.stdout], [], [], limit_s)
        assert ready, f"no word from the nursery in {limit_s} s"
        return self._process.stdout.readline().strip()


def tiled(spans: Iterable[tuple[Any, int, int]]) -> int:
    """How many elements spans cover, of any keys; those of one key must follow each other without gap or overlap."""
    by_key: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for key, start, end in spans:
        by_key[key].append((start, end))
    total = 0
    for key, parts in by_key.items():
        cursor = 0
        for start, end in sorted(parts):
            assert start == cursor, f"{key}: {sorted(parts)}"
            cursor = end
        total += cursor
    return total


def owned_elements(ranks: Iterable[Mapping[str, Any]]) -> float:
    """How many elements of parameters all optimizers together should hold, by what ``_examine`` found on each rank."""
    total = 0.0
    for found in ranks:
        dense, replicas, expert, expert_replicas = found["elements"]
        total += dense / replicas + expert / expert_replicas if found["sharded"] else dense + expert
    return total


def logs(folder: str | Path) -> str:
    """What the ranks printed."""
    return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in sorted(Path(folder).glob("*.log")))


def notes_in(path: Path) -> list[dict[str, Any]]:
    """One rank's notes; SIGKILL may have cut the last line short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def places(world_size: int, attempt: int) -> list[dict[str, str]]:
    """The environments of all ranks as ``torchrun`` sets them, on one machine, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        for rank in range(world_size)
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One attempt: exit codes, and what each rank noted in it."""

    codes: list[int]
    notes: list[list[dict[str, Any]]]

    def of(self, event: str, rank: int = 0) -> list[dict[str, Any]]:
        return [n for n in self.notes[rank] if n["event"] == event]

    def one(self, event: str, rank: int = 0) -> dict[str, Any]:
        found = self.of(event, rank)
        assert len(found) == 1, (event, rank, self.codes, self.notes[rank][-3:])
        return found[0]

    @property
    def errors(self) -> list[str]:
        return [n["message"] for rank in self.notes for n in rank if n["event"] == "error"]

    @property
    def started(self) -> list[dict[str, Any]]:
        return [self.one("started", r) for r in range(len(self.notes))]

    @property
    def iteration(self) -> int:
        """Where this attempt began."""
        (iteration,) = {s["iteration"] for s in self.started}
        return int(iteration)

    @property
    def fetched(self) -> list[int]:
        """Units that each rank had from another node."""
        return [s["fetched"] for s in self.started]

    def dropped(self, rank: int) -> dict[str, int]:
        """Snapshots that the rank is known to have dropped, by reason."""
        counts = [n["dropped"] for n in self.notes[rank] if "dropped" in n]
        return dict(counts[-1]) if counts else {}

    @property
    def drops(self) -> int:
        """Snapshots known to be dropped, over all ranks."""
        return sum(sum(self.dropped(r).values()) for r in range(len(self.notes)))


class Job:
    """A run: several attempts that share a store."""

    def __init__(
        self, nursery: Nursery, folder: Path, store: Path, *, ranks_per_node: int = 2, **settings: Any
    ) -> None:
        toy = {f.name: settings.pop(f.name) for f in dataclasses.fields(Toy) if f.name in settings}
        self.toy = Toy(**{"exact": settings.get("mode") == "exact", **toy})
        self.folder, self.store = folder, store
        self._nursery = nursery
        self._attempt = -1
        self._per_node = ranks_per_node
        self.book: list[dict[int, dict[str, str]]] = [{} for _ in range(self.toy.world_size)]
        """For each rank the unit hashes after each iteration of the history that is alive."""
        self.lost: dict[int, int] = {}
        """Tokens lost so far over all ranks, after each iteration, by the state alone."""
        self.settings = {
            "store": str(store), "run_id": "job", "ranks_per_node": ranks_per_node, "pack_threads": 1, "timeout_s": 20,
            "chunk_bytes": 4096, "mode": "full", "max_stall_ms": 5000, "report": str(folder / "events.jsonl"),
            **settings,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_nodes(self) -> int:
        return self.toy.world_size // self._per_node

    def node(self, number: int) -> Path:
        return self.store / str(self.settings["run_id"]) / f"node{number}"

    def lose(self, *nodes: int) -> None:
        for number in nodes:
            shutil.rmtree(self.node(number))

    def take_away(self, number: int) -> None:
        """The node is gone for now, and keeps its memory."""
        self.node(number).rename(self._away(number))

    def bring_back(self, number: int) -> None:
        """In place of the node that took over, whose memory is lost."""
        self.lose(number)
        self._away(number).rename(self.node(number))

    def _away(self, number: int) -> Path:
        return self.store / f"away{number}"

    def arena(self, owner: int, node: int) -> Path:
        return self.node(node) / f"rank{owner:05d}.arena"

    def attempt(
        self,
        faults: Iterable[tuple[int, int, str]] = (),
        *,
        kill: tuple[int, int, float] | None = None,
        stop: tuple[int, int, float] | None = None,
        places: Sequence[int] | None = None,
        limit_s: float = 60,
        restarts: int | None = None,
        rank_settings: Mapping[int, Mapping[str, Any]] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Start all ranks once more. ``faults``: (rank, iteration, point) of this attempt. ``places``: the place of
        each rank in the row of nodes. ``kill``: (rank, steps, seconds), a SIGKILL so long after so many of its steps.
        ``stop``: (rank, steps, seconds), a SIGSTOP after so many of its steps, for so long.
        ``changes``: settings of this attempt, of the toy or the runtime."""
        self._attempt += 1
        toy = {f.name: changes.pop(f.name) for f in dataclasses.fields(Toy) if f.name in changes}
        count = self._attempt if restarts is None else restarts
        injected = ",".join(f"{count}:{rank}:{iteration}:{point}" for rank, iteration, point in faults)
        world = self.toy.world_size
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(places[rank] if places else rank),
                "LOCAL_WORLD_SIZE": str(world),
                "TORCHELASTIC_RESTART_COUNT": str(count),
                "ATTEMPT": str(self._attempt),
            }
            for rank in range(world)
        ]
        common = {**self.settings, "inject_fault": injected, **changes}
        per_rank = rank_settings or {}
        codes = self._nursery.launch(
            limit_s,
            folder=str(self.folder),
            configs=[{**common, **per_rank.get(rank, {})} for rank in range(world)],
            toy=dataclasses.asdict(dataclasses.replace(self.toy, **toy)),
            ranks=environments,
            kill=kill
            and {**dict(zip(("rank", "steps", "delay_s"), kill, strict=True)), "notes": str(self._notes(kill[0]))},
            stop=stop
            and {**dict(zip(("rank", "steps", "seconds"), stop, strict=True)), "notes": str(self._notes(stop[0]))},
        )
        return Outcome(codes, [notes_in(self._notes(rank)) for rank in range(world)])

    def _notes(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.{self._attempt}.jsonl"

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def follow(self, outcome: Outcome) -> None:
        """Enter an attempt into the book, after checking that it began where the book says that it may."""
        if any(not outcome.of("started", r) for r in range(self.toy.world_size)):
            return  # it ended while it started, so no step was taken
        if outcome.started[0]["recovered"]:
            self._check_recovery(outcome)
        lost = Counter({i: n for i, n in self.lost.items() if i <= outcome.iteration})
        for rank, book in enumerate(self.book):
            for later in [i for i in book if i > outcome.iteration]:
                del book[later]
            book.setdefault(outcome.iteration, outcome.started[rank]["hashes"])
            for step in outcome.of("step", rank):
                book[step["iteration"]] = step["hashes"]
                lost[step["iteration"]] += step["lost"]
        self.lost = dict(lost)

    def _check_recovery(self, outcome: Outcome) -> None:
        origin: dict[str, int] = {}
        for rank, (book, start) in enumerate(zip(self.book, outcome.started, strict=True)):
            iteration = start["iteration"]
            for name, found in start["hashes"].items():
                at = iteration
                if name not in DENSE:
                    oldest, newest = start["ages"][name]
                    assert oldest == newest, f"{name} of rank {rank} is made of iterations {oldest} to {newest}"
                    assert origin.setdefault(name, oldest) == oldest, f"ranks have {name} of different iterations"
                    assert oldest <= iteration
                    assert self.settings["mode"] == "popularity" or oldest == iteration
                    at = oldest
                assert found == book[at][name], f"rank {rank}: {name} is not what it was at iteration {at}"
        lost = sum(s["lost"] for s in outcome.started)
        before = self.lost.get(outcome.iteration, 0)
        assert [s["lost_tokens"] for s in outcome.started] == [lost - before] * self.toy.world_size
        share = lost / sum(s["processed"] for s in outcome.started) if lost else 0
        assert all(abs(s["plt"] - share) < 1e-12 for s in outcome.started)

    def finish(self, **changes: Any) -> Outcome:
        """The last attempt: it must reach the end on all ranks."""
        outcome = self.attempt(**changes)
        assert outcome.codes == [0] * self.toy.world_size, (outcome.codes, outcome.errors, logs(self.folder))
        self.follow(outcome)
        assert {outcome.one("end", r)["iteration"] for r in range(self.toy.world_size)} == {self.toy.iterations}
        return outcome

    def fail(self, *args: Any, **changes: Any) -> Outcome:
        """An attempt that a SIGKILL ends."""
        outcome = self.attempt(*args, **changes)
        assert KILLED in outcome.codes, (outcome.codes, outcome.errors, logs(self.folder))
        self.follow(outcome)
        return outcome

    def refuse(self, code: int, **changes: Any) -> list[str]:
        """An attempt that every rank must end by itself with this code; what the ranks said."""
        outcome = self.attempt(**changes)
        assert outcome.codes == [code] * self.toy.world_size, (outcome.codes, outcome.errors, logs(self.folder))
        assert not any(outcome.of("step", r) for r in range(self.toy.world_size))
        return outcome.errors

    def assert_as_if_nothing_had_happened(self) -> None:
        assert self.book == uninterrupted(self.toy)


def content(folder: Path) -> dict[str, bytes]:
    """All arenas below a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.arena"))}


def damage_captures(path: Path, iterations: Iterable[int], unit: int = 0, part: str = "payload") -> None:
    """Flip one bit in the captures of one unit."""
    arena = open_arena(path)
    for iteration in iterations:
        record = next((r for r in arena.page.records if r.key == (unit, iteration)), None)
        assert record is not None, f"{path} holds {[r.key for r in arena.page.records]}"
        if part == "payload":
            arena.payload(record.slot)[record.nbytes // 3] ^= 16
        else:
            arena.digests(record.slot)[-1] ^= np.uint64(1)
    arena.close()


def damage_pages(path: Path) -> None:
    """Flip one bit in each manifest page."""
    data = bytearray(path.read_bytes())
    found = [i for i in range(0, len(data), 4096) if data[i : i + 8] == PAGE_MAGIC]
    assert len(found) == 2
    for start in found:
        data[start + 20] ^= 1
    path.write_bytes(data)


def damage_header(path: Path) -> None:
    """Change a letter of a unit's name."""
    data = path.read_bytes()
    assert data.count(b'"layers.0.dense"') == 1
    path.write_bytes(data.replace(b'"layers.0.dense"', b'"layers.0.dence"'))


def truncate(path: Path, keep: float) -> None:
    """Cut a file."""
    os.truncate(path, int(path.stat().st_size * keep))
