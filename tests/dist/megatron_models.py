# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that builds models of all kinds that are trained today, examines what is captured, and recovers.

Transformer Engine is not needed: where Megatron-Core's own modules lack something (norms under sequence parallelism,
attention under context parallelism and of multi-latent attention), a module of the tests stands in its place.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron_trainer import (
    MODEL,
    WORLD_SIZE,
    Model,
    _examine,
    _gathered_image,
    _scramble,
    _state,
    _step,
    _tear_down,
    as_modelled,
    join,
)
from torch import distributed as dist
from toy_trainer import Notes

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

try:
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
except ImportError:  # of 0.16: a dict, which is emptied
    destroy_moe_metrics_tracker = None

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import IdentityMismatch
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.mcore.attach import Attached, attach
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.pretrain import model as model_module
from megatron_moetion.pretrain.corpus import MockCorpus
from megatron_moetion.pretrain.loop import Trainer, mean_loss
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.report import Reporter
from megatron_moetion.pretrain.startup import form_groups
from megatron_moetion.units import Unit, UnitKind

if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False  # 0.16 says True where it has only mocks

ITERATIONS = 6
FAULTS = ((3, None), (5, 1))
"""After which iteration every process is lost, and which node's memory goes with them."""
PERIOD = 2
_ORDER, _ANOTHER_ORDER = "tp-cp-ep-dp-pp", "cp-ep-dp-tp-pp"
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "exact": {"period": PERIOD},
    "popularity": {"experts_per_snapshot": 1, "staleness_cap": 8, "lost_token_budget": 0.0},
}
_NO_AUXILIARY_LOSS = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
_SPLIT = "--bf16 --use-distributed-optimizer"
_PP = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
_EP = "--expert-model-parallel-size 2"
_TP = "--tensor-model-parallel-size 2 --sequence-parallel --disable-bias-linear --global-batch-size 4"


# -- modules that stand in for Transformer Engine's ----------------------------------------------------------------


class ParallelNorm(torch.nn.LayerNorm):
    """A norm whose gradients are added up over tensor parallel ranks, as Megatron does for those of Apex."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PlainAttention(DotProductAttention):
    """Megatron's own attention; heads of keys and values may differ in size, and sequences may be spread over ranks."""

    def __init__(
        self, config: TransformerConfig, *args: Any, k_channels: Any = None, v_channels: Any = None, **how: Any
    ) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *args, **how)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> torch.Tensor:
        if parallel_state.get_context_parallel_world_size() > 1:
            key, value = _InOrder.apply(key), _InOrder.apply(value)
        return super().forward(query, key, value, attention_mask, **how)  # type: ignore[no-any-return]


class _InOrder(torch.autograd.Function):
    """All ranks' parts of a sequence, [s / ranks, ...] to [s, ...]. Of 2n chunks rank r has r and 2n - 1 - r."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        first, last = zip(*(p.chunk(2) for p in parts), strict=True)
        return torch.cat([*first, *reversed(last)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole, group=group)
        return _part(whole, 0)


def _spread(transformer_layer_spec: Any, **_: Any) -> Any:
    """The layers with the modules above."""
    transformer_layer_spec.layer_norm = ParallelNorm
    for layer in transformer_layer_spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = ParallelNorm
        attention = parts.self_attention.submodules
        attention.core_attention = PlainAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, ParallelNorm)
    return transformer_layer_spec


def _predictions(config: TransformerConfig, transformer_layer_spec: Any, vp_stage: Any, **_: Any) -> Any:
    """Layers that predict further tokens, on the last stage."""
    spec = get_gpt_mtp_block_spec(config, transformer_layer_spec, use_transformer_engine=False, vp_stage=vp_stage)
    for layer in spec.layer_specs if spec is not None else ():
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = ParallelNorm
    return spec


# -- models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what a version of Megatron-Core must have for it."""

    model: Model
    needs: tuple[str, ...] = ()
    """Fields of the model's configuration class."""
    context: int = 1
    """Ranks that a sequence is spread over."""
    frozen: Callable[[str, int], bool] = lambda name, stage: False
    """Whether a parameter of that name on that pipeline stage is not trained."""
    modes: tuple[str, ...] = ()
    """In which everything is lost and recovered."""
    is_reordered: bool = False
    """Whether a start with the kinds of parallelism in another order is tried."""

    def lacks(self) -> str | None:
        """Why this version of Megatron-Core cannot build it."""
        config = self.model.config_class or TransformerConfig
        known = {f.name for f in dataclasses.fields(config)}
        missing = [name for name in (*self.model.config, *self.needs) if name not in known]
        return f"this Megatron-Core's {config.__name__} has no {', '.join(missing)}" if missing else None


