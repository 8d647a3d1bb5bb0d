# SPDX-License-Identifier: Apache-2.0
"""Arenas as ``docs/snapshot_format.md`` describes them, read without the production code. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from megatron_moetion.sim.galois import joined

_BLOCK = 4096
_FRAME = 64
_NO_SLOT = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One record of the current page, and the bytes that it stands for: of a fragment its row alone."""

    unit: str
    iteration: int
    epoch: int
    is_zero: bool
    """It has no slot: all of its bytes are zero."""
    data: bytes
    nbytes: int
    """Of the whole capture."""
    of: int
    """The digest of the capture that a fragment is of; 0 where ``data`` is all of it."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What an arena says."""

    owner: int
    stable: int
    epoch: int
    lineage: int
    units: tuple[tuple[str, int], ...]
    """Name and capture size of each unit."""
    captures: tuple[Capture, ...]
    fragment: int
    """0: captures are whole."""
    rows: int
    """So many fragments rebuild a capture."""
    parity: int


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to have a capture: from one place that has all of it, or from as many fragments as are enough."""

    contents: Contents
    """Of the first of ``places``."""
    capture: Capture
    """All of it."""
    places: tuple[str, ...]


def ways(found: Iterable[tuple[str, Contents]]) -> Iterator[Way]:
    """Every way to have each capture that these arenas list, by place: every choice of enough fragments is one."""
    pieces: dict[tuple[object, ...], dict[int, list[tuple[str, Contents, Capture]]]] = defaultdict(dict)
    for place, contents in found:
        for capture in contents.captures:
            if not contents.fragment:
                yield Way(contents=contents, capture=capture, places=(place,))
            elif not capture.of:
                zeros = replace(capture, data=bytes(capture.nbytes))
                yield Way(contents=contents, capture=zeros, places=(place,))
            else:
                key = (contents.owner, contents.rows, contents.parity, capture.unit, capture.iteration, capture.of)
                pieces[key].setdefault(contents.fragment, []).append((place, contents, capture))
    for numbers in pieces.values():
        rows = next(iter(numbers.values()))[0][1].rows
        for chosen in combinations(sorted(numbers), rows):
            for pick in product(*(numbers[number] for number in chosen)):
                _, contents, capture = pick[0]
                data = joined({c.fragment: piece.data for _, c, piece in pick}, rows, capture.nbytes)
                places = tuple(place for place, _, _ in pick)
                yield Way(contents=contents, capture=replace(capture, data=data, of=0), places=places)


def read(image: bytes) -> Contents | None:
    """An arena's contents; None where its header or both pages do not verify."""
    length = struct.unpack_from("<Q", image, 8)[0] if len(image) >= 32 else 0
    document = image[32 : 32 + length]
    if image[:8] != b"MOETION3" or _digest(document) != image[16:32]:
        return None
    spec = json.loads(document)
    identity = spec["identity"]
    fragment, rows, parity = identity.get("fragment", 0), identity.get("data", 1), identity.get("parity", 0)

    def stored(size: int) -> int:
        row = (size + rows - 1) // rows
        return _FRAME + (row + 63) // 64 * 64 if fragment else size

    pools: Counter[int] = Counter()
    for size, count in spec["slots"]:
        pools[stored(size)] += count
    sizes = [size for size, count in sorted(pools.items()) for _ in range(count)]
    chunk = spec["identity"]["chunk_bytes"]
    has_logs = any(kind == 5 for _, kind, _ in spec["units"])
    most = len(sizes) * (2 if has_logs else 1)
    area = _up(48 + 16 * 32 + 48 * most + 16)
    first = _up(32 + length)
    starts, cursor = [], first + 2 * area
    for size in sizes:
        starts.append(cursor)
        cursor = _up(cursor + size + 8 * -(-size // chunk))
    pages = [page for page in (_page(image[a : a + area]) for a in (first, first + area)) if page is not None]
    if not pages or cursor != len(image):
        return None
    sequence, epoch, stable, lineage, records = max(pages)
    del sequence
    captures = []
    for unit, of_epoch, iteration, slot, nbytes in records:
        name, _, size = spec["units"][unit]
        data, of = bytes(size) if slot == _NO_SLOT else image[starts[slot] : starts[slot] + nbytes], 0
        if fragment and slot != _NO_SLOT:
            (of,), data = struct.unpack_from("<Q", data), data[_FRAME:]
        captures.append(
            Capture(
                unit=name,
                iteration=iteration,
                epoch=of_epoch,
                is_zero=slot == _NO_SLOT,
                data=data,
                nbytes=size,
                of=of,
            )
        )
    return Contents(
        owner=int(identity["owner"]),
        stable=stable,
        epoch=epoch,
        lineage=lineage,
        units=tuple((name, size) for name, _, size in spec["units"]),
        captures=tuple(captures),
        fragment=fragment,
        rows=rows,
        parity=parity,
    )


def mark_of(host_state: bytes) -> bytes:
    """The mark that a capture of the host state holds."""
    length = int(struct.unpack_from("<Q", host_state)[0])
    document = json.loads(host_state[8 : 8 + length])
    return base64.b64decode(document["adapter"]["mark"]["$bytes"])


def _page(data: bytes) -> tuple[int, int, int, int, tuple[tuple[int, int, int, int, int], ...]] | None:
    if data[:8] != b"MOEPAGE1":
        return None
    sequence, epoch, count, stable, branches, _, lineage = struct.unpack_from("<QIIqIIQ", data, 8)
    start = 48 + 16 * branches
    end = start + 48 * count
    if branches > 32 or end + 16 > len(data) or _digest(data[:end]) != data[end : end + 16]:
        return None
    rows = [struct.unpack_from("<IIqIIQQQ", data, start + 48 * n) for n in range(count)]
    return sequence, epoch, stable, lineage, tuple((u, e, i, slot, size) for u, e, i, slot, _, size, _, _ in rows)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _up(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK
