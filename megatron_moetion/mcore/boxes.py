# SPDX-License-Identifier: Apache-2.0
"""A stretch of a flat tensor as boxes of the n-dimensional tensors that a checkpoint makes of it. Pure.

A rank holds elements [start, end) of a flattened parameter, wherever the optimizer's sharding has cut it. A checkpoint
on disk has rectangular pieces only. The elements of a view that lie in a stretch follow each other in the order of
their addresses, so they are whole rows, and at most a part of a row before and behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, kw_only=True)
class Box:
    """Elements ``offset`` to ``offset + shape`` of a view: those at places [start, end) in the order of addresses."""

    start: int
    end: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class View:
    """A view of a flat tensor: element ``i`` of it is the tensor's ``first + sum(i * strides)``.

    Strides may be in any order of sizes; ``ValueError`` where addresses of two elements could be the same.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int], first: int) -> None:
        self.shape, self.strides, self.first = tuple(shape), tuple(strides), first
        self.numel = prod(shape)
        self._order = sorted((d for d, n in enumerate(shape) if n > 1), key=lambda d: -strides[d])
        reach = 0
        for dimension in reversed(self._order):
            if strides[dimension] <= reach:
                raise ValueError(f"elements of a view overlap: shape {self.shape}, strides {self.strides}")
            reach += (shape[dimension] - 1) * strides[dimension]

    def before(self, address: int) -> int:
        """How many elements of the view lie at smaller addresses of the flat tensor."""
        rest, place, size = address - self.first, 0, self.numel
        if rest <= 0:
            return 0
        for dimension in self._order:
            count, stride = self.shape[dimension], self.strides[dimension]
            size //= count
            whole = rest // stride
            if whole >= count:
                return place + count * size
            place, rest = place + whole * size, rest - whole * stride
        return place + (rest > 0)

    def boxes(self, start: int, end: int, numel_max: int) -> Iterator[Box]:
        """The elements at places [start, end) in the order of addresses, in boxes of ``numel_max`` at most."""
        for offset, shape in _boxes([self.shape[d] for d in self._order], start, end, numel_max):
            whole_offset, whole_shape = [0] * len(self.shape), [1] * len(self.shape)
            for dimension, first, count in zip(self._order, offset, shape, strict=True):
                whole_offset[dimension], whole_shape[dimension] = first, count
            yield Box(start=start, end=start + prod(shape), offset=tuple(whole_offset), shape=tuple(whole_shape))
            start += prod(shape)


def missing(covered: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that no interval covers; ``covered`` is in the order of its starts."""
    for first, last in covered:
        if first >= end:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end


def _boxes(
    shape: Sequence[int], start: int, end: int, numel_max: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """In row-major order: offset and shape of each."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    rows_max = max(1, numel_max // row)
    while start < end:
        number, inside = divmod(start, row)
        if inside or end - start < row or row > numel_max:  # a part of one row, or all of one that is too large
            last = min(end, (number + 1) * row)
            for offset, size in _boxes(shape[1:], inside, last - number * row, numel_max):
                yield (number, *offset), (1, *size)
        else:
            rows = min((end - start) // row, rows_max)
            last = start + rows * row
            yield (number, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start = last