_PARALLEL = {"transformer_layer_spec": _spread}
_LATENT = {
    "multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "qk_layernorm": True,
}  # fmt: skip
_FURTHER = {"transformer_layer_spec": _spread, "mtp_block_spec": _predictions}
CASES = {
    "frozen attention": Case(model=Model(flags=f"{_PP} {_SPLIT}"), frozen=lambda name, stage: "self_attention" in name),
    "frozen experts": Case(
        model=Model(flags=f"{_EP} {_SPLIT}"), frozen=lambda name, stage: ".experts." in name, modes=("popularity",)
    ),
    "a stage that is frozen": Case(
        model=Model(flags=f"{_PP} {_SPLIT} --untie-embeddings-and-output-weights"),
        frozen=lambda name, stage: stage == 1,
        modes=("exact", "popularity"),
    ),
    "multi-token prediction": Case(
        model=Model(flags=f"{_PP} {_SPLIT} {_NO_AUXILIARY_LOSS}", config={"mtp_num_layers": 2}, gpt=_FURTHER),
        modes=("exact",),
    ),
    "multi-token prediction, one layer repeated": Case(
        model=Model(
            flags=f"{_EP} {_SPLIT} {_NO_AUXILIARY_LOSS} --untie-embeddings-and-output-weights",
            config={"mtp_num_layers": 2, "mtp_use_repeated_layer": True},
            gpt=_FURTHER,
        )
    ),
    "multi-token prediction, clipped apart": Case(
        model=Model(
            flags=f"{_EP} {_SPLIT} {_NO_AUXILIARY_LOSS} --clip-grad 0.05 --grad-reduce-in-bf16",
            config={"mtp_num_layers": 1, "mtp_detach_heads": True},
            gpt=_FURTHER,
        ),
        modes=("exact",),
    ),
    "multi-latent attention": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT}",
            config={**_LATENT, "rope_type": "rope"},
            config_class=MLATransformerConfig,
            gpt=_PARALLEL,
        ),
        modes=("exact",),
    ),
    "multi-latent attention, multi-token prediction": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT} {_NO_AUXILIARY_LOSS}",
            config={**_LATENT, "mtp_num_layers": 1},
            config_class=MLATransformerConfig,
            gpt=_FURTHER,
        )
    ),
    "shared expert with a gate": Case(
        model=Model(
            flags=f"{_EP} {_SPLIT} --disable-bias-linear --moe-shared-expert-intermediate-size 24",
            config={"moe_shared_expert_gate": True},
        )
    ),
    "router in fp32": Case(model=Model(flags=f"{_EP} {_SPLIT}", config={"moe_router_dtype": "fp32"})),
    "router in fp64": Case(model=Model(flags=f"{_EP} {_SPLIT}", config={"moe_router_dtype": "fp64"})),
    "quantile balancing": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT} {_NO_AUXILIARY_LOSS}",
            config={"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0},
        ),
        needs=("moe_router_quantile_balancing_ema",),
        modes=("exact",),
    ),
    "global auxiliary loss": Case(
        model=Model(flags=f"{_EP} {_SPLIT} --moe-router-load-balancing-type global_aux_loss")
    ),
    "uneven pipeline": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT} --num-layers 4",
            config={"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
        )
    ),
    "pipeline that counts embedding and loss": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT} --num-layers 4",
            config={
                "num_layers": 2,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
        )
    ),
    "pipeline layout, a stage without layers": Case(
        model=Model(flags=f"{_PP} {_SPLIT}", config={"pipeline_model_parallel_layout": "E|ttL"}),
        modes=("exact", "popularity"),
    ),
    "pipeline layout in four stages": Case(
        model=Model(
            flags=f"{_PP} {_SPLIT} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
            config={"pipeline_model_parallel_layout": "Et|t|tt|L"},
        ),
        modes=("full",),
    ),
    "dense layers first": Case(
        model=Model(flags=f"{_PP} {_SPLIT}", config={"moe_layer_freq": [0, 1]}), modes=("popularity",)
    ),
    "norms of queries and keys, gated attention": Case(
        model=Model(flags=f"{_EP} {_SPLIT}", config={"qk_layernorm": True, "attention_output_gate": True})
    ),
    "learned softmax offset": Case(model=Model(flags=f"{_EP} {_SPLIT}", config={"softmax_type": "learnable"})),
    "tp2 ep2": Case(
        model=Model(flags=f"{_TP} {_EP} --expert-tensor-parallel-size 1 {_SPLIT}", gpt=_PARALLEL),
        modes=("full",),
    ),
    "tp2 etp2, dp2": Case(
        model=Model(flags=f"{_TP} {_SPLIT} --moe-token-dispatcher-type alltoall --swiglu", gpt=_PARALLEL),
        modes=("exact", "popularity"),
    ),
    "tp2 etp2, whole optimizers": Case(model=Model(flags=f"{_TP} --bf16", gpt=_PARALLEL), is_reordered=True),
    "tp2 etp2 ep2": Case(
        model=Model(flags=f"{_TP} {_EP} --bf16 --hidden-dropout 0.1", gpt=_PARALLEL), modes=("exact",)
    ),
    "tp2 etp2 pp2": Case(
        model=Model(
            flags=f"{_TP} --pipeline-model-parallel-size 2 {_SPLIT} --moe-shared-expert-intermediate-size 24",
            config={"moe_shared_expert_gate": True},
            gpt=_PARALLEL,
        )
    ),
    "cp2 ep2": Case(model=Model(flags=f"{_EP} {_SPLIT}", gpt=_PARALLEL), context=2, modes=("exact",)),
    "tp2 cp2": Case(model=Model(flags=f"{_TP} {_SPLIT}", gpt=_PARALLEL), context=2),
}


