# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that builds real Megatron-Core models, one after another, and examines what is captured of each.

What a rank owns is found here by walking optimizers and modules, without the layout that the inventory is made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from toy_trainer import Notes

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore import cpu_device

cpu_device.install()

# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

try:
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker as forget_metrics
except ImportError:  # megatron-core 0.16

    def forget_metrics() -> None:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.mcore.attach import attach
from megatron_moetion.mcore.router import RECENT_ITERATIONS, Counts
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.pretrain import model as model_module
from megatron_moetion.pretrain.corpus import MockCorpus
from megatron_moetion.pretrain.loop import Trainer
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.report import Reporter
from megatron_moetion.pretrain.startup import form_groups
from megatron_moetion.recover.capacity import CapacityRules
from megatron_moetion.snapshot.digest import is_intact
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.units import Inventory, Role, UnitKind

CHUNK_BYTES = 4096
WORLD_SIZE = 4
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 48 --moe-aux-loss-coeff 1e-2 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 "
    "--lr 1e-2 --lr-warmup-iters 4 --lr-decay-style cosine --mock-data --eval-iters 0 --distributed-timeout-minutes 1"
)
_TWO_BY_TWO = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the bundled trainer, and what its flags do not offer: fields of Megatron's own configurations."""

    flags: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of ``TransformerConfig``."""
    config_class: type | None = None
    """In place of ``TransformerConfig``."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Of ``OptimizerConfig``."""
    ddp: Mapping[str, Any] = field(default_factory=dict)
    """Of ``DistributedDataParallelConfig``."""
    gpt: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``GPTModel``; a function is called with all others."""
    frozen: str | None = None
    """Parameters whose name begins with this are not trained."""


CASES = {
    "pp2 ep2, bf16, distributed, tied": f"{_TWO_BY_TWO} --bf16 --use-distributed-optimizer",
    "pp2 ep2, fp32, untied": f"{_TWO_BY_TWO} --untie-embeddings-and-output-weights",
    "ep2 dp2, bf16, distributed": "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer",
    "ep2 dp2, bf16": "--expert-model-parallel-size 2 --bf16",
    "ep2 dp2, fp32, distributed, overlapped": (
        "--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    ),
    "ep4, bf16, expert bias, shared expert": (
        "--expert-model-parallel-size 4 --bf16 --use-distributed-optimizer --swiglu --disable-bias-linear "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-shared-expert-intermediate-size 24"
    ),
    "pp2 ep2, fp16, frozen embedding": Model(
        flags=f"{_TWO_BY_TWO} --fp16 --initial-loss-scale 65536 --untie-embeddings-and-output-weights",
        frozen="embedding.",
    ),
    "ep2 dp2, bf16, capacity": (
        "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer --moetion --moe-expert-capacity-factor 1 "
        "--moe-token-dispatcher-type alltoall"
    ),
    "pp2 ep2 in four stages, bf16, distributed": (
        f"{_TWO_BY_TWO} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --bf16 --use-distributed-optimizer"
    ),
}
WITHOUT_COUNTS = "ep2 dp2, bf16"
RECALIBRATED = {
    "by probability": "--moe-token-drop-policy probs",
    "by position": "--moe-token-drop-policy position",
    "padded": "--moe-pad-expert-input-to-capacity",
}
RECALIBRATION_ITERATIONS = 6
REPLACED = {
    "pp2 ep2, fp16": f"{_TWO_BY_TWO} --fp16 --initial-loss-scale 65536 --use-distributed-optimizer",
    "dp4, bf16 gradients": "--bf16 --grad-reduce-in-bf16 --swiglu --disable-bias-linear",
    "pp2 ep2, fp32": _TWO_BY_TWO,
}
"""Models that are trained with checkpoints in mode ``exact``, which replaces the most of Megatron's methods."""

Span = tuple[int, int]
"""Addresses [start, end)."""


