# SPDX-License-Identifier: Apache-2.0
"""Host state as bytes and back: JSON, with bytes and tuples spelled out. Nothing is ever unpickled."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_moetion.errors import NOT_OURS, CorruptArena, UnsupportedState

_LENGTH_BYTES = 8
_NUMBER_BYTES = 32
"""No number takes more: 64-bit integers have up to 20 characters, floats up to 25."""


def encode(state: Mapping[str, Any]) -> bytes:
    """The document's length (8 bytes, little-endian), then the document."""
    body = json.dumps(_plain(state), separators=(",", ":")).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def decode(data: bytes | memoryview) -> dict[str, Any]:
    """Inverse of ``encode``; bytes behind the document are ignored."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if not 0 < length <= len(data) - _LENGTH_BYTES:
        raise CorruptArena(f"host state claims {length} bytes of {len(data) - _LENGTH_BYTES}")
    try:
        state = _restore(json.loads(bytes(data[_LENGTH_BYTES : _LENGTH_BYTES + length])))
    except NOT_OURS as error:
        raise CorruptArena(f"host state is no document of this format: {error}") from error
    if not isinstance(state, dict):
        raise CorruptArena(f"host state is a {type(state).__name__}, not a table")
    return state


def size_bound(state: Mapping[str, Any]) -> int:
    """Bytes that suffice for any document of this shape: the same keys and lengths, whatever the numbers.

    Unlike ``len(encode(state))`` it is the same in every process of a run, so it may enter a layout.
    """
    return _LENGTH_BYTES + _bound(state)


def _bound(value: Any) -> int:
    if isinstance(value, bytes):
        return 16 + 4 * (len(value) // 3 + 1)
    if isinstance(value, str):
        return 8 + 12 * len(value)  # JSON may spell a character as \uXXXX, or as two of them
    if isinstance(value, (tuple, list)):
        return 16 + sum(1 + _bound(v) for v in value)
    if isinstance(value, Mapping):
        return 2 + sum(2 + _bound(k) + _bound(v) for k, v in value.items())
    return _NUMBER_BYTES


def _plain(value: Any, *where: str | int) -> Any:
    """``value`` as JSON has it; ``where`` is its path, put into words only if there is something to complain about."""
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is str:
        return value
    if kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            _refuse(where, f"is an integer of {value.bit_length()} bits; there is room for 64: use bytes")
        return value
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is tuple:
        return {"$tuple": [_plain(v, *where, i) for i, v in enumerate(value)]}
    if kind is list:
        return [_plain(v, *where, i) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                _refuse(where, f"has the key {key!r}; keys must be text that does not start with $")
        return {k: _plain(v, *where, k) for k, v in value.items()}
    _refuse(where, f"is a {kind.__name__}, which host state cannot hold: use plain numbers, text, bytes")


def _refuse(where: tuple[str | int, ...], what: str) -> NoReturn:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
    raise UnsupportedState(f"host state{path} {what}")


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(v) for v in value]
    if isinstance(value, dict):
        if set(value) == {"$bytes"}:
            return base64.b64decode(value["$bytes"])
        if set(value) == {"$tuple"}:
            return tuple(_restore(v) for v in value["$tuple"])
        return {k: _restore(v) for k, v in value.items()}
    return value
