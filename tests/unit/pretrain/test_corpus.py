# SPDX-License-Identifier: Apache-2.0
"""Samples are pure functions of their number, and ranks share the work without overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moetion.errors import ConfigError
from megatron_moetion.pretrain.corpus import (
    MockCorpus,
    SampleSource,
    Split,
    StdlibCorpus,
    batches,
    mix64,
    sample_numbers,
    source_files,
)


@pytest.fixture(scope="module")
def stdlib() -> StdlibCorpus:
    return StdlibCorpus(seq_length=64, seed=1234)


def test_the_standard_library_is_found_and_large_enough(stdlib: StdlibCorpus) -> None:
    assert "training" in stdlib.description
    sizes = {split: len(stdlib.tokens[split]) for split in Split}
    assert sizes[Split.TRAIN] > 1 << 20
    assert sizes[Split.VALIDATION] > 1 << 15


@pytest.mark.parametrize("kind", [StdlibCorpus, MockCorpus])
def test_samples_repeat_exactly(kind: type[StdlibCorpus] | type[MockCorpus]) -> None:
    first: SampleSource = kind(seq_length=64, seed=7)
    again: SampleSource = kind(seq_length=64, seed=7)
    other: SampleSource = kind(seq_length=64, seed=8)
    for split in Split:
        for number in (0, 1, 5, 10**9):
            sample = first.sample(split, number)
            assert sample.dtype == torch.int64
            assert sample.shape == (65,)
            assert int(sample.min()) >= 0
            assert int(sample.max()) < first.vocab_size
            assert torch.equal(sample, again.sample(split, number))
    assert not torch.equal(first.sample(Split.TRAIN, 3), other.sample(Split.TRAIN, 3))
    assert not torch.equal(first.sample(Split.TRAIN, 3), first.sample(Split.TRAIN, 4))


def test_validation_files_are_held_out(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"m{i:02d}.py").write_bytes(bytes([i]) * 100)
    corpus = StdlibCorpus(seq_length=16, seed=1, root=tmp_path)
    train = {t for n in range(500) for t in corpus.sample(Split.TRAIN, n).tolist()}
    held_out = {t for n in range(50) for t in corpus.sample(Split.VALIDATION, n).tolist()}
    newline = ord("\n")
    assert held_out - {newline} == {19, 39}
    assert not (train - {newline}) & {19, 39}


def test_source_files_are_sorted_and_skip_tests(tmp_path: Path) -> None:
    for name in ("b/z.py", "a.py", "test/x.py", "site-packages/y.py", "b/tests/q.py", "b/__pycache__/c.py", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [p.relative_to(tmp_path).as_posix() for p in source_files(tmp_path)] == ["a.py", "b/z.py"]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="--seq-length 64"):
        StdlibCorpus(seq_length=64, seed=1, root=tmp_path)


@pytest.mark.parametrize(("micro", "ranks", "microbatches"), [(1, 1, 1), (2, 3, 4), (4, 2, 2)])
def test_ranks_share_a_step_without_gap_or_overlap(micro: int, ranks: int, microbatches: int) -> None:
    taken = [
        number
        for rank in range(ranks)
        for group in sample_numbers(
            consumed=100,
            num_microbatches=microbatches,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for number in group
    ]
    assert sorted(taken) == list(range(100, 100 + micro * ranks * microbatches))


def test_batches_have_the_shape_of_a_micro_batch() -> None:
    shapes = [b.shape for b in batches(MockCorpus(seq_length=8, seed=1), Split.TRAIN, [[0, 1], [4, 5], [8, 9]])]
    assert shapes == [(2, 9)] * 3


def test_mix64_spreads() -> None:
    values = {mix64(i) % 1000 for i in range(200)}
    assert len(values) > 150
    assert all(0 <= mix64(i) < 1 << 64 for i in (0, 1, 1 << 70, -1))
