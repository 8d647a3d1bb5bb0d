# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that trains real Megatron-Core models with ``LayerWiseDistributedOptimizer``: Muon and its kind.

Matrices belong to Muon, everything else to Adam. A rank's optimizer has whole parameters of its own, and every rank
needs all of them: megatron-core 0.16 exchanges them by a call of the optimizer, 0.19 also by buckets of DDP that are
laid out for it ("buckets" below), and either way also while the next forward runs ("overlapped").
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if importlib.util.find_spec("emerging_optimizers") is None:
    sys.path.append(str(Path(__file__).parent / "doubles"))

import megatron_exact
import torch
from megatron_trainer import (
    WORLD_SIZE,
    Model,
    Trainer,
    _build,
    _examine,
    _state,
    _step,
    _tear_down,
    join,
)
from torch import distributed as dist
from toy_trainer import Notes

# isort: split
from emerging_optimizers import scalar_optimizers
from megatron.core import optimizer as optimizer_module
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, layer_wise_optimizer, muon
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.attach import Attached
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.pretrain import model as model_module
from megatron_moetion.units import Role

IS_SETTING = "use_layer_wise_distributed_optimizer" in {f.name for f in dataclasses.fields(OptimizerConfig)}
"""Whether Muon is a setting of the ordinary optimizer, as since 0.17; before, it has a function of its own."""
_PP = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
_DP = "--expert-model-parallel-size 2"
_NEWER = "this megatron-core has no such way"


@dataclass(frozen=True, kw_only=True)
class Case:
    flags: str
    optimizer: str = "muon"
    buckets: bool = False
    overlapped: bool = False
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of ``OptimizerConfig``."""

    @property
    def is_here(self) -> bool:
        return IS_SETTING or not (self.buckets or self.overlapped or self.optimizer != "muon")

    @property
    def model(self) -> Model:
        optimizer: dict[str, Any] = dict(self.more)
        ddp: dict[str, Any] = {}
        if IS_SETTING:
            optimizer |= {"optimizer": self.optimizer, "use_layer_wise_distributed_optimizer": True}
        if self.overlapped:
            optimizer["overlap_param_gather"] = ddp["overlap_param_gather"] = True
        return Model(flags=f"--bf16 {self.flags}", optimizer=optimizer, ddp=ddp)


CASES = {
    "pp2 ep2": Case(flags=_PP),
    "ep2 dp2": Case(flags=_DP),
    "ep2 dp2, untied, bf16 gradients": Case(
        flags=f"{_DP} --grad-reduce-in-bf16 --clip-grad 0.05 --untie-embeddings-and-output-weights"
    ),
    "ep2 dp2, overlapped": Case(flags=f"{_DP} --overlap-grad-reduce", overlapped=True),
    "pp2 ep2, buckets": Case(flags=f"{_PP} --disable-bias-linear", buckets=True),
    "ep2 dp2, buckets": Case(flags=f"{_DP} --disable-bias-linear --swiglu", buckets=True),
    "ep2 dp2, buckets, overlapped": Case(
        flags=f"{_DP} --disable-bias-linear --overlap-grad-reduce", buckets=True, overlapped=True
    ),
    "ep2 dp2, adaptive": Case(flags=_DP, optimizer="adaptive_muon"),
    "ep2 dp2, buckets, lion for the rest": Case(
        flags=f"{_DP} --disable-bias-linear", buckets=True, more={"muon_scalar_optimizer": "lion"}
    ),
    "ep2 dp2, lion": Case(flags=_DP, optimizer="lion"),
}


def main(folder: Path, store: Path, work: Sequence[str], environment: Mapping[str, str]) -> int:
    """``work``: what to do, and with which case; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    kind, names = work[0], work[1:] or list(CASES)
    for name in names:
        case = CASES[name]
        if not case.is_here:
            notes.write("case", name=name, absent=_NEWER)
            continue
        with _as_muon(case):
            notes.write("case", name=name, **_KINDS[kind](rank, case, store / name))
    dist.barrier()
    return 0