class ContextTrainer(Trainer):
    """Each rank of a context parallel group has its part of the sequences."""

    def _forward_step(self, iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
        tokens = next(iterator)
        assert self._mask is not None
        inputs, labels, positions = (_part(t, 1) for t in (tokens[:, :-1], tokens[:, 1:], self._positions))
        return model(inputs, positions, _part(self._mask, 2), labels=labels), mean_loss


def _part(whole: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's of a sequence; the inverse of ``_InOrder``."""
    group = parallel_state.get_context_parallel_group()
    chunks = whole.chunk(2 * group.size(), dim)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim)


def build(rank: int, case: Case, order: str = _ORDER) -> Trainer:
    """The model of a case on this rank, in training mode; ``order`` says which ranks form a group."""
    # TP > 1 and sequence parallelism need modules that a machine without a GPU lacks; the tests bring their own.
    machine = Machine(world_size=WORLD_SIZE, has_gpu=True, packages=frozenset({"apex"}))
    args = parse_arguments(f"{MODEL} --transformer-impl local {case.model.flags}".split(), machine)
    args.data_parallel_size //= case.context
    args.num_microbatches *= case.context
    form = functools.partial(parallel_state.initialize_model_parallel, context_parallel_size=case.context, order=order)
    with patch.object(parallel_state, "initialize_model_parallel", form):
        form_groups(args, Process(rank=rank, world_size=WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE))
    model = case.model
    if case.context > 1:
        model = dataclasses.replace(model, config={**model.config, "context_parallel_size": case.context})
    with as_modelled(model), _frozen(case.frozen):
        source = MockCorpus(seq_length=args.seq_length, seed=args.seed)
        trainer = (ContextTrainer if case.context > 1 else Trainer)(
            args, source, Reporter(args, active=False, attempt=0)
        )
    for chunk in trainer.model:
        chunk.train()
    return trainer


@contextmanager
def _frozen(is_frozen: Callable[[str, int], bool]) -> Iterator[None]:
    original = model_module.build_chunk

    def build_chunk(*how: Any) -> torch.nn.Module:
        chunk = original(*how)
        for name, parameter in chunk.named_parameters():
            if is_frozen(name, parallel_state.get_pipeline_model_parallel_rank()):
                parameter.requires_grad_(False)
        return chunk

    with patch.object(model_module, "build_chunk", build_chunk):
        yield


# -- the examination -----------------------------------------------------------------------------------------------


def main(folder: Path, store: Path, cases: Sequence[str], environment: Mapping[str, str]) -> int:
    """Examine and recover all named cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for number, name in enumerate(cases):
        case = CASES[name]
        if lacks := case.lacks():
            notes.write("lacks", name=name, why=lacks)
            continue
        trainer = build(rank, case)
        notes.write("case", name=name, place=_place(), **_examine(trainer, count_tokens=True))
        _forget()
        if case.is_reordered:
            notes.write("another order", name=name, message=_reordered(rank, case, store / f"{number}order"))
        expected = _reference(rank, case) if case.modes else None
        for mode in case.modes:
            assert expected is not None
            with ExitStack() as stack:
                where = store / f"{number}{mode}"
                if rank == 0:
                    stack.callback(shutil.rmtree, where, ignore_errors=True)
                notes.write("recovery", name=name, mode=mode, **_recover(rank, case, where, mode, expected))
                dist.barrier()
    return 0


def _forget() -> None:
    """Of a model, what Megatron keeps in modules."""
    _tear_down()
    MTPLossLoggingHelper.tracker.clear()
    if destroy_moe_metrics_tracker is not None:
        destroy_moe_metrics_tracker()


def _place() -> dict[str, int]:
    """This rank's coordinates."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "edp": dist.get_rank(parallel_state.get_expert_data_parallel_group()),
    }


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run without checkpoints: of each iteration every tensor's hash, and the losses."""

    images: dict[int, dict[str, str]]
    losses: dict[int, Any]


