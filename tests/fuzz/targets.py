# SPDX-License-Identifier: Apache-2.0
"""Every reader of bytes that a file of the store or a peer can hold, as a function of bytes.

A target does with an input what the runtime does with it, as far as it depends on the input: reading a page includes
the questions that a survey asks of its records. It returns when all is well, and passes errors on.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mutate
import numpy as np
from mutate import JSON, RAW, SHEET, Shape, Value, items, octets, text_of, whole
from stand_ins import (
    Book,
    ControlMesh,
    Heard,
    Image,
    Kernel,
    Said,
    Served,
    Shelf,
    Sock,
    Threads,
    Ticks,
    joined,
    new_arena,
    segments,
)
from support import node_folder

from megatron_moetion.clock import SystemClock
from megatron_moetion.coding import Part
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ChannelError, ConfigError, CorruptArena, IdentityMismatch, MoetionError, StoreError
from megatron_moetion.inspect.judge import Copy, judge
from megatron_moetion.inspect.look import look_at
from megatron_moetion.observe.report import between_iterations, middle_iterations, overlap_with_traffic, read_traces
from megatron_moetion.persist.tracker import TRACKER, latest_iteration
from megatron_moetion.pretrain.flags import RECORD_BYTES, compare
from megatron_moetion.recover.exchange import sealed, swap
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.plan import ORDER, Order, Place, Reach, plan_of, sources_of
from megatron_moetion.recover.report import History, Summary, of_history
from megatron_moetion.recover.shared import ITERATIONS_MAX, common, iterations_of
from megatron_moetion.recover.startup import packed, unpacked
from megatron_moetion.recover.survey import survey_store
from megatron_moetion.replicate.addresses import Directory
from megatron_moetion.replicate.channel import Address, Note
from megatron_moetion.replicate.collective import on_all_ranks, require_same
from megatron_moetion.replicate.control import PURPOSE as CONTROL
from megatron_moetion.replicate.control import Control
from megatron_moetion.replicate.fabric import AloneChannel, SocketFabric
from megatron_moetion.replicate.frames import PURPOSE as HOLD
from megatron_moetion.replicate.frames import Frame, Kind, Opening, receive_frame, send_frame
from megatron_moetion.replicate.holder import Holder
from megatron_moetion.replicate.mirror import (
    Update,
    decode_update,
    difference,
    encode_digests,
    plain,
    records_of,
    table_of,
    update_bytes_max,
)
from megatron_moetion.replicate.reducer import merge_notes, pack, unpack
from megatron_moetion.replicate.sockets import MAGIC as HELLO_MAGIC
from megatron_moetion.replicate.sockets import SocketMesh
from megatron_moetion.replicate.speed import serve_probes
from megatron_moetion.replicate.tree import place_of
from megatron_moetion.replicate.watchdog import named
from megatron_moetion.run.health import ended_before, take_ended
from megatron_moetion.snapshot.codec import Codec
from megatron_moetion.snapshot.digest import digest_of
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.chains import chain_layout
from megatron_moetion.store.manifest import (
    NO_RECORDS,
    Branch,
    Page,
    Record,
    decode_page,
    encode_page,
    in_history,
    is_possible,
    successor,
)
from megatron_moetion.store.node import NODE_MARKER, open_node
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Chains, Newest, Settled
from megatron_moetion.store.sheet import export_problem, has_scales, read_sheet, replay_problem, sheet_of
from megatron_moetion.store.spec import (
    HEADER_PREFIX_BYTES,
    ArenaIdentity,
    ArenaShape,
    ArenaSpec,
    Layout,
    arena_name,
)
from megatron_moetion.store.vetoes import vetoed_in
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

POOL = HostPool(1)
TOKEN = bytes(32)
RECORD_FIELDS = "<IIqIIQQQ"


@dataclass(frozen=True, kw_only=True)
class Target:
    """``allowed``: the errors that callers of what is run expect."""

    name: str
    reads: str
    """What, for a person."""
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    shape: Shape
    allowed: tuple[type[Exception], ...]
    room_bytes: int = 0
    """What an input may make it allocate whatever its size: limits that the runtime sets itself."""


# -- an owner's arena ------------------------------------------------------------------------------------------------


def inventory(*, logs: bool = False) -> Inventory:
    """A dense unit, two experts and the host state; with the gradients of mode ``exact`` if so asked."""

    def unit(name: str, kind: UnitKind, nbytes: int, expert: int | None = None) -> Unit:
        region = Region(
            unit=name, tensor=f"{name}.w", role=Role.MASTER, dtype="float32", start=0, nbytes=nbytes, address=64
        )
        return Unit(name=name, kind=kind, regions=(region,), layer=0, expert=expert)

    units = [unit("layers.0.dense", UnitKind.DENSE, 128)]
    units += [unit(f"layers.0.experts.{e}", UnitKind.EXPERT, 64, e) for e in range(2)]
    if logs:
        units.append(unit("layers.0.dense.grad", UnitKind.LOG, 128))
    units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=100))
    guide = json.dumps(
        {"version": 1, "tensors": {"layers.0.dense.w": 0}, "parameters": [{"views": []}], "problem": None}
    )
    return Inventory(units=tuple(units), place="tp0 pp0", guide=guide)


def identity(owner: int, mode: str) -> ArenaIdentity:
    return ArenaIdentity(
        run_id="run", owner=owner, world_size=2, topology="tp1 pp1", layout="ab" * 32, mode=mode, chunk_bytes=64,
        period=4 if mode == "exact" else 0,
    )  # fmt: skip


@cache
def spec_of(owner: int, mode: str) -> ArenaSpec:
    units = inventory(logs=mode == "exact")
    return ArenaSpec.of(identity(owner, mode), units, {u.name: 2 for u in units.units})


@cache
def image(owner: int, mode: str) -> bytes:
    """An arena of two snapshots, the first one stable, after one recovery."""
    branches = (Branch(epoch=1, iteration=3, nonce=77),)
    arena = new_arena(spec_of(owner, mode), Page(epoch=1, lineage=5, branches=branches), arena_name(owner))
    for iteration in (4, 5):
        records = []
        for number, (name, _, nbytes) in enumerate(arena.spec.units):
            slot = arena.acquire(nbytes)
            assert slot is not None
            payload, digests = arena.payload(slot), arena.digests(slot)
            payload[:] = np.frombuffer(hashlib.shake_128(f"{name} {iteration}".encode()).digest(nbytes), dtype=np.uint8)
            if name == HOST_UNIT:
                state = encode({"adapter": {"iteration": iteration}})
                payload[: len(state)] = np.frombuffer(state, dtype=np.uint8)
            for chunk in range(len(digests)):
                digests[chunk] = digest_of(POOL, payload[64 * chunk : 64 * chunk + 64])
            digest = digest_of(POOL, digests.view(np.uint8))
            records.append(
                Record(unit=number, iteration=iteration, epoch=1, slot=slot, nbytes=nbytes, digest=digest, tokens=9)
            )  # fmt: skip
        arena.add(records)
    arena.edit(lambda page: {"stable": 4})
    return arena.memory.tobytes()


PART = Part(number=3, data=2, parity=1)
"""A computed one."""


@cache
def fragments(owner: int) -> bytes:
    """An arena that has this part of the captures of ``image``."""
    of = Arena(Image(image(owner, "full"), arena_name(owner)))
    spec, page, codec = of.spec.of_part(PART), of.page, Codec(PART.data, PART.parity)
    arena = new_arena(spec, replace(page, records=NO_RECORDS, stable=-1), spec.name)
    records = []
    for record in page.records:
        slot = arena.acquire(PART.stored_bytes(record.nbytes))
        assert slot is not None
        payload, digests = arena.payload(slot), arena.digests(slot)
        codec.fragment(PART.number, of.payload(record.slot), record.digest, 0, payload)
        for chunk in range(len(digests)):
            digests[chunk] = digest_of(POOL, payload[64 * chunk : 64 * chunk + 64])
        digest = digest_of(POOL, digests.view(np.uint8))
        records.append(replace(record, slot=slot, nbytes=payload.nbytes, digest=digest))
    arena.add(records)
    arena.edit(lambda _: {"stable": page.stable})
    return arena.memory.tobytes()


# -- pages -----------------------------------------------------------------------------------------------------------


def page_apart(data: bytes) -> Value:
    magic, sequence, epoch, count, stable, branches, lineage = struct.unpack_from("<8sQIIqI4xQ", data)
    begin = 48 + 16 * branches
    end = begin + 48 * count
    return [
        magic, [sequence, epoch, stable, lineage], mutate.rows("<IIq", data[48:begin]),
        mutate.rows(RECORD_FIELDS, data[begin:end]), 0, 0,
    ]  # fmt: skip


def page_together(value: Value) -> bytes:
    magic, head, branches, records, more_branches, more_records = [*items(value), *[0] * 6][:6]
    sequence, epoch, stable, lineage = [*items(head), *[0] * 4][:4]
    counts = len(items(records)) + whole(more_records, 16), len(items(branches)) + whole(more_branches, 4)
    body = octets(magic).ljust(8, b"\0")[:8]
    body += mutate.fields("<QIIqI4xQ", [sequence, epoch, counts[0], stable, counts[1], lineage])
    body += mutate.table("<IIq", branches) + mutate.table(RECORD_FIELDS, records)
    return body + hashlib.blake2b(body, digest_size=16).digest()


PAGE = Shape(page_apart, page_together)


@cache
def page_of(mode: str) -> Page:
    return Arena(Image(image(0, mode), "seed")).page


def page_seeds() -> list[bytes]:
    many = tuple(Branch(epoch=e, iteration=3 * e, nonce=e) for e in range(1, 33))
    empty = Page(sequence=9, epoch=32, stable=-1, lineage=1, branches=many)
    return [encode_page(page, 64) for page in (page_of("full"), page_of("exact"), empty)]


def read_page(data: bytes) -> None:
    page = decode_page(data)
    if page is None:
        return
    following = replace(successor(page), epoch=page.epoch + 1, lineage=page.lineage + 1)
    expected = following if is_possible(following) else None  # after the last number of all there is no other
    assert decode_page(encode_page(following, len(page.records))) == expected, "what follows a page is a page"
    use_records(page, chain_layout(spec_of(0, "exact").units))


def use_records(page: Page, layout: Any) -> None:
    """What is asked of the records of a page."""
    live = page.records.where(in_history(page.records, page.branches, page.epoch))
    history = History.of(page)
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    history.goes_on_in(history)
    history.fruitless(page.stable)
    difference(live, plain(page.records))
    difference(page.records, table_of(plain(live).table.view(np.uint8)))
    settled = Settled(stable=page.stable, whole={page.stable + 1: False})
    for retention in (Newest(), Chains(layout)):
        retention.keep(page.records, settled)
    live.followed_by(live).sorted()


# -- arenas ----------------------------------------------------------------------------------------------------------


def arena_apart(data: bytes) -> Value:
    length = int.from_bytes(data[8:16], "little")
    spec = ArenaSpec.from_json(data[HEADER_PREFIX_BYTES : HEADER_PREFIX_BYTES + length])
    layout = Layout.of(spec)
    pages = [data[start : start + layout.page_area] for start in layout.page_starts]
    document = mutate.document(data[HEADER_PREFIX_BYTES : HEADER_PREFIX_BYTES + length])
    whole_pages = [page_apart(page) if decode_page(page) else page for page in pages]
    return [data[:8], document, *whole_pages, data[layout.page_starts[1] + layout.page_area :]]


def arena_together(value: Value) -> bytes:
    """With right digests, and with as many bytes as the header says, as far as that is a file that fits an input."""
    magic, document, first, second, slots = [*items(value), *[b""] * 5][:5]
    header = text_of(document)
    prefix = octets(magic).ljust(8, b"\0")[:8] + len(header).to_bytes(8, "little")
    header = prefix + hashlib.blake2b(header, digest_size=16).digest() + header
    pages = [page_together(page) if isinstance(page, list) else octets(page) for page in (first, second)]
    starts, area, nbytes = places_of(header)
    found = bytearray(header.ljust(starts[0], b"\0")[: starts[0]])
    for page in pages:
        found += page[:area].ljust(area, b"\0")
    found += octets(slots)
    return bytes(found[:nbytes].ljust(nbytes, b"\0"))


def places_of(header: bytes) -> tuple[tuple[int, int], int, int]:
    """Of pages and of the end, where the header is one of the format and says so; else any."""
    with suppress(Exception):
        spec = ArenaSpec.from_json(header[HEADER_PREFIX_BYTES:])
        if spec.nbytes <= mutate.BYTES_MAX:
            layout = Layout.of(spec)
            return layout.page_starts, layout.page_area, spec.nbytes
    start = -(-len(header) // 4096) * 4096
    return (start, start + 4096), 4096, start + 9 * 4096


ARENA = Shape(arena_apart, arena_together)


def arena_seeds() -> list[bytes]:
    return [*(image(0, mode) for mode in ("full", "popularity", "exact")), fragments(0)]


def read_arenas(data: bytes) -> None:
    """A survey finds the arena, and so do the tools; where it is sound, the rank goes on with it."""
    names = [name := arena_name(0), arena_name(0, PART)]
    opened = Opened(Shelf(dict.fromkeys(names, data)), lambda arena: None)  # type: ignore[arg-type]
    shapes = [ArenaShape.of(spec_of(owner, "full")) for owner in range(2)]
    reports = survey_store(opened, names, identity(1, "full"), shapes, POOL)
    summary = Summary.of(reports)
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    if summary.newest is not None:
        of_history(reports, summary.newest)
    sources_of({Place(0, report.part): report.records for report in reports if not report.problem}, 0)
    arena = Arena(Image(data, name))
    use_records(arena.page, chain_layout(arena.spec.units))
    update_bytes_max(arena.spec)
    copy = Copy.of(0, arena.spec, arena.page)
    judge([copy, replace(copy, node=1)], vetoed=[5])
    judge([copy, Copy.of(1, spec_of(1, "full"), page_of("full"))])
    slot = arena.acquire(128)
    if slot is not None:
        arena.release([slot])
    arena.edit(lambda page: {"records": page.records[:1]})


# -- sheets ----------------------------------------------------------------------------------------------------------


def sheet_seeds() -> list[bytes]:
    return [sheet_of(inventory(logs=logs)).encode() for logs in (False, True)]


def read_sheets(data: bytes) -> None:
    sheet = read_sheet(data.decode("utf-8", "surrogateescape"))
    export_problem(sheet.guide)
    has_scales(sheet)
    replay_problem(sheet)


# -- host state ------------------------------------------------------------------------------------------------------


def state_apart(data: bytes) -> Value:
    length = int.from_bytes(data[:8], "little")
    return [mutate.document(data[8 : 8 + length]), 0, data[8 + length :]]


def state_together(value: Value) -> bytes:
    document, more, rest = [*items(value), *[0] * 3][:3]
    body = text_of(document)
    return mutate.fields("<Q", [len(body) + whole(more, 12, signed=True)]) + body + octets(rest)


def state_seeds() -> list[bytes]:
    state = {
        "adapter": {"iteration": 5, "rng": (3, (1, 2, 3), None), "cpu": b"\0" * 40, "loss": 0.5},
        "mode": {"ages": [1]},
    }
    return [encode(state), encode({}) + b"\0" * 9]


def read_state(data: bytes) -> None:
    state = decode(data)
    with suppress(MoetionError):  # names that begin with $ are read as they are, and never written
        encode(state)


# -- small files -----------------------------------------------------------------------------------------------------


@cache
def folder() -> Path:
    """For one process; whoever started it removes it."""
    path = Path(tempfile.mkdtemp(prefix="moetion-fuzz-")) / "run" / "node0"
    path.mkdir(parents=True)
    return path


def forget_folder() -> None:
    """Remove it."""
    if folder.cache_info().currsize:
        shutil.rmtree(folder().parents[1])
        folder.cache_clear()


def note_seeds() -> list[bytes]:
    notes: list[dict[str, Any]] = [
        {"lineage": 5, "epoch": 1, "iterations": [3, 4]}, {"pid": 9, "rank": 0, "attempt": 2},
        {"unix_s": 1.5, "detect_s": 2.0},
    ]  # fmt: skip
    return [json.dumps(note).encode() for note in notes] + [b"0123456789abcdef" * 2]


def read_notes(data: bytes) -> None:
    """Vetoes, process ids, the note of an attempt that has ended itself, and the key of a node."""
    place = folder()
    for name in ("rank00000.vetoed.json", "rank00000.pid", "hung.json", NODE_MARKER):
        (place / name).write_bytes(data)
    vetoed_in(place, 5, 1)
    look_at(place, "run")
    node = node_folder(place)
    take_ended(node)
    with suppress(StoreError):
        open_node_again(place)


def tracker_seeds() -> list[bytes]:
    return [b"12\n", b"0000100", b"release"]


def read_tracker(data: bytes) -> None:
    (folder() / TRACKER).write_bytes(data)
    latest_iteration(str(folder()))


def trace_seeds() -> list[bytes]:
    events = [
        {"name": "iteration 4", "ph": "X", "pid": 0, "tid": 0, "ts": 1e6, "dur": 5e5, "args": {"number": 4}},
        {"name": "d2h", "ph": "X", "pid": 0, "tid": 6, "ts": 1.1e6, "dur": 1e5, "args": {"bytes": 4096}},
    ]
    return [b"[\n" + b",\n".join(json.dumps(e).encode() for e in events) + b"\n]\n"]


TRACE = Shape(
    lambda data: [
        mutate.document(line.strip().rstrip(b",")) for line in data.splitlines() if line.strip() not in (b"[", b"]")
    ],
    lambda value: b"[\n" + b",\n".join(text_of(each) for each in items(value)),
)


def read_trace(data: bytes) -> None:
    (folder() / "rank00000.trace.json").write_bytes(data)
    bars = read_traces(folder())
    overlap_with_traffic(bars)
    between_iterations(bars, *middle_iterations(bars))


def flags_seeds() -> list[bytes]:
    flags = {"num_layers": 2, "lr": 0.1, "data_path": ["a"], "train_iters": 10, "add_bias_linear": True, "seed": 1}
    return [json.dumps(flags).encode().ljust(RECORD_BYTES)[:200]]


def read_flags(data: bytes) -> None:
    for same_run in (True, False):
        with suppress(ConfigError):
            compare(data, flags_seeds()[0], same_run=same_run)


# -- frames of owners and holders ------------------------------------------------------------------------------------


class Written:
    """``Connection`` that keeps what is sent."""

    peer = 1

    def __init__(self) -> None:
        self.data = b""

    def send(self, parts: Sequence[Any], *, gate: Any = None) -> None:
        self.data += b"".join(part.tobytes() for part in parts)


def framed(frame: Frame) -> bytes:
    written = Written()
    send_frame(written, POOL, frame)  # type: ignore[arg-type]
    return written.data


def frame_apart(data: bytes) -> Value:
    kind, *words, counts, nbytes, _, _ = struct.unpack_from("<QqqqQQQQ", data)
    body: Value = data[64:]
    dropped, added = counts >> 32, counts & 0xFFFFFFFF
    if nbytes != len(body):
        return data
    if kind == Kind.OPEN:
        body = json.loads(body)
        body["spec"] = json.loads(body["spec"])
    elif kind == Kind.TABLE:
        body = mutate.rows(RECORD_FIELDS, body)
    elif kind == Kind.UPDATE:
        ends = 12 * dropped, 12 * dropped + 28 * added
        body = [
            mutate.rows("<Iq", body[: ends[0]]), mutate.rows("<IIIQQ", body[ends[0] : ends[1]]),
            mutate.rows("<Q", body[ends[1] :]),
        ]  # fmt: skip
    elif kind == Kind.DIGESTS:
        body = mutate.rows("<Q", body)
    return [kind, words, [dropped, added, 0], body]


def frame_together(value: Value) -> bytes:
    if not isinstance(value, list):
        return octets(value)
    kind, words, counts, body = [*value, *[0] * 4][:4]
    dropped, added, more = [*items(counts), *[0] * 3][:3]
    if isinstance(body, dict):
        spec = body.get("spec")
        body = {**body, "spec": text_of(spec).decode(errors="replace") if isinstance(spec, dict) else spec}
        content = text_of(body)
    elif kind == Kind.TABLE:
        content = mutate.table(RECORD_FIELDS, body)
    elif kind == Kind.DIGESTS:
        content = mutate.table("<Q", body)
    elif kind == Kind.UPDATE and len(items(body)) == 3:
        content = mutate.table("<Iq", body[0]) + mutate.table("<IIIQQ", body[1]) + mutate.table("<Q", body[2])
        dropped, added = (
            len(items(part)) if isinstance(n, int) and n < 99 else n
            for n, part in ((dropped, body[0]), (added, body[1]))
        )
    else:
        content = octets(body) if isinstance(body, bytes) else text_of(body)
    array = np.frombuffer(content, dtype=np.uint8)
    head = mutate.fields(
        "<QqqqIIQQ", [kind, *[*items(words), 0, 0, 0][:3], added, dropped, len(content) + whole(more, 4), 0]
    )
    words_sent = np.frombuffer(head, dtype=np.uint64).copy()
    words_sent[6] = digest_of(POOL, array)
    last = digest_of(POOL, words_sent.view(np.uint8))
    return words_sent.tobytes() + last.to_bytes(8, "little") + content


FRAME = Shape(frame_apart, frame_together)
CONVERSATION = Shape(
    lambda data: [frame_apart_or_raw(each) for each in segments(data)],
    lambda value: joined([frame_together(each) for each in items(value)]),
)


def frame_apart_or_raw(data: bytes) -> Value:
    try:
        return frame_apart(data)
    except Exception:  # of the mutator's own reading: what is no frame is changed byte by byte, and fed all the same
        return data


@cache
def opening() -> Opening:
    return Opening(spec=spec_of(1, "full"), page=page_of("full"))


def update_of(arena: Arena, iteration: int) -> tuple[Frame, bytes]:
    """What an owner sends of one iteration: the frame, and the captures' bytes behind it."""
    page = arena.page
    added = page.records.where(page.records.table["iteration"] == iteration)
    slots = added.table["slot"].tolist()
    digests = np.concatenate([arena.digests(slot) for slot in slots])
    update = Update(
        dropped=plain(page.records.where(page.records.table["iteration"] < iteration)), added=added, digests=digests
    )
    frame = Frame(
        kind=Kind.UPDATE, epoch=page.epoch, iteration=iteration, stable=page.stable, dropped=len(update.dropped),
        added=len(added), body=update.encode(),
    )  # fmt: skip
    return frame, b"".join(arena.payload(slot).tobytes() for slot in slots)


