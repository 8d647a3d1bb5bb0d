# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that trains real Megatron-Core models with the precision-aware optimizer, on its CPU twin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron_exact import _case
from megatron_trainer import (
    WORLD_SIZE,
    Model,
    Trainer,
    _build,
    _capture,
    _coverage,
    _gathered_image,
    _image,
    _inner,
    _owned,
    _scramble,
    _span,
    _state,
    _step,
    _tear_down,
    _token_buffers,
    _write_back,
    join,
)

# isort: split
from megatron_disk import differs_from_megatrons  # what comes before has to install stand-ins first
from torch import distributed as dist
from toy_trainer import Notes

from megatron_moetion.mcore.cpu_adam import Float8State, dequantize
from megatron_moetion.units import Role

_DP = "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer"
_PP = f"{_DP} --pipeline-model-parallel-size 2"
_BF16_GRADIENTS = "--grad-reduce-in-bf16 --clip-grad 0.05"
_FP16 = "--fp16 --initial-loss-scale 4194304 --hysteresis 1 --loss-scale-window 3"


def _model(flags: str, **optimizer: Any) -> Model:
    how = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
    return Model(flags=flags, optimizer={**how, **optimizer})


def _moments(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {"exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}


CASES = {
    "fp32 moments": _model(_PP),
    "bf16 moments": _model(f"{_DP} {_BF16_GRADIENTS}", main_grads_dtype=torch.bfloat16, **_moments(torch.bfloat16)),
    "fp16 moments": _model(_DP, **_moments(torch.float16)),
    "FP8 moments": _model(_PP, **_moments(torch.uint8)),
    "FP8 and fp16 moments, overlapped": _model(
        f"{_DP} --overlap-grad-reduce --overlap-param-gather",
        exp_avg_dtype=torch.uint8,
        exp_avg_sq_dtype=torch.float16,
    ),
    "remainders": _model(f"{_PP} {_BF16_GRADIENTS}", main_grads_dtype=torch.bfloat16, store_param_remainders=True),
    "remainders, bf16 moments, overlapped": _model(
        f"{_DP} --overlap-grad-reduce --overlap-param-gather",
        store_param_remainders=True,
        **_moments(torch.bfloat16),
    ),
    "fp16 mains": _model(_DP, main_params_dtype=torch.float16, **_moments(torch.bfloat16)),
    "fp16 parameters, skipped steps": _model(
        f"{_DP.replace('--bf16', _FP16)} --accumulate-allreduce-grads-in-fp32", **_moments(torch.bfloat16)
    ),
    "mains of Megatron": _model(_DP, fp8_recipe="mxfp8", **_moments(torch.bfloat16)),
}
"""The last one is how fp32 mains are kept beside FP8 parameters; parameters are bf16 here."""


def main(folder: Path, store: Path, case: str | None, environment: Mapping[str, str]) -> int:
    """One case in mode ``exact``, or, without one, all cases examined; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    if case is not None:
        notes.write("case", **_case(rank, CASES[case], store))
    else:
        for name, model in CASES.items():
            notes.write("case", name=name, **_examine(_build(rank, model), folder / name.replace(" ", "-")))
            _tear_down()
    dist.barrier()
    return 0


def _examine(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Capture, write a checkpoint on disk of that, go on, scramble, write back and go on again."""
    state = _state(trainer, count_tokens=True)
    inventory = state.inventory()
    counters = [_span(t) for t in _token_buffers(state)]
    while _step(trainer)["skipped"]:  # until the loss scale is small enough
        pass
    trainer.train_step()
    found: dict[str, Any] = _coverage(inventory, [_span(t) for t in _owned(trainer)], counters)
    captures = _capture(state, inventory)
    found["on_disk"] = differs_from_megatrons(trainer, state, folder)
    moved, before = state.moved(), _gathered_image(trainer, state)
    expected = _step(trainer), _gathered_image(trainer, state)
    changed = sorted(k for k in before if before[k] != expected[1][k])
    _scramble(trainer, _token_buffers(state))
    scrambled = _image(trainer, state)
    _write_back(state, inventory, captures)
    restored = _image(trainer, state)
    again = _step(trainer), _gathered_image(trainer, state)
    regions = [r for unit in inventory.units for r in unit.regions]
    found |= {
        "moved": moved,
        "changed": changed,
        "scrambled": sorted(k for k in before if before[k] == scrambled[k]),
        "not_restored": sorted(k for k in before if before[k] != restored[k]),
        "step": expected[0],
        "step_again": again[0],
        "differs_after_step": sorted(k for k in before if expected[1][k] != again[1][k]),
        "optimizers": len(list(_inner(trainer))),
        "roles": sorted({f"{r.role.name} {r.dtype}" for r in regions if r.role not in (Role.BUFFER, Role.WEIGHT)}),
        "bytes": sum(r.nbytes for r in regions if r.role not in (Role.BUFFER, Role.SCALE)),
        "elements": sum(r.nbytes // _SIZES[r.dtype] for r in regions if r.role is Role.EXP_AVG),
        "is_finite": all(bool(t.float().isfinite().all()) for t in _state_tensors(trainer)),
    }
    state.close()
    return found


_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


def _state_tensors(trainer: Trainer) -> Iterator[torch.Tensor]:
    """All main values and moments in fp32, FP8 ones too."""
    for optimizer in _inner(trainer):
        for state in optimizer.state.values():
            yield from (dequantize(t) if isinstance(t, Float8State) else t for t in state.values())