def _reference(rank: int, case: Case) -> Undisturbed:
    trainer = build(rank, case)
    state = _state(trainer)
    images, losses = {0: _gathered_image(trainer, state)}, {}
    for iteration in range(1, ITERATIONS + 1):
        losses[iteration] = _step(trainer)["losses"]
        images[iteration] = _gathered_image(trainer, state)
    state.close()
    _forget()
    return Undisturbed(images=images, losses=losses)


def _recover(rank: int, case: Case, store: Path, mode: str, expected: Undisturbed) -> dict[str, Any]:
    """A run that loses every process, and then also a node's memory.

    With experts that are older than the rest (mode ``popularity``) training goes another way: there, only what was
    recovered is compared, with what this rank had at some iteration.
    """
    wrong: list[str] = []
    recovered: list[dict[str, Any]] = []
    book: dict[int, dict[str, str]] = {}
    counts: dict[int, dict[str, int]] = {}
    faults = list(FAULTS)
    attempt = iteration = fault = 0
    place: dict[str, int] = {}
    while iteration < ITERATIONS:
        trainer, attached = _attach(rank, case, store, mode, attempt)
        place = _place()
        resumed = attached.start()
        state = attached.session.running.adapter
        trainer.pipeline_arguments = attached.pipeline_arguments
        iteration = trainer.progress.iteration
        is_bitwise = mode != "popularity"
        if not attempt:
            book[0], counts[0] = _unit_hashes(state), _counted(state)
        else:
            assert resumed is not None
            taken = {name: _when(book, name, digest, iteration) for name, digest in _unit_hashes(state).items()}
            recovered.append(
                {
                    "lost": fault - iteration, "iteration": iteration, "units": taken,
                    "lost_tokens": resumed.lost_tokens, "replayed": resumed.replayed_steps,
                    "counts": {str(i): c for i, c in counts.items()},
                }
            )  # fmt: skip
        if is_bitwise:
            wrong += _differing(expected.images[iteration], trainer, state, f"{iteration}, recovered")
        while iteration < ITERATIONS and not (faults and faults[0][0] <= iteration):
            losses = _step(trainer)["losses"]
            iteration += 1
            if is_bitwise and losses != expected.losses[iteration]:
                wrong.append(f"{iteration}: loss")
            attached.on_step_end(iteration)
            attached.drain()
            book[iteration], counts[iteration] = _unit_hashes(state), _counted(state)
        if is_bitwise:
            wrong += _differing(expected.images[iteration], trainer, state, f"{iteration}, trained")
        fault, node = faults.pop(0) if faults else (0, None)
        dist.barrier()  # all are drained: a rank that ends may hold what another is still sending
        attached.session.running.undo.close()
        attached.abandon()
        _forget()
        dist.barrier()
        if node is not None and rank == 0 and iteration < ITERATIONS:
            shutil.rmtree(store / "models" / f"node{node}")
        dist.barrier()
        attempt += 1
    return {"wrong": wrong, "recovered": recovered, "attempts": attempt, "place": place}