def late_update_of(owner: int, iteration: int) -> tuple[Frame, bytes, Frame]:
    """What an owner sends of one iteration to a holder of ``PART``: the frame, fragments, and their digests."""
    arena = Arena(Image(fragments(owner), "seed"))
    page = arena.page
    here = page.records.where(page.records.table["iteration"] == iteration)
    slots = here.table["slot"].tolist()
    update = Update(dropped=NO_RECORDS, added=arena.whole_records(here), digests=np.empty(0, dtype=np.uint64))
    frame = Frame(
        kind=Kind.UPDATE, epoch=page.epoch, iteration=iteration, stable=page.stable, dropped=0, added=len(here),
        body=update.encode(),
    )  # fmt: skip
    chunks = np.concatenate([arena.digests(slot) for slot in slots])
    late = Frame(kind=Kind.DIGESTS, epoch=page.epoch, body=encode_digests(here.table["digest"].copy(), chunks))
    return frame, b"".join(arena.payload(slot).tobytes() for slot in slots), late


def frame_seeds() -> list[bytes]:
    arena = Arena(Image(image(1, "full"), "seed"))
    table = plain(arena.page.records).table.view(np.uint8)
    refused = np.frombuffer(b"no room", dtype=np.uint8)
    return [
        framed(Frame(kind=Kind.OPEN, epoch=1, body=opening().encode())),
        framed(Frame(kind=Kind.TABLE, epoch=1, body=table)),
        framed(update_of(arena, 5)[0]),
        framed(Frame(kind=Kind.NO, epoch=1, body=refused)),
        framed(late_update_of(1, 5)[2]),
        framed(Frame(kind=Kind.DIGESTS, epoch=1, body=np.empty(0, dtype=np.uint8))),
    ]


