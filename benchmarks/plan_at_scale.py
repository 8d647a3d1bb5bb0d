# SPDX-License-Identifier: Apache-2.0
"""What does one rank do to plan a recovery in a job of many?

One process is one rank of the job: the real ``Startup`` surveys, agrees and orders, over arenas of its own on disk. The
other ranks are a stand-in that says what they would say, as JSON and as tables, so that all of it is decoded. In a
reduction the rank combines as many documents as it has neighbours in a tree. Each rank has one arena of its own and
one replica, with the same captures. All captures are zeros: their bytes would have to be verified and moved at any size
of the job, and are not what is asked here.

Three cases: every rank is where it was; the other node of the placement group has lost its memory; every rank has come
back on another node, and its memory has not.

CPU time is that of the process, memory the growth of its largest resident set over what it had with the stand-in made.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_most, parser, report
from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.exchange import sealed
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.recover.plan import Place, RecoveryPlan, choose_newest_experts, custodian, held_of, order_of
from megatron_moetion.recover.startup import Startup, packed
from megatron_moetion.replicate.channel import Combine, Mesh, Message, Note, Reduced
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.manifest import NO_SLOT, Branch, Page, Records
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.retention import Newest
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaIdentity, ArenaShape, ArenaSpec, arena_name
from megatron_moetion.units import HOST_UNIT, Inventory, Unit, UnitKind

RANKS_A_NODE = 8
NEIGHBOURS = RANKS_A_NODE - 1 + 4
"""Of a node's leader in a tree: the other ranks of its node, and leaders of other nodes."""
EXPERTS_A_LAYER = 39
UNIT_BYTES = 64
CASES = ("in place", "a node lost", "all moved")
NEWEST = 100_000
_MINE = "@"
MOVED_BY = 4
"""Nodes by which ranks have moved."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank did."""

    plan: RecoveryPlan
    cpu_s: float
    heard_bytes: int
    """Of documents that reach every rank."""
    told_bytes: int
    """Of tables and specifications, in both directions."""
    orders: int
    """Owners whose captures this rank loads, sends or receives."""
    fetched: int
    """Captures that came from another node."""


