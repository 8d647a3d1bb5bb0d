# SPDX-License-Identifier: Apache-2.0
"""Changes to inputs: of bytes as they are, and of what they mean, with digests that are right again afterwards.

Without the second kind nothing would get past a digest. A *shape* takes an input apart into plain values (numbers,
text, bytes, lists and tables), which are changed at random, and puts it together again, whatever became of them.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

Value = Any
BYTES_MAX = 1 << 16
"""Of an input."""
_RAW_SHARE = 0.2
"""Of changes that are to the bytes, digests and all."""
_EDGES = [n + d for n in (0, 1 << 8, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 48, 1 << 63, 1 << 64) for d in (-1, 0, 1)]
_STRANGE: tuple[Value, ...] = (
    None, True, False, 0.5, -0.0, float("nan"), float("inf"), 1e308, 10**400, -(10**30), "", "\ud800", "\0", "²",
    "x" * 300, "9" * 400, [], {}, [[]], {"": []}, "host", "layers.0.dense.grad", "popularity", "exact", "full",
)  # fmt: skip


_DEEP = (b"[" * 50, b'{"a":' * 50)
"""What is no text to go through any more."""


class Shape(NamedTuple):
    """How bytes of one format are taken apart and put together."""

    apart: Callable[[bytes], Value]
    """May raise whatever it likes where the bytes are none of the format."""
    together: Callable[[Value], bytes]
    """Takes whatever became of the values."""


def mutate(data: bytes, shape: Shape, chance: random.Random, bytes_max: int = BYTES_MAX) -> bytes:
    """Another input, from this one."""
    found = raw(data, chance)
    if chance.random() > _RAW_SHARE:
        # Or it is none of the format any more, or nested too deep to be gone through.
        with suppress(Exception):
            parts = shape.apart(data)
            for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
                parts = changed(parts, chance)
            found = shape.together(parts)
    return found if len(found) <= bytes_max else data


def raw(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, put in, taken out, cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0 | 1 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 2:
                size = chance.choice((1, 2, 4, 8))
                found[at : at + size] = (chance.choice(_EDGES) % (1 << 8 * size)).to_bytes(size, "little")
            case 3:
                found[at:at] = chance.choice((b"\0", b"[", b'{"', b"\xff\xfe", b"9" * 50, b"[" * 3000, b'{"a":' * 1500))
            case 4:
                del found[at : at + chance.choice((1, 2, 16, 1000))]
            case _:
                begin = chance.randrange(len(found) + 1)
                found[at:at] = found[begin : begin + chance.choice((1, 8, 48, 500))]
    return bytes(found)


def changed(value: Value, chance: random.Random) -> Value:
    """One change somewhere in a value; lists and tables are changed in place, also further in."""
    if isinstance(value, list) and value and chance.random() < 0.75:
        at = chance.randrange(len(value))
        value[at] = changed(value[at], chance)
        return value
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        value[key] = changed(value[key], chance)
        return value
    return _instead(value, chance)


def _instead(value: Value, chance: random.Random) -> Value:
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return chance.choice(_STRANGE)
    if isinstance(value, int):
        return chance.choice(
            (value + 1, value - 1, -value, value ^ 1 << chance.randrange(64), chance.choice(_EDGES),
             chance.getrandbits(64), chance.randrange(8), chance.choice(_STRANGE))
        )  # fmt: skip
    if isinstance(value, bytes):
        return raw(value, chance)
    if isinstance(value, str):
        cut = chance.randrange(len(value) + 1)
        return chance.choice((value[:cut], value + value[:cut], value[:cut] + "\udfff", chance.choice(_STRANGE)))
    if isinstance(value, list):
        at, kind = chance.randrange(len(value) + 1), chance.randrange(5)
        if kind == 0:
            return value[:at]
        if kind == 1 and value:
            return [*value[:at], copied(chance.choice(value)), *value[at:]]
        if kind == 2 and value:
            return value[:at] + [copied(value[0])] * chance.choice((2, 40)) + value[at:]
        if kind == 3:
            return value[::-1]
        return chance.choice(_STRANGE)
    if isinstance(value, dict):
        found = dict(value)
        if found and chance.random() < 0.5:
            del found[chance.choice(list(found))]
        else:
            found[chance.choice(("", "$bytes", "$tuple", "problem", *found))] = chance.choice(_STRANGE)
        return found
    return chance.choice(_STRANGE)


def copied(value: Value) -> Value:
    """A value that shares nothing which changes with another one."""
    if isinstance(value, list):
        return [copied(each) for each in value]
    return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value


# -- pieces of formats -----------------------------------------------------------------------------------------------


def whole(value: Value, bits: int, *, signed: bool = False) -> int:
    """Some number of so many bits, whatever became of it."""
    number = int(value) if isinstance(value, int) else 0
    number %= 1 << bits
    return number - (1 << bits) if signed and number >> (bits - 1) else number


def items(value: Value) -> list[Value]:
    """A list, whatever became of it."""
    return value if isinstance(value, list) else []


def octets(value: Value) -> bytes:
    """Bytes, whatever became of them."""
    return value if isinstance(value, bytes) else text_of(value)


def fields(layout: str, values: Value) -> bytes:
    """A ``struct`` of integers, whatever became of them; missing ones are 0."""
    kinds = [kind for kind in layout.lstrip("<") if kind.isalpha() and kind != "x"]
    numbers = [*items(values)[: len(kinds)], *[0] * (len(kinds) - len(items(values)))]
    plain = [whole(n, 8 * struct.calcsize(f"<{k}"), signed=k.islower()) for n, k in zip(numbers, kinds, strict=True)]
    return struct.pack(layout, *plain)


def rows(layout: str, data: bytes) -> list[list[int]]:
    """A table of structs as lists of integers."""
    return [list(row) for row in struct.iter_unpack(layout, data)]


def table(layout: str, values: Value) -> bytes:
    """Inverse of ``rows``, whatever became of them."""
    return b"".join(fields(layout, row) for row in items(values))


def text_of(value: Value) -> bytes:
    """JSON, whatever became of it; bytes stand for themselves."""
    if isinstance(value, bytes):
        return value
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError):
        return repr(value).encode(errors="replace")


def document(data: bytes) -> Value:
    """What JSON says. Bytes stay where they say nothing, are nested deep, and now and then: for changes to text."""
    is_deep = any(opening in data for opening in _DEEP)
    with suppress(ValueError):
        return data if is_deep or zlib.crc32(data) % 8 == 0 else json.loads(data)
    return data


RAW = Shape(lambda data: data, octets)
JSON = Shape(document, text_of)
SHEET = Shape(
    lambda data: document(zlib.decompressobj().decompress(base64.b64decode(data), BYTES_MAX)),
    lambda value: base64.b64encode(zlib.compress(text_of(value), 1)),
)