def read_frame(data: bytes) -> None:
    """One frame as it is understood on either side."""
    connection = Said(data)
    page = page_of("full")
    spec = spec_of(1, "full")
    frame = receive_frame(connection, POOL, body_bytes_max=mutate.BYTES_MAX)
    if frame.kind is Kind.OPEN:
        found = Opening.decode(frame.body, connection.peer)
        assert Opening.decode(found.encode(), connection.peer) == found
        encode_page(found.page, 0)
        found.is_history_of(page)
    elif frame.kind is Kind.TABLE:
        difference(page.records, table_of(frame.body))
    elif frame.kind is Kind.UPDATE:
        sizes = np.array([nbytes for _, _, nbytes in spec.units], dtype=np.int64)
        received = decode_update(
            frame.body, dropped=frame.dropped, added=frame.added, iteration=frame.iteration, unit_bytes=sizes,
            chunk_bytes=64, epoch=1, branches=page.branches,
        )  # fmt: skip
        received.kept(page.records)
    elif frame.kind is Kind.DIGESTS:
        update, _, _ = late_update_of(1, 5)
        stored_bytes = spec.of_part(PART).stored_bytes
        received = decode_update(
            update.body, dropped=0, added=update.added, iteration=5, unit_bytes=stored_bytes, chunk_bytes=64, epoch=1,
            branches=page.branches, is_late=True,
        )  # fmt: skip
        completed = received.completed(frame.body)
        assert completed is None or completed.num_late == 0
    else:
        assert isinstance(frame.reason, str)


