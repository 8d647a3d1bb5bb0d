# SPDX-License-Identifier: Apache-2.0
"""Host state survives the trip to bytes and back, in room that is known beforehand; odd types are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.errors import CorruptArena, UnsupportedState
from megatron_moetion.snapshot.host_state import decode, encode, size_bound

KEYS = st.text(max_size=8).filter(lambda k: not k.startswith("$"))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(), max_size=20),
    st.binary(max_size=50),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)
STATES = st.dictionaries(KEYS, VALUES, max_size=4)


@given(STATES)
def test_round_trip(state: dict[str, Any]) -> None:
    data = encode(state)
    found = decode(data + b"\0" * 70)
    assert found == state
    assert _types(found) == _types(state)


@given(STATES)
def test_the_bound_holds(state: dict[str, Any]) -> None:
    assert len(encode(state)) <= size_bound(state)


@given(STATES)
def test_the_bound_depends_on_the_shape_alone(state: dict[str, Any]) -> None:
    def other(value: Any) -> Any:
        if isinstance(value, (bool, int, float)):
            return -123456789.123456789e-200
        if isinstance(value, (tuple, list)):
            return type(value)(other(v) for v in value)
        return {k: other(v) for k, v in value.items()} if isinstance(value, dict) else value

    assert size_bound(other(state)) == size_bound(state)
    assert len(encode(other(state))) <= size_bound(state)


def test_numbers_survive_to_the_last_bit() -> None:
    numbers = [math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 2**63, -(2**63), 2**64 - 1]
    found = decode(encode({"n": numbers, "nan": math.nan}))
    assert [(type(n), repr(n)) for n in found["n"]] == [(type(n), repr(n)) for n in numbers]
    assert math.isnan(found["nan"])


def test_the_state_of_a_random_generator_survives() -> None:
    import random

    generator = random.Random(3)
    version, words, gauss = generator.getstate()
    found = decode(encode({"python": (version, words, gauss)}))["python"]
    other = random.Random()
    other.setstate(found)
    assert other.random() == generator.random()


def test_a_number_too_large_for_its_room_is_refused() -> None:
    # NumPy's PCG64 keeps 128-bit integers; the bound allows for 64-bit ones.
    state = {"state": [2**127 - 1] * 20}
    with pytest.raises(UnsupportedState, match=r"host state\.state\[0\]"):
        encode(state)


@pytest.mark.parametrize(
    ("value", "name"),
    [(object(), "object"), (np.int64(3), "int64"), (np.zeros(2), "ndarray"), ({1, 2}, "set"), (1j, "complex"),
     (bytearray(b"x"), "bytearray"), (lambda: None, "function")],
)  # fmt: skip
def test_odd_types_are_refused_by_name_and_place(value: Any, name: str) -> None:
    with pytest.raises(UnsupportedState, match=rf"host state\.a\[1\]\.b is a {name}"):
        encode({"a": [0, {"b": value}]})


@pytest.mark.parametrize("key", [1, None, "$bytes", ("a",)])
def test_odd_keys_are_refused(key: Any) -> None:
    with pytest.raises(UnsupportedState, match="has the key"):
        encode({"a": {key: 1}})


@pytest.mark.parametrize("data", [b"", b"\0" * 8, (100).to_bytes(8, "little") + b"{}", b"\xff" * 20])
def test_a_length_beyond_the_data_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptArena, match="host state claims"):
        decode(data)


def test_nothing_but_json_is_written() -> None:
    body = encode({"a": b"\x00", "b": (1,)})[8:]
    assert json.loads(body) == {"a": {"$bytes": "AA=="}, "b": {"$tuple": [1]}}


def _types(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return (type(value), [_types(v) for v in value])
    return {k: _types(v) for k, v in value.items()} if isinstance(value, dict) else type(value)