class Job:
    """The whole job on paper, for its rank ``rank``."""

    def __init__(self, world_size: int, records: int, case: str) -> None:
        self.case = case
        self.keys = [f"{n:032x}" for n in range(world_size // RANKS_A_NODE)]
        self.placement: Placement = place([self.keys[r // RANKS_A_NODE] for r in range(world_size)], 1)
        self.rank = world_size // 2 + 5
        self.records = self._records(records)
        self.spec = self.spec_of(self.rank)
        kept: list[list[int]] = [[] for _ in range(world_size)]
        for owner in range(world_size):
            for node in self.nodes_with(owner):
                kept[custodian(owner, node, self.placement)].append(owner)
        self.kept = [sorted(owners) for owners in kept]

    def nodes_with(self, owner: int) -> list[int]:
        """Where an arena of ``owner`` is left."""
        nodes = [self.placement.node_of[r] for r in (owner, *self.placement.holders[owner])]
        if self.case == "a node lost":
            return [n for n in nodes if n != self.placement.node_of[self.placement.holders[self.rank][0]]]
        shift = MOVED_BY if self.case == "all moved" else 0
        return [(n + shift) % self.placement.num_nodes for n in nodes]

    def spec_of(self, owner: int) -> ArenaSpec:
        """Half as many units as captures; 64 ranks have different experts, and then they repeat."""
        units = [(HOST_UNIT, UnitKind.HOST, UNIT_BYTES)]
        for number in range(len(self.records) // 2 - 1):
            layer, position = divmod(number, EXPERTS_A_LAYER + 1)
            expert = owner % 64 * EXPERTS_A_LAYER + position
            units.append(
                (f"layers.{layer}.experts.{expert}", UnitKind.EXPERT, UNIT_BYTES)
                if position
                else (f"layers.{layer}.dense", UnitKind.DENSE, UNIT_BYTES)
            )
        identity = ArenaIdentity(
            run_id="run",
            owner=owner,
            world_size=len(self.placement.node_of),
            topology="paper",
            layout=_layout(owner),
            mode="popularity",
            chunk_bytes=1 << 20,
        )
        return ArenaSpec(
            identity=identity,
            units=tuple((name, int(kind), nbytes) for name, kind, nbytes in units),
            slots=((UNIT_BYTES, len(self.records)),),
        )

    def shared_by(self, rank: int) -> list[str]:
        """Its experts."""
        return [name for name, kind, _ in self.spec_of(rank).units if kind == UnitKind.EXPERT]

    def page(self) -> Page:
        """Of every arena."""
        branches = tuple(Branch(epoch=e, iteration=1000 * e, nonce=e) for e in (1, 2, 3))
        return Page(epoch=3, stable=NEWEST - 1, lineage=17 * 10**17, branches=branches, records=self.records)

    def facts(self) -> str:
        """What all ranks say of themselves, as JSON; ``_MINE`` in place of what this one calls its experts."""
        shape = ArenaShape.of(self.spec)

        def row(rank: int) -> list[Any]:
            experts = _MINE if rank % 64 == self.rank % 64 else f"{rank % 64:016x}"
            layout = _layout(rank)[: len(shape.layout)]
            return [self.keys[self.placement.node_of[rank]], "", layout, shape.slots, shape.experts, experts]

        return json.dumps([row(rank) for rank in range(len(self.placement.node_of))])

    def order_bytes(self, owner: int) -> bytes:
        """What another owner tells those concerned."""
        copies = dict.fromkeys(map(Place, self.nodes_with(owner)), self.records)
        units = [(name, UnitKind(kind)) for name, kind, _ in self.spec_of(owner).units]
        chosen = choose_newest_experts(units, held_of(copies), NEWEST)
        assert not isinstance(chosen, str), chosen
        return order_of(owner, chosen, copies, self.placement).to_bytes()

    def _records(self, count: int) -> Records:
        """Two captures of each unit, all zeros."""
        return Records.make(
            count,
            unit=np.repeat(np.arange(count // 2), 2),
            iteration=np.tile([NEWEST - 1, NEWEST], count // 2),
            epoch=3,
            slot=NO_SLOT,
            tokens=123_456_789,
        )


def _layout(rank: int) -> str:
    return 4 * f"{rank:016x}"


class Others:
    """All other ranks, as a ``Fabric`` and its ``Channel``: they say what they would say."""

    mesh: Mesh
    """There are no connections."""

    def __init__(self, job: Job) -> None:
        self.rank, self.world_size = job.rank, len(job.placement.node_of)
        self.channel = self
        self.heard_bytes = 0
        self.told_bytes = 0
        self._job = job
        self._texts = [job.facts(), json.dumps(job.kept)]
        keepers = {keeper for keeper, owners in enumerate(job.kept) if job.rank in owners} - {job.rank}
        concerned = {*job.placement.owners_held_by(job.rank), *job.kept[job.rank]} - {job.rank}
        table = packed(job.records)
        missing = [o for o in job.placement.owners_held_by(job.rank) if o not in job.kept[job.rank]]
        self._documents: list[Mapping[int, bytes]] = [
            {peer: sealed(table) for peer in keepers},
            {owner: sealed(job.order_bytes(owner)) for owner in concerned},
            {owner: sealed(job.spec_of(owner).to_json()) for owner in missing},
        ]
        """That this rank receives, one swap after the other."""
        self._are_sizes = True

    def gather(self, document: Any) -> list[Any]:
        """The documents of all ranks, decoded here."""
        text = self._texts.pop(0)
        if _MINE in text:
            text = text.replace(_MINE, document[-1])
        self.heard_bytes += len(text)
        return list(json.loads(text))

    def reduce(self, document: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Each neighbour has what this rank has."""
        text = json.dumps(document)
        found = document
        for _ in range(NEIGHBOURS):
            self.heard_bytes += len(text)
            found = combine(found, json.loads(text))
        return json.loads(json.dumps(found))

    def reducer(self, name: str, members: Sequence[int], combine: Combine) -> Echo:
        """Each neighbour says what this rank says."""
        return Echo(combine)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Sizes first, then documents; captures of zeros have no bytes."""
        self.told_bytes += sum(message.data.nbytes for message in (*sends, *receives))
        if not sends and not receives:
            return
        if self._are_sizes:
            while self._documents[0].keys() != {message.peer for message in receives}:
                self._documents.pop(0)
        for message in receives:
            data = self._documents[0][message.peer]
            size = len(data).to_bytes(8, "little")
            message.data[:] = np.frombuffer(size if self._are_sizes else data, dtype=np.uint8)
        if not self._are_sizes:
            self._documents.pop(0)
        self._are_sizes = not self._are_sizes

    def silent(self) -> Mapping[int, float]:
        """Nobody is."""
        return {}

    def abandon(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """There is nothing."""


class Echo:
    """A ``Reducer`` whose other members say what this one says."""

    def __init__(self, combine: Combine) -> None:
        self._combine = combine
        self._results: list[Reduced] = []

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        """See ``Reducer``."""
        found = words
        for _ in range(NEIGHBOURS):
            found = self._combine(found, words)
        self._results.append(Reduced(number=number, words=tuple(found)))

    def results(self) -> list[Reduced]:
        """See ``Reducer``."""
        found, self._results = self._results, []
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        """See ``Reducer``."""
        return True


def measure(world_size: int, records: int, case: str, folder: Path, begun: Callable[[], None] = lambda: None) -> Found:
    """One rank's part in a recovery. ``begun`` is called when all is there that it starts from."""
    job = Job(world_size, records, case)
    others = Others(job)
    clock = SystemClock()
    for owner in job.kept[job.rank]:
        arena = create_arena(folder / arena_name(owner), job.spec_of(owner), replace(job.page(), records=Records()))
        arena.edit(lambda page: {"records": job.records})
        arena.close()
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=UNIT_BYTES)
    pool = HostPool(1)
    packer = Packer(Inventory(units=(host,)), 1 << 20, pool, None)
    startup = Startup(
        config=MoetionConfig(run_id="run", replicas=1),
        fabric=others,
        node=NodeFolder(
            path=folder,
            key=job.keys[job.placement.node_of[job.rank]],
            position=job.rank % RANKS_A_NODE,
            num_ranks=RANKS_A_NODE,
            clock=clock,
        ),
        spec=job.spec,
        pool=pool,
        pinning=Pinning(packer, SystemThreads(), clock),
        choose=choose_newest_experts,
        shared=job.shared_by(job.rank),
        retention=lambda spec: Newest(),
        phases=Phases(clock),
        probe=lambda point, iteration: None,
        clock=clock,
        nonce=7,
    )
    begun()
    began = time.process_time()
    findings = startup.survey(1)
    assert isinstance(findings.outcome, RecoveryPlan), findings.outcome
    fetched = startup.fetch(findings, findings.outcome)
    cpu_s = time.process_time() - began
    startup.close()
    fetched.arenas.close()
    for leftover in fetched.leftovers.values():
        leftover.close()
    home = job.placement.node_of[job.rank]
    return Found(
        plan=findings.outcome,
        cpu_s=cpu_s,
        heard_bytes=others.heard_bytes,
        told_bytes=others.told_bytes,
        orders=len(fetched.mover.orders),
        fetched=int((~fetched.order.is_from(home)).sum()),
    )


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _child(world_size: int, records: int, case: str) -> dict[str, float]:
    """Measured in this process, which is a new one."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    before: list[float] = []
    try:
        found = measure(world_size, records, case, folder, lambda: before.append(_resident_mb()))
    finally:
        shutil.rmtree(folder)
    return {
        "cpu_s": found.cpu_s,
        "memory_mb": _resident_mb() - before[0],
        "heard_mb": found.heard_bytes / 1e6,
        "told_mb": found.told_bytes / 1e6,
    }


def main() -> None:
    """Measure all cases at all sizes and report."""
    options = parser(__doc__ or "")
    options.add_argument("--one", nargs=3, metavar=("RANKS", "CAPTURES", "CASE"), help="one case, in this process")
    args = options.parse_args()
    if args.one:
        print(json.dumps(_child(int(args.one[0]), int(args.one[1]), args.one[2])))
        return
    results: list[Result] = []
    for world_size in (1024, 16384) if args.quick else (64, 256, 1024, 4096, 16384):
        for case in CASES:
            command = [sys.executable, __file__, "--one", str(world_size), "2000", case]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
            found = json.loads(done.stdout)
            name = f"{world_size} ranks, {case}"
            results += [
                at_most(f"{name}: CPU", found["cpu_s"], "s", 1.0),
                at_most(f"{name}: memory", found["memory_mb"], "MB", 100.0),
                Result(name=f"{name}: heard with all ranks", value=found["heard_mb"], unit="MB"),
                Result(name=f"{name}: heard from and told to some", value=found["told_mb"], unit="MB"),
            ]
    report(
        "plan_at_scale", results, args.json, ["2,000 captures an arena, one replica, 8 ranks a node; mode popularity"]
    )


if __name__ == "__main__":
    main()