def conversation_seeds() -> list[bytes]:
    arena = Arena(Image(image(1, "full"), "seed"))
    opens = framed(Frame(kind=Kind.OPEN, epoch=1, body=opening().encode()))
    other = framed(Frame(kind=Kind.OPEN, epoch=1, body=replace(opening(), page=Page()).encode()))
    update, payload = update_of(arena, 5)
    again, more = update_of(arena, 4)
    drop = framed(Frame(kind=Kind.DROP, epoch=1))
    of_part = framed(
        Frame(kind=Kind.OPEN, epoch=1, body=replace(opening(), spec=opening().spec.of_part(PART)).encode())
    )
    late, fragment_bytes, digests = late_update_of(1, 5)
    gone = framed(Frame(kind=Kind.DIGESTS, epoch=1))
    return [
        joined([b"\0", of_part, framed(late), fragment_bytes, framed(digests), drop]),
        joined([b"\0", of_part, framed(late), fragment_bytes, gone, drop]),
        joined([b"\1", opens, framed(update), payload, drop]),
        joined([b"\1", opens, framed(again), more, framed(update), payload]),
        joined([b"\0", opens, framed(update), payload]),
        joined([b"\1", other, drop]),
        joined([b"\1", drop]),
    ]


@cache
def own_arena() -> Arena:
    """A holder asks no more of it than whose it is."""
    return Arena(Image(image(0, "full"), arena_name(0)))