def main(folder: Path, environment: Mapping[str, str]) -> int:
    """Examine all cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for name, flags in CASES.items():
        trainer = _build(rank, flags)
        notes.write("case", name=name, **_examine(trainer, count_tokens=name != WITHOUT_COUNTS))
        if name == list(CASES)[-1]:
            notes.write("refusals", **_refusals(trainer))
        _tear_down()
    for name, flags in REPLACED.items():
        trainer = _build(rank, flags)
        notes.write("replaced", name=name, **_replaced(trainer, folder / "store" / name))
        _tear_down()
    for name, flags in RECALIBRATED.items():
        capacity = (
            "--expert-model-parallel-size 2 --moetion --moe-expert-capacity-factor 1 "
            "--moe-token-dispatcher-type alltoall"
        )
        recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        trainer = _build(rank, f"{capacity} {recompute} {flags}")
        notes.write("recalibration", name=name, **_recalibrate(trainer))
        _tear_down()
    dist.barrier()
    return 0


def join(folder: Path, rank: int) -> None:
    """Meet the other ranks."""
    with_port = dist.FileStore(str(folder / "rendezvous"), WORLD_SIZE)  # slow where many groups are made: for this only
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, WORLD_SIZE, is_master=True, wait_for_workers=False)
        with_port.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(with_port.get("port")), WORLD_SIZE, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    _share_groups()
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)


def _share_groups() -> None:
    """Models that are built one after another get the same groups, as far as they are of the same ranks.

    Nothing ends a model's groups: hooks in C++ keep the model alive, and it keeps them. Each has threads of gloo that
    wake up a hundred times a second, so that those of twenty models leave nothing of two cores.
    """
    make = dist.new_group
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def new_group(ranks: Any = None, *how: Any, backend: Any = None, **more: Any) -> dist.ProcessGroup:
        if ranks is None or backend is not None:  # those that Megatron names gloo are destroyed with the model
            return make(ranks, *how, backend=backend, **more)
        key = tuple(ranks)
        if key not in made:
            made[key] = make(ranks, *how, **more)
        return made[key]

    dist.new_group = new_group


def _tear_down() -> None:
    forget_metrics()  # one for the process: it has as many layers as the first model
    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    dist.barrier()


def _build(rank: int, model: Model | str) -> Trainer:
    model = Model(flags=model) if isinstance(model, str) else model
    args = parse_arguments(f"{MODEL} {model.flags}".split(), Machine.here(WORLD_SIZE, has_gpu=False))
    form_groups(args, Process(rank=rank, world_size=WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE))
    source = MockCorpus(seq_length=args.seq_length, seed=args.seed)
    with as_modelled(model):
        trainer = Trainer(args, source, Reporter(args, active=False, attempt=0))
    for chunk in trainer.model:
        chunk.train()
    return trainer


@contextmanager
def as_modelled(model: Model) -> Iterator[None]:
    """While it is entered, the bundled trainer builds ``model``."""
    more = {
        "TransformerConfig": model.config,
        "OptimizerConfig": model.optimizer,
        "DistributedDataParallelConfig": model.ddp,
        "GPTModel": model.gpt,
    }
    before = {name: getattr(model_module, name) for name in (*more, "build_chunk")}

    def make(name: str, **fields: Any) -> Any:
        cls = (model.config_class if name == "TransformerConfig" else None) or before[name]
        fields |= {k: v(**fields) if callable(v) and name == "GPTModel" else v for k, v in more[name].items()}
        return cls(**fields)

    def build_chunk(*how: Any) -> torch.nn.Module:
        chunk = before["build_chunk"](*how)
        for name, parameter in chunk.named_parameters():
            if model.frozen is not None and name.startswith(model.frozen):
                parameter.requires_grad_(False)
        return chunk

    for name in more:
        setattr(model_module, name, partial(make, name))
    model_module.build_chunk = build_chunk
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(model_module, name, original)


def _state(trainer: Trainer, count_tokens: bool = False) -> MegatronState:
    return MegatronState(
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        user_state=trainer.state,
        count_tokens=count_tokens,
    )


def _examine(trainer: Trainer, count_tokens: bool) -> dict[str, Any]:
    state = _state(trainer, count_tokens)
    inventory = state.inventory()
    counters = [_span(t) for t in _token_buffers(state)]
    for _ in range(2):
        trainer.train_step()
    found = _coverage(inventory, [_span(t) for t in _owned(trainer)], counters)
    captures = _capture(state, inventory)
    before, moved = _gathered_image(trainer, state), state.moved()
    expected = _step(trainer), _gathered_image(trainer, state)
    _scramble(trainer, _token_buffers(state))
    scrambled = _image(trainer, state)
    _write_back(state, inventory, captures)
    restored = _image(trainer, state)
    again = _step(trainer), _gathered_image(trainer, state)
    mains = [p for inner in _inner(trainer) for group in inner.param_groups for p in group["params"]]
    for inner in (i for i in _inner(trainer) if mains and mains[0] in i.state):  # none where a rank's all are frozen
        moment = next(k for k in inner.state[mains[0]] if k != "step")
        inner.state[mains[0]][moment] = inner.state[mains[0]][moment].clone()
    found |= {
        "moved": moved,
        "moved_later": state.moved(),
        "scrambled": sorted(k for k in before if before[k] == scrambled[k]),
        "not_restored": sorted(k for k in before if before[k] != restored[k]),
        "step": expected[0],
        "step_again": again[0],
        "differs_after_step": sorted(k for k in before if expected[1][k] != again[1][k]),
        "counts": sum(int(t.sum()) for t in state.tokens.counters.totals) if state.tokens is not None else 0,
        "kinds": {kind.name: len(inventory.of_kind(kind)) for kind in UnitKind},
        "tensors": {
            kind.name: sorted({r.tensor for i in inventory.of_kind(kind) for r in inventory.units[i].regions})
            for kind in (UnitKind.EXPERT, UnitKind.DENSE)
        },
        "spans": _master_spans(inventory),
        "elements": _elements(trainer),
        "sharded": trainer.args.use_distributed_optimizer,
        "guide": json.loads(inventory.guide),
    }
    state.close()
    return found


# -- what a rank owns ---------------------------------------------------------------------------------------------


def _inner(trainer: Trainer) -> Iterator[torch.optim.Optimizer]:
    def links(optimizer: Any) -> Iterator[Any]:
        for link in getattr(optimizer, "chained_optimizers", ()):
            yield from links(link)
        if not hasattr(optimizer, "chained_optimizers") and not optimizer.is_stub_optimizer:
            yield optimizer.optimizer

    yield from links(trainer.optimizer)


def _owned(trainer: Trainer) -> Iterator[torch.Tensor]:
    """All training state of this rank that is not a function of other training state."""
    for optimizer in _inner(trainer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield from _state_of(optimizer, parameter)
    for chunk in trainer.model:
        yield from (p.detach() for p in chunk.parameters() if not p.requires_grad)
        parameters = {id(p) for p in chunk.parameters()}
        for module in chunk.modules():
            for name, buffer in module._buffers.items():
                is_state = isinstance(module, TopKRouter) or name not in module._non_persistent_buffers_set
                if buffer is not None and is_state and id(buffer) not in parameters:
                    yield buffer


def _state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of one parameter of an optimizer; without the parameter where it is a main value in 16 bits."""
    state = {k: v for k, v in optimizer.state[parameter].items() if k != "step"}
    master = state.get("master_param")
    if master is None or master.dtype is not torch.float32 or parameter.dtype is torch.float32:
        yield parameter.detach()
    for name, tensor in state.items():
        is_fp8 = hasattr(tensor, "_quantizer")
        yield tensor._data if is_fp8 else tensor
        if is_fp8:
            yield from (tensor._scale_inv, tensor._quantizer.scale, tensor._quantizer.amax)
        if is_fp8 or tensor.dtype is torch.float16:
            yield optimizer._scales[parameter][name]


