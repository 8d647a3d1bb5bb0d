# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that several processes have written stretch by stretch is one that Megatron-Core and torch can load."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import distributed as dist

from megatron_moetion.errors import CorruptArena
from megatron_moetion.mcore.torch_dist import PartWriter, finish
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.units import Role

RANKS = 4
KEYS = {"MASTER": "param", "REMAINDER": "param", "EXP_AVG": "exp_avg", "EXP_AVG_SQ": "exp_avg_sq"}


def view(key: str, shape: Sequence[int], first: int = 0, **fields: Any) -> dict[str, Any]:
    """Of the guide: a contiguous part of a parameter that is the whole tensor of the checkpoint."""
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    return {
        "key": key, "shape": list(shape), "strides": strides, "first": first, "global_shape": list(shape),
        "global_offset": [0] * len(shape), "fragments": None, "prepended": 0, "may_differ": False, **fields,
    }  # fmt: skip


def entry(*views: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    numel = sum(prod(v["shape"]) for v in views)
    return {"numel": numel, "dtype": dtype, "link": 0, "group": 0, "keys": KEYS, "views": list(views)}


GATED = entry(
    view("fc1", (6, 5), global_shape=[24, 5], global_offset=[0, 0]),
    view("fc1", (6, 5), 30, global_shape=[24, 5], global_offset=[12, 0]),
)
OTHER_GATED = entry(
    view("fc1", (6, 5), global_shape=[24, 5], global_offset=[6, 0]),
    view("fc1", (6, 5), 30, global_shape=[24, 5], global_offset=[18, 0]),
)
"""Of the other tensor parallel rank."""
EXPERTS = [
    entry(view("experts", (7, 3), global_shape=[2, 7, 3], global_offset=[e, 0, 0], prepended=1)) for e in range(2)
]
TRANSPOSED = entry({**view("weight1", (4, 9)), "strides": [1, 4]})
NORM = entry(view("norm", (13,)), dtype="float32")
MODEL = [GATED, OTHER_GATED, *EXPERTS, TRANSPOSED, NORM]
ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)