def hold(data: bytes) -> None:
    """A holder serves an owner that says all this. First byte: whether it has the owner's arena already."""
    first, *said = [*segments(data), b""]
    mesh = Served()
    held = {1: Arena(Image(image(1, "full"), arena_name(1)))} if first[:1] == b"\1" else {}
    arenas = OpenArenas(own=own_arena(), held=held, retention=Newest())
    Holder(mesh=mesh, arenas=arenas, node=Shelf(), pool=POOL, probe=lambda step, at: None, threads=Threads())  # type: ignore[arg-type]
    try:
        mesh.handlers[HOLD](Said(b"".join(said)))
    finally:
        for arena in arenas.held.values():
            Arena(Image(arena.memory, arena.name))  # it can be opened again, whatever was said


def probe_seeds() -> list[bytes]:
    return [struct.pack("<Q", 16) + bytes(16) + struct.pack("<Q", 0)]


def probe(data: bytes) -> None:
    mesh = Served()
    serve_probes(mesh)
    mesh.handlers["probe"](Said(data))


# -- the control plane -----------------------------------------------------------------------------------------------


def tree_key(name: str) -> int:
    """Of a tree of both ranks, as the control plane names it."""
    return int.from_bytes(hashlib.blake2b(f"{name}:1:0,1".encode(), digest_size=8).digest(), "little")


