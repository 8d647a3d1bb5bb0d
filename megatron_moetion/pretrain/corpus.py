# SPDX-License-Identifier: Apache-2.0
"""Sources of samples and the sampler.

A source maps (split, sample number) to one sequence; the sampler maps (consumed samples, data parallel rank)
to sample numbers. Both are pure, so the whole data cursor of a run is its number of consumed samples.
"""

from __future__ import annotations

import enum
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_moetion.errors import ConfigError

BYTE_VOCAB_SIZE = 256
STDLIB_BYTES_MAX = 16 << 20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
VALIDATION_EVERY = 20
"""Of the sorted source files, each 20th goes to the validation split and to no other."""

_MASK_64 = (1 << 64) - 1


class Split(enum.Enum):
    """Which part of the data a sample is from."""

    TRAIN = "train"
    VALIDATION = "validation"


class SampleSource(Protocol):
    """Sequences by number. ``sample`` must be a pure function of its arguments."""

    vocab_size: int
    description: str

    def sample(self, split: Split, number: int) -> torch.Tensor:
        """Sequence ``number`` (from 0, without an upper end): int64 ``[seq_length + 1]``, inputs and labels overlap."""
        ...


def source_files(root: Path) -> list[Path]:
    """All ``.py`` files below ``root`` in a fixed order, without tests and installed packages."""
    files = (p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


class StdlibCorpus:
    """Python's own standard library, byte by byte: real text that is on every machine.

    A training sample starts at a position drawn by hashing (seed, number); validation samples lie one after
    the other, from the beginning again at the end.
    """

    vocab_size = BYTE_VOCAB_SIZE

    def __init__(self, *, seq_length: int, seed: int, root: Path | None = None) -> None:
        self._seq_length = seq_length
        self._seed = seed
        root = root or Path(sysconfig.get_paths()["stdlib"])
        texts: dict[Split, list[bytes]] = {split: [] for split in Split}
        total = files = 0
        for files, path in enumerate(source_files(root), start=1):
            text = path.read_bytes()
            total += len(text)
            if total > STDLIB_BYTES_MAX:
                break
            texts[Split.VALIDATION if files % VALIDATION_EVERY == 0 else Split.TRAIN].append(text)
        joined = {split: b"\n".join(parts) for split, parts in texts.items()}
        for split, text in joined.items():
            if len(text) < seq_length + 2:
                raise ConfigError(
                    f"{root} holds {len(text)} bytes of Python source for the {split.value} split; "
                    f"--seq-length {seq_length} needs at least {seq_length + 2}"
                )
        self.tokens = {s: torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()) for s, text in joined.items()}
        digest = hashlib.sha256(b"".join(joined[split] for split in Split)).hexdigest()
        self.description = (
            f"standard library at {root}: {len(joined[Split.TRAIN]):,} training and "
            f"{len(joined[Split.VALIDATION]):,} validation bytes, sha256 {digest[:16]}"
        )

    def sample(self, split: Split, number: int) -> torch.Tensor:
        """Sequence ``number`` as int64 ``[seq_length + 1]``."""
        tokens = self.tokens[split]
        starts = len(tokens) - self._seq_length
        if split is Split.TRAIN:
            start = mix64((self._seed << 32) ^ number) % starts
        else:
            start = number * self._seq_length % starts
        return tokens[start : start + self._seq_length + 1].long()


class MockCorpus:
    """Synthetic sequences that a model can learn: counting by a small step from a random start."""

    vocab_size = BYTE_VOCAB_SIZE
    description = "synthetic sequences"

    def __init__(self, *, seq_length: int, seed: int) -> None:
        self._positions = torch.arange(seq_length + 1)
        self._seed = seed

    def sample(self, split: Split, number: int) -> torch.Tensor:
        """Sequence ``number`` as int64 ``[seq_length + 1]``."""
        bits = mix64((self._seed << 32) ^ number ^ ((split is Split.VALIDATION) << 63))
        start, step = bits % self.vocab_size, 1 + (bits >> 32) % 7
        return (start + step * self._positions) % self.vocab_size


def mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 well-mixed bits of an integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def sample_numbers(
    *, consumed: int, num_microbatches: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterable[list[int]]:
    """The sample numbers of each micro batch of one step on one data parallel rank, in Megatron-LM's order.

    ``consumed`` counts the samples all ranks have taken before this step.
    """
    stride = micro_batch_size * data_parallel_size
    for microbatch in range(num_microbatches):
        first = consumed + microbatch * stride + data_parallel_rank * micro_batch_size
        yield list(range(first, first + micro_batch_size))


def batches(source: SampleSource, split: Split, numbers: Iterable[list[int]]) -> Iterator[torch.Tensor]:
    """Micro batches of tokens: int64 ``[micro_batch_size, seq_length + 1]``."""
    for group in numbers:
        yield torch.stack([source.sample(split, number) for number in group])