@contextmanager
def _as_muon(case: Case) -> Iterator[None]:
    """While it is entered, the bundled trainer builds what ``case`` says."""
    before = model_module.DistributedDataParallel, model_module.get_megatron_optimizer
    if case.buckets:
        model_module.DistributedDataParallel = partial(_laid_out, before[0])
    if IS_SETTING:  # it looks the name up where the package is installed as a distribution, which the double is not
        vars(optimizer_module).setdefault("Lion", scalar_optimizers.Lion)
    else:
        model_module.get_megatron_optimizer = partial(
            muon.get_megatron_muon_optimizer, layer_wise_distributed_optimizer=True
        )
    equal = dist.all_gather
    dist.all_gather = partial(_all_gather, equal)
    try:
        yield
    finally:
        dist.all_gather = equal
        model_module.DistributedDataParallel, model_module.get_megatron_optimizer = before


def _all_gather(
    equal: Any, tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Also of tensors of different sizes, which gloo refuses and NCCL takes. What is not waited for has not come."""
    if len({t.numel() for t in tensors}) == 1:
        return equal(tensors, tensor, group=group, async_op=async_op)

    def wait() -> None:
        for place, rank in enumerate(dist.get_process_group_ranks(group)):
            if rank == dist.get_rank():
                tensors[place].copy_(tensor)
            if tensors[place].numel():
                dist.broadcast(tensors[place], src=rank, group=group)

    if async_op:
        return SimpleNamespace(wait=wait)
    wait()
    return None


def _laid_out(make: Any, config: Any, ddp_config: Any, module: torch.nn.Module, **more: Any) -> Any:
    """DDP with buffers of which each rank's part holds whole matrices, as Megatron's training makes them."""
    ddp_config.use_distributed_optimizer = True
    layer_wise_optimizer.tag_params_for_buffer_routing([module])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layout = layer_wise_optimizer.LayerWiseDistributedOptimizer.compute_full_param_layout(
        [p for p in module.parameters() if p.requires_grad],
        3000 if ddp_config.overlap_grad_reduce else None,
        groups.dp_cp.size(),
        ddp_config,
        expert_data_parallel_world_size=groups.expt_dp.size(),
    )
    return make(config, ddp_config, module, full_param_layout=layout, **more)


# -- inventory, and there and back --------------------------------------------------------------------------------


def _inventory(rank: int, case: Case, store: Path) -> dict[str, Any]:
    trainer = _build(rank, case.model)
    found = _examine(trainer, count_tokens=True)
    state = _state(trainer, count_tokens=True)
    assert state.tokens is not None
    experts = {unit.name for unit in state.inventory().units if unit.expert is not None}
    counters = state.tokens.token_counters()
    found |= {
        "optimizers": sorted({type(o).__name__ for o in state.inner_optimizers() if o.param_groups}),
        "chain": type(trainer.optimizer).__name__,
        "not_exported": json.loads(state.inventory().guide)["problem"],
        "counted_elsewhere": sum(c.expert not in experts for c in counters),
        "peers": list(state.expert_peers()),
        "experts": sorted(c.expert for c in counters),
    }
    moe = next(m for chunk in trainer.model for m in chunk.modules() if isinstance(m, MoELayer))
    moe.local_expert_indices.reverse()
    found["experts_moved"] = state.moved()
    moe.local_expert_indices.reverse()
    state.close()
    found["refused"] = _refused(trainer) if "muon" in case.optimizer else {}
    _tear_down()
    return found


def _refused(trainer: Trainer) -> dict[str, str]:
    """What mode ``exact`` says of steps that it cannot repeat."""
    config = trainer.model[0].module.module.config
    inner = next(o for o in _inner_of(trainer) if "Muon" in type(o).__name__)
    found = {}
    for name, owner, field, value in (
        ("tensor parallel", config, "tensor_model_parallel_size", 2),
        ("l2", inner, "weight_decay_method", "l2"),
    ):
        before = getattr(owner, field, None)
        called = "tp_mode" if hasattr(inner, "tp_mode") else "mode"  # in 0.19, and in 0.16
        mode = getattr(inner, called)
        setattr(inner, called, "duplicated")
        setattr(owner, field, value)
        try:
            MegatronState(
                model=trainer.model,
                optimizer=trainer.optimizer,
                scheduler=trainer.scheduler,
                user_state=trainer.state,
                log_steps=True,
            ).close()
            found[name] = ""
        except UnsupportedState as error:
            found[name] = str(error)
        finally:
            setattr(owner, field, before)
            setattr(inner, called, mode)
    return found


def _inner_of(trainer: Trainer) -> list[torch.optim.Optimizer]:
    state = _state(trainer)
    found = state.inner_optimizers()
    state.close()
    return found


# -- mode exact ---------------------------------------------------------------------------------------------------


def _exact(rank: int, case: Case, store: Path) -> dict[str, Any]:
    model = dataclasses.replace(case.model, flags=f"{case.model.flags} --hidden-dropout 0.1")
    return megatron_exact._case(rank, model, store)


# -- mode popularity ----------------------------------------------------------------------------------------------

_ITERATIONS = 9


def _popularity(rank: int, case: Case, store: Path) -> dict[str, Any]:
    """Trains, loses everything, and says what each expert's state is the state of."""
    seen: dict[int, dict[str, str]] = {}
    counts: dict[int, list[int]] = {}
    trainer, attached = _start(rank, case, store, 0)
    attached.start()
    for iteration in range(1, _ITERATIONS + 1):
        _step(trainer)
        attached.on_step_end(iteration)
        attached.drain()
        seen[iteration], counts[iteration] = _by_unit(attached), _counts(attached)
    megatron_exact._end(attached)
    dist.barrier()
    trainer, attached = _start(rank, case, store, 1)
    resumed = attached.start()
    assert resumed is not None
    now = _by_unit(attached)
    found = {
        "iteration": resumed.iteration,
        "ages": {name: [i for i in seen if seen[i][name] == now[name]] for name in now},
        "counts": _counts(attached) == counts[resumed.iteration],
        "losses": _step(trainer)["losses"],
        "model": _model_is_gathered(trainer),
    }
    megatron_exact._end(attached)
    return found


def _start(rank: int, case: Case, store: Path, attempt: int) -> tuple[Trainer, Attached]:
    settings = {"experts_per_snapshot": 2, "staleness_cap": 8}
    return megatron_exact._start(rank, case.model, store, attempt, mode="popularity", **settings)


def _by_unit(attached: Attached) -> dict[str, str]:
    """A hash of each unit's tensors."""
    found: dict[str, Any] = defaultdict(lambda: hashlib.blake2b(digest_size=8))
    for unit in attached.session.running.adapter.inventory().units:
        for region in unit.regions:
            if region.role is not Role.BUFFER:
                found[unit.name].update(ctypes.string_at(region.address, region.nbytes))
    return {name: digest.hexdigest() for name, digest in found.items()}


def _counts(attached: Attached) -> list[int]:
    tokens = attached.session.running.adapter.tokens
    return [int(n) for total in tokens.counters.totals for n in total]


def _model_is_gathered(trainer: Trainer) -> list[str]:
    """Parameters that ranks with the same ones do not have alike."""
    wrong = []
    with trainer.params_gathered():
        for chunk in trainer.model:
            for name, parameter in chunk.named_parameters():
                is_dense = getattr(parameter, "allreduce", True)
                group = (
                    parallel_state.get_data_parallel_group()
                    if is_dense
                    else parallel_state.get_expert_data_parallel_group()
                )
                alike = [torch.empty_like(parameter.data) for _ in range(dist.get_world_size(group))]
                dist.all_gather(alike, parameter.data.contiguous(), group=group)
                if any(not torch.equal(alike[0], other) for other in alike[1:]):
                    wrong.append(name)
    return wrong


_KINDS = {"inventory": _inventory, "exact": _exact, "popularity": _popularity}