KEYS = (tree_key("collective"), tree_key("reducer/stable"))


def control_apart(data: bytes) -> Value:
    role, *frames = segments(data)
    return [role, *(control_frame_apart(each) for each in frames)]


def control_frame_apart(data: bytes) -> Value:
    if len(data) < 37:
        return data
    kind, key, number, floor = struct.unpack_from("<BQqq", data, 12)
    payload: Value = data[37:]
    with suppress(Exception):
        if kind == 0:
            payload = mutate.rows("<II", payload)
        elif key == KEYS[1]:
            (num,) = struct.unpack_from("<I", payload)
            payload = [
                list(struct.unpack_from(f"<{num}q", payload, 4)),
                0,
                mutate.document(payload[4 + 8 * num :] or b"{}"),
            ]
        else:
            payload = [payload[:1], mutate.document(payload[1:])]
    return [kind, KEYS.index(key) if key in KEYS else key, number, floor, payload]


def control_together(value: Value) -> bytes:
    role, *frames = [*items(value), b""]
    return joined([octets(role)[:1], *(control_frame_together(each) for each in frames if each != b"")])


def control_frame_together(value: Value) -> bytes:
    if not isinstance(value, list):
        return octets(value)
    kind, key, number, floor, payload = [*value, *[0] * 5][:5]
    key = KEYS[key] if isinstance(key, int) and 0 <= key < len(KEYS) else key
    parts = items(payload)
    if isinstance(payload, bytes):
        content = payload
    elif kind == 0:
        content = mutate.table("<II", payload)
    elif key == KEYS[1] and len(parts) == 3:
        words = items(parts[0])
        content = mutate.fields("<I", [len(words) + whole(parts[1], 32)]) + mutate.table("<q", [[w] for w in words])
        content += text_of(parts[2])
    else:
        content = octets(parts[0]) + text_of(parts[1]) if len(parts) == 2 else text_of(payload)
    body = mutate.fields("<BQqq", [kind, key, number, floor]) + content
    length = struct.pack("<I", len(body))
    return length + struct.pack("<II", zlib.crc32(length), zlib.crc32(body)) + body


CONTROL_SHAPE = Shape(control_apart, control_together)
STATE_OF = {"rank": 1, "host": "b", "kind": "StoreError", "text": "full", "ranks": 1}


def control_seeds() -> list[bytes]:
    settings = {"first": {"rank": 1, "settings": {"lr": 1}}, "other": None}
    words = pack((3, -1), {"drop": Note(ranks=1, rank=1, iteration=4, text="late")})
    found = []
    for role, kind in ((b"\0", 3), (b"\1", 4)):
        beats = control_frame_together([0, 0, 0, 0, [[1, 0x40000000], [0, 0x3F800000]]])
        frames = [control_frame_together([kind, 0, n, 0, body]) for n, body in enumerate(
            (b"g" + text_of("host"), b"r" + text_of(STATE_OF), b"r" + text_of(settings))
        )]  # fmt: skip
        others = [control_frame_together([k, 1, 0, 0, b""]) for k in (1, 2)]
        found.append(joined([role, beats, *others, *frames, control_frame_together([kind, 1, 0, 0, words])]))
    found.append(joined([b"\1", control_frame_together([255, 0, 0, 0, b""])]))
    return found


