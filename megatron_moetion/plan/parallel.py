# SPDX-License-Identifier: Apache-2.0
"""How a model is spread over ranks: a pipeline stage's layers, and what the optimizer of each rank holds. Pure.

Fields are Megatron's flags. The distributed optimizer shards what is dense over data and context parallel ranks, and
experts over the ranks that have the same ones.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_moetion.config import setting
from megatron_moetion.errors import ConfigError
from megatron_moetion.plan.shape import ModelShape

_MAX_LAYOUT = 20_000
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Parallel sizes, as the flags of these names. 0 or empty: not given. ``ConfigError`` where they cannot be."""

    world_size: int
    """Ranks in all."""
    tensor_model_parallel_size: int = setting(1, "default: 1")
    pipeline_model_parallel_size: int = setting(1, "default: 1")
    context_parallel_size: int = setting(1, "default: 1")
    expert_model_parallel_size: int = setting(1, "ranks that share a layer's experts (default: 1)")
    expert_tensor_parallel_size: int = setting(0, "ranks that share an expert (default: as tensor parallelism)")
    num_virtual_stages_per_pipeline_rank: int = setting(0, "model chunks of a rank")
    num_layers_per_virtual_pipeline_stage: int = setting(0, "the same, by layers of a chunk")
    decoder_first_pipeline_num_layers: int = setting(0, "layers of the first stage, where it differs")
    decoder_last_pipeline_num_layers: int = setting(0, "layers of the last stage, where it differs")
    account_for_embedding_in_pipeline_split: bool = setting(False, "the embedding counts as a layer of the first stage")
    account_for_loss_in_pipeline_split: bool = setting(False, "the loss counts as a layer of the last stage")
    pipeline_model_parallel_layout: str = setting("", "layers of each stage, such as 'Et*3|(tt|)*29m|L'")
    use_distributed_optimizer: bool = setting(False, "ranks share the optimizer's state; a preset implies it")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in (*_SIZES, "world_size") else 0
            if isinstance(value, int) and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        tp, pp, cp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size
        _divides(self.world_size, f"tensor {tp} x pipeline {pp} x context {cp}", tp * pp * cp)
        ep, etp = self.expert_model_parallel_size, self.expert_tensor
        _divides(self.world_size, f"expert {ep} x expert tensor {etp} x pipeline {pp}", ep * etp * pp)

    @property
    def expert_tensor(self) -> int:
        """Ranks that share an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def dense_shards(self) -> int:
        """Ranks over which the state of dense parameters is spread."""
        groups = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return self.world_size // groups if self.use_distributed_optimizer else 1

    @property
    def expert_shards(self) -> int:
        """Ranks over which the state of an expert is spread: expert data parallelism."""
        groups = self.expert_tensor * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        return self.world_size // groups if self.use_distributed_optimizer else 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a rank of one pipeline stage has, in all its chunks."""

    layers: tuple[int, ...]
    """Numbers of its layers, from 0."""
    embedding: bool
    output_layer: bool
    prediction_layers: int
    """Layers for multi-token prediction."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank of a stage holds."""

    stage: int
    dense_parameters: int
    """Of its model chunks, experts aside."""
    expert_parameters: int
    """Of its routed experts together."""
    num_experts: int
    """Routed experts, over all its layers."""
    dense_owned: int
    """Dense parameters whose state its optimizer holds, padding aside; the busiest of the ranks that share them."""
    expert_owned: int
    """The same of its experts."""


def stages(shape: ModelShape, parallel: Parallel) -> tuple[Stage, ...]:
    """What each pipeline stage has, by Megatron's rules. ``ConfigError`` where layers cannot be split so."""
    count = parallel.pipeline_model_parallel_size
    chunks = _from_layout(shape, parallel) if parallel.pipeline_model_parallel_layout else _even(shape, parallel)
    first = 0
    layers: list[list[int]] = [[] for _ in range(count)]
    for number, chunk in enumerate(chunks):
        layers[number % count] += range(first, first + chunk.count("t"))
        first += chunk.count("t")
    return tuple(
        Stage(
            layers=tuple(layers[stage]),
            embedding=any("E" in c for c in chunks[stage::count]),
            output_layer=any("L" in c for c in chunks[stage::count]),
            prediction_layers=sum(c.count("m") for c in chunks[stage::count]),
        )
        for stage in range(count)
    )


def loads(shape: ModelShape, parallel: Parallel) -> tuple[Load, ...]:
    """What a rank of each pipeline stage holds. ``ConfigError`` where parallel sizes do not divide the model."""
    _check_divisions(shape, parallel)
    return tuple(_load(shape, parallel, number, stage) for number, stage in enumerate(stages(shape, parallel)))


def busiest(shape: ModelShape, parallel: Parallel) -> Load:
    """Of the stage whose ranks' optimizers hold most."""
    return max(loads(shape, parallel), key=lambda load: load.dense_owned + load.expert_owned)