@pytest.fixture
def values() -> list[dict[Role, torch.Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [{role: torch.randn(e["numel"], generator=source) for role in ROLES} for e in MODEL]


def host_state(rank: int) -> dict[str, Any]:
    group = {"lr": 0.1, "betas": (0.9, 0.95), "step": 5, "is_expert_parallel": False}
    return {
        "rng": {
            "torch": b"1", "cuda": b"2", "tracker": {"one": b"3"}, "numpy": ("MT19937", bytes(16), 0, 0, 0.0),
            "python": (3, bytes(8), None),
        },
        "user": {"iteration": 5, "rank": rank}, "scheduler": 40,
        "given": {"scheduler": {"max_lr": 0.1}},
        "optimizers": [{"groups": [group] * (1 + (rank == 2)), "steps": None, "grad_scaler": None}],
    }  # fmt: skip


GUIDE = {
    "sizes": {"world": RANKS},
    "ranks": {},
    "flags": None,
    "optimizers": [{"link": "DistributedOptimizer"}],
    "objects": [
        {"key": "extra", "kind": "none", "content": "", "global_shape": [1], "global_offset": [0]},
        {"key": "scales", "kind": "bytes", "content": "AQI=", "global_shape": [1], "global_offset": [0]},
    ],
}


def cut(numel: int, source: random.Random) -> list[tuple[int, int]]:
    """Stretches that are all of a tensor, cut anywhere."""
    ends = sorted({*source.sample(range(1, numel), min(3, numel - 1)), numel})
    return list(zip([0, *ends], ends, strict=False))


def written(folder: Path, values: list[dict[Role, torch.Tensor]], num_parts: int, seed: int) -> list[dict[str, Any]]:
    """Each stretch goes to one part, and some of them to two."""
    source = random.Random(seed)
    stretches = [(n, start, end) for n in range(len(values)) for start, end in cut(MODEL[n]["numel"], source)]
    source.shuffle(stretches)
    parts = []
    for index in range(num_parts):
        with PartWriter(folder, index, chunk_bytes=40) as writer:
            for place, (number, start, end) in enumerate(stretches):
                if place % num_parts == index or source.random() < 0.2:
                    writer.add(MODEL[number], start, {role: t[start:end] for role, t in values[number].items()})
            for rank in range(index, RANKS, num_parts):
                writer.add_rank(rank, GUIDE, host_state(rank))
            parts.append(decode(encode(writer.close())))
    return parts


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def expected(values: list[dict[Role, torch.Tensor]], role: Role) -> dict[str, torch.Tensor]:
    gated = torch.cat([values[n][role].view(2, 6, 5) for n in (0, 1)], 1).reshape(24, 5)
    experts = torch.stack([values[n][role].view(7, 3) for n in (2, 3)])
    return {"fc1": gated, "experts": experts, "weight1": values[4][role].view(9, 4).T, "norm": values[5][role]}


@pytest.mark.parametrize(("num_parts", "seed"), [(1, 0), (2, 1), (3, 2)])
def test_parts_of_several_processes_are_one_checkpoint(
    tmp_path: Path, values: list[dict[Role, torch.Tensor]], alone: None, num_parts: int, seed: int
) -> None:
    parts = written(tmp_path, values, num_parts, seed)
    finish(tmp_path, list(reversed(parts)), 5)
    loaded = dist_checkpointing.load_plain_tensors(str(tmp_path))
    for role, prefix in zip(ROLES, ("param", "exp_avg", "exp_avg_sq"), strict=True):
        for key, tensor in expected(values, role).items():
            assert torch.equal(loaded[f"optimizer.state.{prefix}.{key}"], tensor), key
    for key, tensor in expected(values, Role.MASTER).items():
        dtype = torch.float32 if key == "norm" else torch.bfloat16
        assert torch.equal(loaded[key], tensor.to(dtype))
        assert loaded[key].dtype is dtype
    assert loaded["progress"] == {"iteration": 5, "rank": 0}, "the lowest rank speaks for the loop"
    assert len(loaded["optimizer"]["optimizer"]["param_groups"]) == 2, "the fullest one for the optimizer"
    assert loaded["opt_param_scheduler"] == {"max_lr": 0.1, "num_steps": 40}
    assert dist_checkpointing.load_content_metadata(str(tmp_path))["distrib_optim_sharding_type"] == "fully_reshardable"
    names = load_sharded_metadata(str(tmp_path))
    assert {"extra/shard_0_1", "scales/shard_0_1", *(f"rng_state/shard_{r}_{RANKS}" for r in range(RANKS))} < {*names}
    asked = {
        "scales": ShardedObject("scales", None, (1,), (0,)),
        "rng": ShardedObject("rng_state", None, (RANKS,), (2,)),
    }
    objects = dist_checkpointing.load(asked, str(tmp_path), validate_access_integrity=False)
    assert objects["scales"].tolist() == [1, 2]
    assert objects["rng"]["torch_rng_state"].tolist() == [*b"1"]


def test_a_stretch_that_no_part_has_is_an_error(tmp_path: Path, values: list[dict[Role, torch.Tensor]]) -> None:
    with PartWriter(tmp_path, 0) as writer:
        writer.add(NORM, 0, {Role.MASTER: values[5][Role.MASTER][:9]})
        writer.add_rank(0, GUIDE, host_state(0))
        part = writer.close()
    with pytest.raises(CorruptArena, match=r"no rank has all of norm: .* ends at element 9"):
        finish(tmp_path, [part], 5)
    assert not (tmp_path / ".metadata").exists()


def test_a_shard_that_no_part_has_is_an_error(tmp_path: Path, values: list[dict[Role, torch.Tensor]]) -> None:
    with PartWriter(tmp_path, 0) as writer:
        writer.add(EXPERTS[0], 0, {Role.MASTER: values[2][Role.MASTER]})
        writer.add_rank(0, GUIDE, host_state(0))
        part = writer.close()
    with pytest.raises(CorruptArena, match=r"no rank has all of .*experts: 21 of 42 elements"):
        finish(tmp_path, [part], 5)


def test_a_part_that_has_gone_is_an_error(tmp_path: Path, values: list[dict[Role, torch.Tensor]]) -> None:
    parts = written(tmp_path, values, 2, 1)
    (tmp_path / parts[1]["file"]).unlink()
    with pytest.raises(CorruptArena, match=r"is not in .* any more"):
        finish(tmp_path, parts, 5)
    assert not (tmp_path / ".metadata").exists()


def test_copies_are_written_once(tmp_path: Path, values: list[dict[Role, torch.Tensor]]) -> None:
    with PartWriter(tmp_path, 0) as writer:
        for _ in range(3):
            writer.add(NORM, 0, {Role.MASTER: values[5][Role.MASTER]})
        assert writer.nbytes == 2 * 13 * 4


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path: Path, values: list[dict[Role, torch.Tensor]]) -> None:
    with PartWriter(tmp_path, 0) as writer:
        writer.add(NORM, 0, {Role.MASTER: values[5][Role.MASTER][:5]})
        with pytest.raises(CorruptArena, match=r"norm is .*float16.* on one rank and .*float32"):
            writer.add({**NORM, "dtype": "float16"}, 5, {Role.MASTER: values[5][Role.MASTER][5:]})


def test_a_state_in_less_than_fp32_is_what_it_stands_for(tmp_path: Path, alone: None) -> None:
    """The lower halves of main values are numbers of their own, as in Megatron's own checkpoints."""
    tensors = {
        Role.MODEL: torch.arange(13, dtype=torch.bfloat16),
        Role.REMAINDER: torch.arange(-6, 7, dtype=torch.int16),
        Role.EXP_AVG: torch.arange(13).to(torch.float8_e4m3fn).view(torch.uint8),
        Role.EXP_AVG_SQ: torch.arange(13, dtype=torch.float16),
    }
    scales = {"exp_avg.scale_inv": torch.tensor([0.5]), "exp_avg_sq.factor": torch.tensor([3.0])}
    with PartWriter(tmp_path, 0) as writer:
        writer.add({**NORM, "dtype": "bfloat16"}, 0, tensors, scales)
        writer.add_rank(0, GUIDE, host_state(0))
        finish(tmp_path, [writer.close()], 5)
    loaded = dist_checkpointing.load_plain_tensors(str(tmp_path))
    assert torch.equal(loaded["norm"], tensors[Role.MODEL])
    expected = {
        "param": torch.arange(-6, 7).float(), "exp_avg": torch.arange(13).float() / 2,
        "exp_avg_sq": torch.arange(13).float() * 3,
    }  # fmt: skip
    for name, values in expected.items():
        found = loaded[f"optimizer.state.{name}.norm"]
        assert torch.equal(found, values), name
        assert found.dtype is torch.float32