class Complaints(logging.Handler):
    """Keeps the errors that the control plane takes for bugs and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


COMPLAINTS = Complaints()


def control(data: bytes) -> None:
    """One of two ranks starts: its peer says all this. First byte: which rank it is."""
    logger = logging.getLogger("megatron_moetion")
    logger.handlers, logger.propagate = [COMPLAINTS], False
    COMPLAINTS.errors.clear()
    role, *said = [*segments(data), b""]
    rank = int(role[:1] == b"\1")
    threads = Threads()
    mesh = ControlMesh(rank, 2, threads, Sock(b"".join(said), hangs_up=len(data) % 2 == 0))
    plane = Control(mesh, rank, ranks_per_host=1, clock=Ticks(), threads=threads, heartbeat_s=0.005)  # type: ignore[arg-type]
    mesh.kernel.at_rest = plane.abandon
    fabric = SocketFabric(rank, 2, mesh, AloneChannel(), plane, 1.0, (), Address(interface="", host=""))
    reducer = fabric.reducer("stable", [0, 1], lambda mine, theirs: [a & b for a, b in zip(mine, theirs, strict=True)])
    reducer.contribute(0, (7, 7), {"drop": Note(ranks=1, rank=rank, iteration=4, text="late")})
    assert place_of(rank, [0, 1], 1).parent == (0 if rank else None)
    if rank == 0:
        mesh.handlers[CONTROL](mesh.connection(1))
    try:
        hosts = fabric.gather("host")
        named(dict.fromkeys(range(len(hosts)), 1.0), ["a", "b"])
        on_all_ranks(fabric, lambda: None)
        require_same(fabric, {"lr": 1})
    finally:
        threads.run()
        plane.abandon()
        silent = fabric.silent()
        named(silent, ["a", "b"])
        for result in reducer.results():
            assert len(result.words) == 2, "as many words as all give"
        for error in COMPLAINTS.errors:
            if not isinstance(error, ChannelError):
                raise error


def hello_of(rank: Value, to: Value, random: Value, name: Value, magic: Value = HELLO_MAGIC) -> bytes:
    purpose = octets(name)[:255]
    head = octets(magic).ljust(8, b"\0")[:8] + mutate.fields("<II", [rank, to]) + octets(random).ljust(16, b"\0")[:16]
    text = head + bytes([len(purpose)]) + purpose
    return text + hmac.digest(TOKEN, bytes(range(16)) + text, hashlib.sha256)


def hello_apart(data: bytes) -> Value:
    magic, rank, to, random, length = struct.unpack_from("<8sII16sB", data)
    return [rank, to, random, data[33 : 33 + length], magic]


def hello_together(value: Value) -> bytes:
    return hello_of(*[*items(value), *[0] * 5][:5]) if isinstance(value, list) else octets(value)


def hello_seeds() -> list[bytes]:
    return [hello_of(1, 0, bytes(16), HOLD), hello_of(1, 0, bytes(16), CONTROL)]


class Known(Directory):
    """A ``Directory`` that has joined."""

    def __init__(self) -> None:
        self.token = TOKEN

    def find(self, peer: int, timeout_s: float) -> tuple[str, int]:
        return "host", 1


def hello(data: bytes) -> None:
    """Somebody calls, or answers a call."""
    threads = Threads()
    caller = Sock(data, hangs_up=True)
    kernel = Kernel([caller], [Sock(data, hangs_up=True)])
    mesh = SocketMesh(0, 2, Known(), clock=Ticks(), threads=threads, kernel=kernel)  # type: ignore[arg-type]
    mesh.serve(HOLD, lambda connection: None)
    threads.run()
    assert not caller.is_open, "a caller that is served, or is nobody, is let go"
    with suppress(ChannelError):
        SocketMesh(0, 2, Known(), clock=Ticks(1.0), threads=Threads(), kernel=kernel).dial(1, HOLD, 3.0)  # type: ignore[arg-type]


def directory_seeds() -> list[bytes]:
    return [json.dumps([TOKEN.hex(), 8]).encode(), json.dumps(["10.0.0.1", 4242]).encode()]


def directory(data: bytes) -> None:
    """What the rendezvous store says of a job and of a rank."""
    for ask in (lambda d: d.join("host", 1, 8, 0.1, token=b""), lambda d: d.find(0, 0.1)):
        with suppress(ChannelError):
            ask(Directory(Book(data), 1, Ticks()))  # type: ignore[arg-type]


# -- documents of a start --------------------------------------------------------------------------------------------


def swap_apart(data: bytes) -> Value:
    kind, size, document = data[:1], data[1:9], data[9:-16]
    value: Value = document
    with suppress(Exception):
        if kind == b"\0":
            value = mutate.rows(RECORD_FIELDS, document)
        elif kind == b"\1":
            split = 8 + 32 * int.from_bytes(document[:8], "little")
            value = [mutate.rows("<qqqq", document[8:split]), mutate.rows(RECORD_FIELDS + "QQ", document[split:])]
        else:
            value = mutate.document(document)
    return [kind, 0 if int.from_bytes(size, "little") == len(document) + 16 else size, value]


def swap_together(value: Value) -> bytes:
    kind, size, content = [*items(value), *[b""] * 3][:3]
    if isinstance(content, list) and kind == b"\1" and len(content) == 2:
        places, rows = content
        document = mutate.fields("<q", [len(items(places))]) + mutate.table("<qqqq", places)
        document += mutate.table(RECORD_FIELDS + "QQ", rows)
    elif isinstance(content, list):
        document = mutate.table(RECORD_FIELDS, content)
    else:
        document = text_of(content)
    body = sealed(document)
    said = size if isinstance(size, bytes) else struct.pack("<Q", len(body) + whole(size, 4))
    return octets(kind)[:1].ljust(1, b"\0") + said.ljust(8, b"\0")[:8] + body


def swap_seeds() -> list[bytes]:
    records = page_of("full").records
    table = np.zeros(len(records), dtype=ORDER)
    table["record"], table["sources"] = records.table, 0b11
    order = Order(owner=1, places=(Place(0, PART), Place(1, replace(PART, number=1))), table=table)
    return [
        swap_together([b"\0", 0, records.table.tobytes()]), swap_together([b"\1", 0, order.to_bytes()]),
        swap_together([b"\4", 0, packed(records) + packed(records[:1])]),
        swap_together([b"\2", 0, spec_of(1, "full").to_json()]), swap_together([b"\3", 0, b""]),
    ]  # fmt: skip


def swapped(data: bytes) -> None:
    """A peer's table of captures, order or specification; the first byte says what is expected."""
    told = swap(Said(data[1:]), {}, [1], mutate.BYTES_MAX)[1]  # type: ignore[arg-type]
    match data[:1]:
        case b"\0":
            records = records_of(told)
            use_records(replace(page_of("full"), records=records), chain_layout(spec_of(0, "exact").units))
        case b"\1":
            order = Order.from_bytes(1, told)
            order.records.sorted()
            order.lacked_by(0)
            assert len(order.is_rebuilt) == len(order.is_from(0)) == len(order.records)
        case b"\4":
            for records in unpacked(told):
                use_records(replace(page_of("full"), records=records), chain_layout(spec_of(0, "exact").units))
        case _:
            spec = ArenaSpec.from_json(told)
            assert ArenaSpec.from_json(spec.to_json()) == spec
            if spec.nbytes < mutate.BYTES_MAX:
                new_arena(spec, Page(), "theirs")


def words_seeds() -> list[bytes]:
    rows = [[5, 4, *[-1] * (ITERATIONS_MAX - 2)], [-2] * ITERATIONS_MAX]
    return [
        pack((1, 2, 3), {"drop": Note(ranks=1, rank=0, iteration=4, text="late")}),
        pack([n for row in rows for n in row], {}),
    ]


def words_apart(data: bytes) -> Value:
    (num,) = struct.unpack_from("<I", data)
    return [list(struct.unpack_from(f"<{num}q", data, 4)), 0, mutate.document(data[4 + 8 * num :] or b"{}")]