def _span(tensor: torch.Tensor) -> Span:
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _union(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(s for s in spans if s[0] < s[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _size(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)


def _common(a: Sequence[Span], b: Sequence[Span]) -> int:
    """Bytes in both; each without overlaps in itself."""
    return _size(a) + _size(b) - _size(_union([*a, *b]))


def _coverage(inventory: Inventory, owned: Sequence[Span], counters: Sequence[Span]) -> dict[str, int]:
    regions = [(r.address, r.address + r.nbytes) for unit in inventory.units for r in unit.regions]
    captured, wanted = _union(regions), _union([*owned, *counters])
    return {
        "owned": _size(wanted),
        "missed": _size(wanted) - _common(wanted, captured),
        "twice": _size(regions) - _size(captured),
        "of_others": _size(captured) - _common(wanted, captured),
    }


def _master_spans(inventory: Inventory) -> list[tuple[str, str, int, int]]:
    """Elements of each parameter whose state is captured here, by role."""
    return [
        (r.tensor, r.role.name, r.start, r.start + r.nbytes // 4)
        for unit in inventory.units
        for r in unit.regions
        if r.role in (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)
    ]


def _elements(trainer: Trainer) -> list[int]:
    """Trained elements on this rank and the ranks that train the same: [dense, ranks, expert, ranks]."""
    trained = [p for chunk in trainer.model for p in chunk.parameters() if p.requires_grad]
    expert = sum(p.numel() for p in trained if not getattr(p, "allreduce", True))
    dense = sum(p.numel() for p in trained) - expert
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return [dense, replicas, expert, dist.get_world_size(parallel_state.get_expert_data_parallel_group())]


# -- there and back -----------------------------------------------------------------------------------------------


def _capture(state: MegatronState, inventory: Inventory) -> list[np.ndarray]:
    pool = HostPool(1)
    packer = Packer(inventory, CHUNK_BYTES, pool, None)
    packer.freeze(encode({"adapter": state.host_state(), "session": {}}))
    captures = [_aligned(unit.nbytes) for unit in inventory.units]
    chunks = [np.zeros(-(-c.nbytes // CHUNK_BYTES), dtype=np.uint64) for c in captures]
    targets = Targets(
        units=np.arange(len(captures)),
        addresses=np.array([c.ctypes.data for c in captures]),
        digests=np.array([c.ctypes.data for c in chunks]),
    )
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    for capture, own, digest in zip(captures, chunks, digests.tolist(), strict=True):
        assert is_intact(pool, CHUNK_BYTES, capture, own, digest)
    return captures


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.zeros(nbytes + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def _write_back(state: MegatronState, inventory: Inventory, captures: Sequence[np.ndarray]) -> None:
    packer = Packer(inventory, CHUNK_BYTES, HostPool(1), None)
    for number, capture in enumerate(captures):
        packer.scatter(number, capture)
    (host,) = inventory.of_kind(UnitKind.HOST)
    state.load_host_state(decode(captures[host].tobytes())["adapter"])
    state.copy_to_model()
    state.resync()


def _everything(trainer: Trainer, counters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is owned, what follows from it, and the counters."""
    found = {f"owned {i}": t for i, t in enumerate(_owned(trainer))}
    for number, chunk in enumerate(trainer.model):
        # A grouped tensor of Transformer Engine keeps its elements beside it.
        found |= {f"{number} {n}": getattr(p, "rowwise_data", p.detach()) for n, p in chunk.named_parameters()}
    found |= {f"tokens {i}": t for i, t in enumerate(counters)}
    return {name: t for name, t in found.items() if t.numel()}


def _token_buffers(state: MegatronState) -> list[torch.Tensor]:
    """Counts of tokens, as far as they are counted."""
    return [tensor for _, _, tensor in state.tokens.buffers()] if state.tokens is not None else []


def _image(trainer: Trainer, state: MegatronState) -> dict[str, str]:
    """A hash of each tensor, and of the host state."""
    found = {
        name: hashlib.blake2b(ctypes.string_at(_span(t)[0], _size([_span(t)])), digest_size=8).hexdigest()
        for name, t in _everything(trainer, _token_buffers(state)).items()
    }
    # A run without checkpoints remembers no steps, and does not say that it has trained.
    host = {k: v for k, v in state.host_state().items() if k not in ("steps", "trained")}
    return {**found, "host": hashlib.blake2b(encode(host)).hexdigest()}


def _gathered_image(trainer: Trainer, state: MegatronState) -> dict[str, str]:
    """The same once every rank has all parameters, which with overlapped gathering is so only in the next forward."""
    with trainer.params_gathered():
        return _image(trainer, state)


def _scramble(trainer: Trainer, counters: Sequence[torch.Tensor] = ()) -> None:
    noise = random.Random(7)
    for tensor in _everything(trainer, counters).values():
        start, end = _span(tensor)
        ctypes.memmove(start, noise.randbytes(end - start), end - start)
    for optimizer in _inner(trainer):
        for group in optimizer.param_groups:
            group.update(lr=9.0, weight_decay=0.7, **({"step": 77} if "step" in group else {}))
    trainer.scheduler.num_steps = 4321
    trainer.progress.load_state_dict({k: 99 for k in trainer.progress.state_dict()})
    tensor_parallel.model_parallel_cuda_manual_seed(4321)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def _step(trainer: Trainer) -> dict[str, Any]:
    result = trainer.train_step()
    return {
        "losses": {k: float(v).hex() for k, v in result.losses.items()},
        "grad_norm": float(result.grad_norm or 0).hex(),
        "learning_rate": result.learning_rate,
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
    }


# -- recalibration ------------------------------------------------------------------------------------------------


def _recalibrate(trainer: Trainer) -> dict[str, Any]:
    """Two recoveries that lose tokens, the second one while capacity is still raised; then a third that loses none.

    What each step's capacities were, on this rank, and what became of the layers' tokens.
    """
    state = MegatronState(
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        user_state=trainer.state,
        count_tokens=True,
        capacity=CapacityRules(iterations=RECALIBRATION_ITERATIONS),
    )
    assert state.tokens is not None
    inventory, tokens, routers = state.inventory(), state.tokens, state.tokens.routers
    experts = [block.expert_unit(e) for block in routers.blocks for e in range(trainer.args.num_experts)]

    totals = [torch.zeros(len(routers.blocks), 2, dtype=torch.float64)]

    def train(steps: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(steps):
            boosts = [_as_list(b.module.router.boost) for b in routers.blocks]
            factors = [getattr(b.module.token_dispatcher, "moe_expert_capacity_factor", None) for b in routers.blocks]
            trainer.train_step()
            counts = [Counts(layer) for layer in routers.state]
            beyond = sum(c.beyond.sum().item() for c in counts)
            totals.append(torch.tensor([[c.routed.sum(), c.processed.sum()] for c in counts], dtype=torch.float64))
            state.after_step()
            debt = sum(layer["debt"] for layer in tokens.layer_tokens().values())
            found.append({"boosts": boosts, "factors": factors, "beyond": beyond, "debt": debt})
        return found

    before = train(4)
    processed = [routers.state[:, 1].sum().item(), sum(int(t.sum()) for t in tokens.counters.totals)]
    by_layer = tokens.layer_tokens()
    each = [after - before for before, after in itertools.pairwise(totals)]
    everywhere = each[0].clone()
    for step in each[1:]:
        everywhere += (step - everywhere) / RECENT_ITERATIONS
    dist.all_reduce(everywhere, group=routers.blocks[0].module.router.tp_dp_cp_group)
    tokens.recalibrate({name: 3000 for name in experts[1:]})
    first = train(2)
    captures = _capture(state, inventory)
    on = train(2)
    _scramble(trainer, _token_buffers(state))
    _write_back(state, inventory, captures)
    tokens.recalibrate({})
    again = train(2)
    tokens.recalibrate({experts[0]: 5000})
    second = train(RECALIBRATION_ITERATIONS + 3)
    looks = tokens.layer_tokens()
    state.close()
    return {
        "before": before, "why": tokens.capacity_problem(), "first": first, "on": on, "again": again, "second": second,
        "tokens": by_layer, "everywhere": everywhere.tolist(), "looks": looks, "routed": tokens.routed_tokens(),
        "processed": processed,
        "closed": [_as_list(b.module.router.boost) for b in routers.blocks],
    }  # fmt: skip


def _as_list(boost: torch.Tensor | float) -> list[float]:
    return boost.tolist() if isinstance(boost, torch.Tensor) else [boost]


# -- what is replaced of Megatron ---------------------------------------------------------------------------------


def _replaced(trainer: Trainer, store: Path) -> dict[str, Any]:
    """Which attributes of Megatron's modules, classes and objects are other ones during a run, and after it."""
    trainer.train_step()  # Megatron puts functions into its own objects, too
    before = _attributes(trainer)
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        config=MoetionConfig(
            mode="exact", period=2, store=str(store), run_id="run", ranks_per_node=1, pack_threads=1, timeout_s=30
        ),
        user_state=trainer.state,
    )
    attached.start()
    trainer.pipeline_arguments = attached.pipeline_arguments
    found = []
    for iteration in (1, 2):
        trainer.train_step()
        attached.on_step_end(iteration)
        found.append(_differing(before, _attributes(trainer)))
    attached.close()
    return {"during": found, "after": _differing(before, _attributes(trainer))}


def _attributes(trainer: Trainer) -> dict[tuple[str, str], list[Any]]:
    """What can be called, by owner and name: of all modules and classes of Megatron, and of this trainer's objects."""
    parts = [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "megatron"]
    parts += {c for m in parts for c in vars(m).values() if isinstance(c, type) and c.__module__.startswith("megatron")}
    chain = [trainer.optimizer, *trainer.optimizer.chained_optimizers]
    objects = [*chain, *(s for o in chain if (s := getattr(o, "grad_scaler", None)) is not None), trainer.scheduler]
    for chunk in trainer.model:
        modules = list(chunk.modules())
        objects += [*modules, *(m.token_dispatcher for m in modules if hasattr(m, "token_dispatcher"))]
        objects += [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups, *chunk.buffers]
    found: dict[tuple[str, str], list[Any]] = {}
    named = [(getattr(part, "__name__", ""), part) for part in parts] + [(type(o).__name__, o) for o in objects]
    for owner, part in sorted(named, key=lambda pair: pair[0]):
        for name, value in list(vars(part).items()):
            if callable(value):
                found.setdefault((owner, name), []).append(value)
    return found


def _differing(before: Mapping[tuple[str, str], list[Any]], now: Mapping[tuple[str, str], list[Any]]) -> list[str]:
    keys = before.keys() | now.keys()
    return sorted(
        f"{owner}.{name}"
        for owner, name in keys
        if list(map(id, before.get((owner, name), []))) != list(map(id, now.get((owner, name), [])))
    )


# -- refusals -----------------------------------------------------------------------------------------------------


def _refusals(trainer: Trainer) -> dict[str, str]:
    """What is said of state that cannot be captured exactly; empty where nothing is said."""
    link = next(o for o in trainer.optimizer.chained_optimizers if not o.is_stub_optimizer)
    config = trainer.model[0].module.module.config
    parameter = link.optimizer.param_groups[0]["params"][0]
    inner, chunks = link.optimizer, trainer.model
    found = {}

    def refuse(name: str, spoil: Callable[[], Any], mend: Callable[[], Any]) -> None:
        spoil()
        try:
            _state(trainer)
            found[name] = ""
        except UnsupportedState as error:
            found[name] = str(error)
        finally:
            mend()

    hybrid = HybridDeviceOptimizer(
        [torch.nn.Parameter(torch.zeros(4))],
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        pin_cpu_grads=False,
        pin_cpu_params=False,
        overlap_cpu_optimizer_d2h_h2d=False,
    )
    state = inner.state[parameter]
    refuse("offloaded", lambda: setattr(link, "optimizer", hybrid), lambda: setattr(link, "optimizer", inner))
    refuse("fp4", lambda: setattr(config, "fp4", "e2m1"), lambda: setattr(config, "fp4", None))
    refuse("unknown state", lambda: state.update(max_exp_avg_sq=parameter), lambda: state.pop("max_exp_avg_sq"))
    refuse("missing chunk", lambda: setattr(trainer, "model", chunks[:1]), lambda: setattr(trainer, "model", chunks))
    refuse("nothing", lambda: None, lambda: None)
    return found
