# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of fragments as ``docs/snapshot_format.md`` describes it, byte by byte and without the library. Pure."""

from __future__ import annotations

from collections.abc import Mapping

FIELD = 0x11D
"""The polynomial of GF(2^8)."""


def _tables() -> tuple[bytes, ...]:
    """Products of all pairs of bytes."""
    rows = [bytearray(256) for _ in range(256)]
    for a in range(256):
        for b in range(256):
            product, x, y = 0, a, b
            while y:
                product ^= x if y & 1 else 0
                x = (x << 1) ^ (FIELD if x & 0x80 else 0)
                y >>= 1
            rows[a][b] = product
    return tuple(map(bytes, rows))


_PRODUCTS = _tables()


def times(a: int, b: int) -> int:
    """The product of two bytes."""
    return _PRODUCTS[a][b]


def inverse(a: int) -> int:
    """The byte whose product with ``a`` is 1."""
    return _PRODUCTS[a].index(1)


def joined(rows: Mapping[int, bytes], data: int, nbytes: int) -> bytes:
    """A capture of ``nbytes`` bytes from ``data`` rows of it, by number: Gaussian elimination."""
    numbers = sorted(rows)[:data]
    assert len(numbers) == data, f"{len(numbers)} rows of {data}"
    system = [(_factors(n, data), rows[n]) for n in numbers]
    for column in range(data):
        pivot = next(i for i in range(column, data) if system[i][0][column])
        system[column], system[pivot] = system[pivot], system[column]
        factors, row = system[column]
        system[column] = _scaled(factors, row, inverse(factors[column]))
        for i in range(data):
            if i != column and (by := system[i][0][column]):
                factors, row = _scaled(*system[column], by)
                system[i] = (_xor(system[i][0], factors), _xor(system[i][1], row))
    return b"".join(row for _, row in system)[:nbytes]


def _factors(number: int, data: int) -> bytes:
    """Of each row of the capture in this fragment's."""
    if number <= data:
        return bytes(int(j == number - 1) for j in range(data))
    return bytes(inverse((number - 1) ^ j) for j in range(data))


def _scaled(factors: bytes, row: bytes, by: int) -> tuple[bytes, bytes]:
    return factors.translate(_PRODUCTS[by]), row.translate(_PRODUCTS[by])


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")