def words_together(value: Value) -> bytes:
    words, more, notes = [*items(value), *[0] * 3][:3]
    numbers = items(words)
    return (
        mutate.fields("<I", [len(numbers) + whole(more, 32)])
        + mutate.table("<q", [[n] for n in numbers])
        + text_of(notes)
    )


def read_words(data: bytes) -> None:
    """A contribution to a round, and a table of experts' iterations in it."""
    words, notes = unpack(data)
    merge_notes(notes, merge_notes({"drop": Note(ranks=1, rank=3, iteration=4, text="late")}, notes))
    pack(words, notes)
    names = ["a", "b"]
    mine = [5, *[-1] * (ITERATIONS_MAX - 1)] * len(names)
    if len(words) == len(mine):  # else they are not combined
        iterations_of(names, common(mine, words))


def document_seeds() -> list[bytes]:
    summary = Summary(newest=History.of(page_of("full")), found=1, began=True, texts=("why",)).to_json()
    reach = Reach(hosts=(5, 4), iterations=(4,), lost=1, named=(1,), vetoed=(5,)).to_json()
    settings = {"first": {"rank": 1, "settings": {"lr": 2}}, "other": None}
    ended = {"unix_s": 1.5, "detect_s": 2.0}
    return [json.dumps(each).encode() for each in (summary, reach, STATE_OF, settings, ended, None)]


def documents(data: bytes) -> None:
    """What another rank says where all compare notes: errors, settings, ends, summaries, iterations within reach."""
    try:
        fabric = Heard(json.loads(data))
    except (ValueError, RecursionError):
        return  # refused by the fabric: see the target of the control plane
    mine = Summary(newest=History(epoch=1), found=1).to_json()
    reach = Reach(hosts=(5, 4), iterations=(5, 4)).to_json()

    def both(mine: Any, theirs: Any) -> Any:
        return Reach.from_json(mine).followed_by(Reach.from_json(theirs)).to_json()

    for compare_notes in (
        lambda: on_all_ranks(fabric, lambda: None),  # type: ignore[arg-type,return-value]
        lambda: require_same(fabric, {"lr": 1}),  # type: ignore[arg-type]
        lambda: ended_before(fabric, node_folder(folder())),  # type: ignore[arg-type]
        lambda: fabric.reduce(mine, lambda a, b: Summary.from_json(a).followed_by(Summary.from_json(b)).to_json()),
        lambda: plan_of(Reach.from_json(fabric.reduce(reach, both)), History(), 1),
    ):
        with suppress(MoetionError):
            compare_notes()


def open_node_again(place: Path) -> None:
    config = MoetionConfig(store=str(place.parents[1]), run_id="run")
    key = open_node(config, "run", {}, 1, SystemClock()).key
    json.dumps(key)


STORE_ERRORS = (CorruptArena, IdentityMismatch)
TARGETS = {
    each.name: each
    for each in (
        Target(name="page", reads="manifest pages, and what is asked of their records", run=read_page, seeds=page_seeds,
               shape=PAGE, allowed=()),
        Target(name="arena", reads="arenas: header, pages, slots; survey, tools, writer", run=read_arenas,
               seeds=arena_seeds, shape=ARENA, allowed=STORE_ERRORS),
        Target(name="sheet", reads="sheets in headers of arenas", run=read_sheets, seeds=sheet_seeds, shape=SHEET,
               allowed=(CorruptArena,)),
        Target(name="state", reads="host state", run=read_state, seeds=state_seeds,
               shape=Shape(state_apart, state_together), allowed=(CorruptArena,)),
        Target(name="notes", reads="small files beside arenas", run=read_notes, seeds=note_seeds, shape=JSON,
               allowed=()),
        Target(name="tracker", reads="the file that names the newest checkpoint", run=read_tracker, seeds=tracker_seeds,
               shape=RAW, allowed=(ConfigError,)),
        Target(name="trace", reads="traces", run=read_trace, seeds=trace_seeds, shape=TRACE, allowed=(ConfigError,)),
        Target(name="flags", reads="flags of the last start", run=read_flags, seeds=flags_seeds, shape=JSON,
               allowed=(CorruptArena,)),
        Target(name="frame", reads="frames of owners and holders", run=read_frame, seeds=frame_seeds, shape=FRAME,
               allowed=(ChannelError,), room_bytes=mutate.BYTES_MAX),
        Target(name="holder", reads="an owner's whole connection to its holder", run=hold, seeds=conversation_seeds,
               shape=CONVERSATION, allowed=(ChannelError,), room_bytes=1 << 20),
        Target(name="probe", reads="probes of a link's speed", run=probe, seeds=probe_seeds, shape=RAW,
               allowed=(ChannelError,), room_bytes=1 << 20),
        Target(name="control", reads="frames of the control plane, and what ranks say in them", run=control,
               seeds=control_seeds, shape=CONTROL_SHAPE, allowed=(MoetionError,)),
        Target(name="hello", reads="the greeting of a connection, both ways", run=hello, seeds=hello_seeds,
               shape=Shape(hello_apart, hello_together), allowed=()),
        Target(name="directory", reads="where ranks listen", run=directory, seeds=directory_seeds, shape=JSON,
               allowed=()),
        Target(name="swap", reads="tables, orders and specifications at a start", run=swapped, seeds=swap_seeds,
               shape=Shape(swap_apart, swap_together), allowed=(ChannelError, CorruptArena),
               room_bytes=mutate.BYTES_MAX),
        Target(name="words", reads="contributions to rounds", run=read_words, seeds=words_seeds,
               shape=Shape(words_apart, words_together), allowed=(ChannelError,)),
        Target(name="documents", reads="what ranks say where all compare notes", run=documents, seeds=document_seeds,
               shape=JSON, allowed=()),
    )
}  # fmt: skip