def _reordered(rank: int, case: Case, store: Path) -> str:
    """What is said where a rank's arena holds the shards of another rank of its tensor parallel group."""
    for attempt, order in enumerate((_ORDER, _ANOTHER_ORDER)):
        try:
            _, attached = _attach(rank, case, store, "full", attempt, order)
            attached.start()
            attached.session.running.undo.close()
            attached.abandon()
        except IdentityMismatch as error:
            return str(error)
        finally:
            _forget()
            dist.barrier()
    return ""


def _attach(
    rank: int, case: Case, store: Path, mode: str, attempt: int, order: str = _ORDER
) -> tuple[Trainer, Attached]:
    trainer = build(rank, case, order)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    common = {
        "store": str(store), "run_id": "models", "ranks_per_node": 2, "pack_threads": 1, "timeout_s": 30,
        "max_stall_ms": 5000,  # what is late on a busy machine is not what is tested
    }  # fmt: skip
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        config=MoetionConfig(mode=mode, **common, **SETTINGS[mode]),
        user_state=trainer.state,
    )
    if attempt:
        _scramble(trainer)
    return trainer, attached


def _differing(expected: Mapping[str, str], trainer: Trainer, state: MegatronState, when: str) -> list[str]:
    found = _gathered_image(trainer, state)
    return [f"{when}: {name}" for name in expected if found[name] != expected[name]]


def _unit_hashes(state: MegatronState) -> dict[str, str]:
    """Of each unit of parameters, as it is now."""
    return {u.name: _hash(u) for u in state.inventory().units if u.kind is not UnitKind.HOST}


def _hash(unit: Unit) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for region in unit.regions:
        if not region.at_once:
            digest.update(ctypes.string_at(region.address, region.nbytes))
    return digest.hexdigest()


def _when(book: Mapping[int, Mapping[str, str]], name: str, digest: str, latest: int) -> int:
    """The newest iteration up to ``latest`` at which this rank had the unit in this state; -1 if never since step 1."""
    return max((i for i, units in book.items() if i <= latest and units[name] == digest), default=-1)


def _counted(state: MegatronState) -> dict[str, int]:
    """Tokens by expert, as this rank's hooks counted them."""
    if state.tokens is None:
        return {}
    totals = {name: tensor for _, name, tensor in state.tokens.buffers()}
    return {c.expert: int(totals[c.tensor][c.position]) for c in state.tokens.token_counters()}