def _load(shape: ModelShape, parallel: Parallel, number: int, stage: Stage) -> Load:
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor
    has_experts = [shape.has_experts[layer] for layer in stage.layers]
    has_experts += [shape.has_experts[-1]] * stage.prediction_layers
    dense = sum(shape.dense_part(has_experts=has, tp=tp) for has in has_experts)
    dense += stage.prediction_layers * shape.prediction_part(tp)
    if stage.embedding or stage.prediction_layers:
        dense += shape.embedding(tp)
    if stage.output_layer:
        dense += shape.norm(shape.hidden_size)
        if shape.untie_embeddings_and_output_weights or not stage.embedding:
            dense += shape.output_layer(tp)
    num_experts = shape.num_experts // parallel.expert_model_parallel_size * sum(has_experts)
    experts = num_experts * shape.expert(etp)
    return Load(
        stage=number,
        dense_parameters=dense,
        expert_parameters=experts,
        num_experts=num_experts,
        dense_owned=-(-dense // parallel.dense_shards),
        expert_owned=-(-experts // parallel.expert_shards),
    )


def _check_divisions(shape: ModelShape, parallel: Parallel) -> None:
    tp, ep, etp = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tensor
    if ep > 1 and not shape.num_experts:
        raise ConfigError(f"--expert-model-parallel-size {ep} needs --num-experts")
    divided = [("--num-attention-heads", shape.num_attention_heads, "--tensor-model-parallel-size", tp)]
    if not shape.multi_latent_attention:
        divided.append(("--num-query-groups", shape.query_groups, "--tensor-model-parallel-size", tp))
    if not all(shape.has_experts):
        divided.append(("--ffn-hidden-size", shape.ffn, "--tensor-model-parallel-size", tp))
    if shape.num_experts:
        divided.append(("--num-experts", shape.num_experts, "--expert-model-parallel-size", ep))
        divided.append(("--moe-ffn-hidden-size", shape.expert_ffn, "--expert-tensor-parallel-size", etp))
    for what, size, flag, parts in divided:
        if size % parts:
            raise ConfigError(f"{what} {size} is no multiple of {flag} {parts}")


def _even(shape: ModelShape, parallel: Parallel) -> list[str]:
    """Each chunk's layers as in a layout, in the order of the layers: chunk 0 of all stages, then chunk 1."""
    count = parallel.pipeline_model_parallel_size
    sizes = _layers_of_stages(shape, parallel)
    virtual = _virtual(parallel, sizes)
    for stage, size in enumerate(sizes):
        if size % virtual:
            raise ConfigError(f"the {size} layers of pipeline stage {stage} are no multiple of its {virtual} chunks")
    chunks = ["t" * (sizes[stage] // virtual) for _ in range(virtual) for stage in range(count)]
    if parallel.account_for_embedding_in_pipeline_split:
        chunks[0] = chunks[0][1:]
    if parallel.account_for_loss_in_pipeline_split:
        chunks[-1] = chunks[-1][1:]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * shape.mtp_num_layers + "L"
    return chunks


def _layers_of_stages(shape: ModelShape, parallel: Parallel) -> list[int]:
    """Layers of each stage; embedding and loss are among them where they count as layers."""
    count = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    accounted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    if accounted and (first or last):
        raise ConfigError("--decoder-first/last-pipeline-num-layers exclude --account-for-...-in-pipeline-split")
    left = count - bool(first) - bool(last)
    rest = shape.num_layers + accounted - first - last
    if left < 0 or rest < 0 or (rest % left if left else rest):
        raise ConfigError(
            f"{rest} layers are no multiple of {left} pipeline stages; say how they are split with "
            f"--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, "
            f"--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split, or with "
            f"--pipeline-model-parallel-layout"
        )
    middle = rest // left if left else 0
    return [*([first] if first else []), *[middle] * left, *([last] if last else [])]


def _virtual(parallel: Parallel, sizes: list[int]) -> int:
    chunks, layers = parallel.num_virtual_stages_per_pipeline_rank, parallel.num_layers_per_virtual_pipeline_stage
    if chunks and layers:
        raise ConfigError(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage say the same; give one"
        )
    if layers:
        if len(set(sizes)) > 1 or sizes[0] % layers:
            raise ConfigError(
                f"{sizes[0]} layers a pipeline stage are no multiple of --num-layers-per-virtual-pipeline-stage "
                f"{layers}"
            )
        chunks = sizes[0] // layers
    return max(chunks, 1) if len(sizes) > 1 else 1


def _from_layout(shape: ModelShape, parallel: Parallel) -> list[str]:
    """The chunks that ``--pipeline-model-parallel-layout`` spells, in the order of the layers."""
    flag = f"--pipeline-model-parallel-layout {parallel.pipeline_model_parallel_layout!r}"
    text = re.sub(r"[\s,]", "", parallel.pipeline_model_parallel_layout)
    for pattern in (r"\(([^()]*)\)\*(\d+)", r"([EtmL|])\*(\d+)"):
        repeated = sum(len(m[1]) * int(m[2]) for m in re.finditer(pattern, text))
        if repeated > _MAX_LAYOUT:
            raise ConfigError(f"{flag} has more than {_MAX_LAYOUT} layers")
        text = re.sub(pattern, lambda m: m[1] * int(m[2]), text)
    if not re.fullmatch(r"E[Etm|]*L", text) or text.count("E") > 1:
        raise ConfigError(
            f"{flag} must be made of E, t, m, L and |, with E first and L last, such as 'Et*3|(tt|)*29m|L'"
        )
    chunks = text.split("|")
    for letter, there, name in (("t", shape.num_layers, "num_layers"), ("m", shape.mtp_num_layers, "mtp_num_layers")):
        if text.count(letter) != there:
            named = name.replace("_", "-")
            raise ConfigError(f"{flag} has {text.count(letter)} times {letter!r} and --{named} is {there}")
    _divides(len(chunks), "pipeline stages", parallel.pipeline_model_parallel_size, what=f"chunks of {flag}")
    return chunks


def _divides(whole: int, of: str, parts: int, *, what: str = "GPUs") -> None:
    if whole % parts:
        nearest = math.ceil(whole / parts) * parts
        raise ConfigError(f"{whole} {what} are no multiple of {parts} ({of}); {nearest} would be")
