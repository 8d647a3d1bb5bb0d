# SPDX-License-Identifier: Apache-2.0
"""A model by the names of Megatron's flags, and its parameters counted as Megatron-Core's GPT model holds them. Pure.

The GPT model of Megatron-Core with the layers of Transformer Engine, or with local ones: both have the same parameters.
Tests hold the counts to real models.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_moetion.config import setting
from megatron_moetion.errors import ConfigError

NORMS = ("LayerNorm", "RMSNorm")
POSITIONS = ("learned_absolute", "rope", "yarn", "mrope", "relative", "none")
_MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides how many parameters a GPT model has. Each field is the flag of that name, with its default.

    0 stands for a number that is not given. ``ConfigError`` where Megatron would refuse the model, or where a count
    would be wrong.
    """

    num_layers: int = setting(0, "transformer layers, those for multi-token prediction aside")
    hidden_size: int = setting(0, "width of the model")
    ffn_hidden_size: int = setting(0, "width of a dense MLP (default: 4 x hidden size, 8/3 of it with --swiglu)")
    num_attention_heads: int = setting(0, "attention heads")
    kv_channels: int = setting(0, "width of a head (default: hidden size / heads)")
    group_query_attention: bool = setting(False, "heads share keys and values")
    num_query_groups: int = setting(1, "groups of them (default: 1)")
    add_qkv_bias: bool = setting(False, "bias for queries, keys and values, in spite of --disable-bias-linear")
    qk_layernorm: bool = setting(False, "norms of queries and keys; with latent attention of what is compressed")
    multi_latent_attention: bool = setting(False, "DeepSeek's attention, with the five flags that follow")
    q_lora_rank: int = setting(0, "width of compressed queries (default: they are not compressed)")
    kv_lora_rank: int = setting(32, "width of compressed keys and values (default: 32)")
    qk_head_dim: int = setting(128, "width of a head's queries and keys (default: 128)")
    qk_pos_emb_head_dim: int = setting(64, "width of their part with positions (default: 64)")
    v_head_dim: int = setting(128, "width of a head's values (default: 128)")
    swiglu: bool = setting(False, "gated MLPs: three matrices instead of two")
    add_bias_linear: bool = setting(True, "linear layers have no bias", flag="--disable-bias-linear")
    normalization: str = setting("LayerNorm", "LayerNorm has a bias, RMSNorm none (default: LayerNorm)", choices=NORMS)
    vocab_size: int = setting(0, "tokens of the vocabulary, before padding")
    make_vocab_size_divisible_by: int = setting(128, "padding, times the tensor parallel size (default: 128)")
    position_embedding_type: str = setting(
        "learned_absolute", "learned_absolute has parameters (default: learned_absolute)", choices=POSITIONS
    )
    max_position_embeddings: int = setting(0, "positions, for learned_absolute")
    untie_embeddings_and_output_weights: bool = setting(False, "the output layer has a matrix of its own")
    num_experts: int = setting(0, "routed experts of an MoE layer (default: a model without experts)")
    moe_layer_freq: str = setting("1", "every how manieth layer has experts, or a list such as ([0]*3+[1]*58)")
    moe_ffn_hidden_size: int = setting(0, "width of an expert (default: --ffn-hidden-size)")
    moe_router_topk: int = setting(2, "experts that a token visits (default: 2)")
    moe_shared_expert_intermediate_size: int = setting(0, "width of the shared experts together (default: none)")
    moe_shared_expert_gate: bool = setting(False, "the shared experts are gated")
    mtp_num_layers: int = setting(0, "layers for multi-token prediction, on the last stage (default: none)")

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is needed: a whole number of at least 1")
        for name in ("num_query_groups", "make_vocab_size_divisible_by", "moe_router_topk", "kv_lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1")
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 0:
                raise ConfigError(f"{_flag(name)} is {value}; it must not be negative")
        if self.num_layers > _MAX_LAYERS:
            raise ConfigError(f"--num-layers is {self.num_layers}; the most that is reckoned is {_MAX_LAYERS}")
        if not self.kv_channels and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"--hidden-size {self.hidden_size} is no multiple of --num-attention-heads {self.num_attention_heads}; "
                f"give --kv-channels"
            )
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"--num-attention-heads {self.num_attention_heads} is no multiple of --num-query-groups "
                f"{self.query_groups}"
            )
        self._check_positions()
        self._check_experts()

    def _check_positions(self) -> None:
        if self.position_embedding_type != "learned_absolute":
            return
        if not self.max_position_embeddings:
            raise ConfigError(
                "--max-position-embeddings is needed: --position-embedding-type is learned_absolute unless given"
            )
        if self.mtp_num_layers:
            raise ConfigError("--mtp-num-layers needs another --position-embedding-type than learned_absolute")

    def _check_experts(self) -> None:
        moe_flags = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate")
        given = [_flag(name) for name in moe_flags if getattr(self, name)]
        if not self.num_experts and given:
            raise ConfigError(f"{given[0]} needs --num-experts")
        if self.num_experts and self.moe_router_topk > self.num_experts:
            raise ConfigError(
                f"--moe-router-topk {self.moe_router_topk} is more than --num-experts {self.num_experts}: a token "
                f"cannot visit more experts than there are"
            )
        if self.moe_shared_expert_intermediate_size and self.add_bias_linear:
            raise ConfigError("--moe-shared-expert-intermediate-size needs --disable-bias-linear")
        if self.moe_shared_expert_gate and not self.moe_shared_expert_intermediate_size:
            raise ConfigError("--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size")
        assert len(self.has_experts) == self.num_layers

    @cached_property
    def has_experts(self) -> tuple[bool, ...]:
        """Of each layer, whether it is an MoE layer."""
        if not self.num_experts:
            return (False,) * self.num_layers
        pattern = _pattern(self.moe_layer_freq)
        if isinstance(pattern, int):
            return tuple(layer % pattern == 0 for layer in range(self.num_layers))
        if len(pattern) != self.num_layers:
            raise ConfigError(
                f"--moe-layer-freq {self.moe_layer_freq} has {len(pattern)} layers and --num-layers is "
                f"{self.num_layers}"
            )
        return tuple(map(bool, pattern))

    @property
    def query_groups(self) -> int:
        """Heads with keys and values of their own."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn(self) -> int:
        """Width of a dense MLP."""
        return self.ffn_hidden_size or (self.hidden_size * 8 // 3 // 64 * 64 if self.swiglu else 4 * self.hidden_size)

    @property
    def expert_ffn(self) -> int:
        """Width of an expert."""
        return self.moe_ffn_hidden_size or self.ffn

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding, over all ``tp`` tensor parallel ranks."""
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple

    def norm(self, width: int) -> int:
        """Parameters of a norm."""
        return width if self.normalization == "RMSNorm" else 2 * width

    def mlp(self, width: int, tp: int = 1) -> int:
        """Parameters of an MLP or an expert on one of ``tp`` ranks; the bias of its output is on each of them."""
        first = (2 if self.swiglu else 1) * width // tp
        bias = first + self.hidden_size if self.add_bias_linear else 0
        return self.hidden_size * (first + width // tp) + bias

    def expert(self, etp: int = 1) -> int:
        """Parameters of one routed expert on one of ``etp`` ranks."""
        return self.mlp(self.expert_ffn, etp)

    def attention(self, tp: int = 1) -> int:
        """Parameters of a layer's attention on one of ``tp`` ranks, without the norm before it."""
        return self._latent_attention(tp) if self.multi_latent_attention else self._attention(tp)

    def _attention(self, tp: int) -> int:
        queries = self.num_attention_heads * self.head // tp
        both = 2 * self.query_groups * self.head // tp
        found = self.hidden_size * (2 * queries + both)
        if self.add_bias_linear or self.add_qkv_bias:
            found += queries + both
        if self.add_bias_linear:
            found += self.hidden_size
        return found + (2 * self.norm(self.head) if self.qk_layernorm else 0)

    def _latent_attention(self, tp: int) -> int:
        """Matrices that compress are on each rank as a whole."""
        heads, width = self.num_attention_heads // tp, self.qk_head_dim + self.qk_pos_emb_head_dim
        found = (self.q_lora_rank or self.hidden_size) * heads * width + self.hidden_size * self.q_lora_rank
        found += self.hidden_size * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
        found += self.kv_lora_rank * heads * (self.qk_head_dim + self.v_head_dim)
        found += heads * self.v_head_dim * self.hidden_size
        if self.add_bias_linear:
            found += self.hidden_size
        if self.qk_layernorm:
            found += self.norm(self.kv_lora_rank) + (self.norm(self.q_lora_rank) if self.q_lora_rank else 0)
        return found

    def dense_part(self, *, has_experts: bool, tp: int = 1) -> int:
        """Parameters of a layer on one of ``tp`` ranks, its routed experts aside."""
        found = self.attention(tp) + 2 * self.norm(self.hidden_size)
        if not has_experts:
            return found + self.mlp(self.ffn, tp)
        router = self.num_experts * self.hidden_size + (self.num_experts if self.add_bias_linear else 0)
        shared = self.moe_shared_expert_intermediate_size
        gate = self.hidden_size if self.moe_shared_expert_gate else 0
        return found + router + (self.mlp(shared, tp) if shared else 0) + gate

    def embedding(self, tp: int = 1) -> int:
        """Parameters of the embedding on one of ``tp`` ranks; learned positions are on each of them."""
        learned = self.position_embedding_type == "learned_absolute"
        positions = self.max_position_embeddings * self.hidden_size if learned else 0
        return self.output_layer(tp) + positions

    def output_layer(self, tp: int = 1) -> int:
        """Parameters of the output layer's matrix on one of ``tp`` ranks."""
        return self.padded_vocab(tp) * self.hidden_size // tp

    def prediction_part(self, tp: int = 1) -> int:
        """Parameters that a layer for multi-token prediction has besides an ordinary layer's."""
        return 3 * self.norm(self.hidden_size) + 2 * self.hidden_size**2 // tp

    @property
    def total_parameters(self) -> int:
        """All parameters of the model, once each, without layers for multi-token prediction."""
        return self._without_experts + self.num_experts * self.expert() * sum(self.has_experts)

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: of the routed experts the ones that it visits."""
        return self._without_experts + self.moe_router_topk * self.expert() * sum(self.has_experts)

    @property
    def prediction_parameters(self) -> int:
        """Parameters of the layers for multi-token prediction: embedding and output layer are the model's own."""
        last = self.has_experts[-1]
        experts = self.num_experts * self.expert() if last else 0
        return self.mtp_num_layers * (self.prediction_part() + self.dense_part(has_experts=last) + experts)

    @property
    def _without_experts(self) -> int:
        layers = sum(self.dense_part(has_experts=has) for has in self.has_experts)
        output = self.output_layer() if self.untie_embeddings_and_output_weights else 0
        return layers + self.norm(self.hidden_size) + self.embedding() + output

    def flops_a_token(self, seq_length: int) -> float:
        """Of the model's forward and backward passes: 6 for each active parameter, and attention's scores.

        The embedding computes nothing; the output layer counts, also where it is tied to it. Scores are those of causal
        attention, half of all pairs: 3 x heads x (width of keys + width of values) x ``seq_length``. What is recomputed
        does not count.
        """
        last = self.has_experts[-1]
        visited = self.moe_router_topk * self.expert() if last else 0
        multiplied = self.active_parameters - self.embedding()
        if not self.untie_embeddings_and_output_weights:
            multiplied += self.output_layer()
        multiplied += self.mtp_num_layers * (
            self.prediction_part() + self.dense_part(has_experts=last) + visited + self.output_layer()
        )
        widths = 2 * self.head
        if self.multi_latent_attention:
            widths = self.qk_head_dim + self.qk_pos_emb_head_dim + self.v_head_dim
        scores = 3 * self.num_attention_heads * widths * seq_length
        return 6.0 * multiplied + float(scores * (self.num_layers + self.mtp_num_layers))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pattern(text: str) -> int | list[int]:
    """What ``--moe-layer-freq`` says: a number, or of each layer whether it has experts."""
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(_freq_says(text)) from error
    if isinstance(found, int):
        if found < 1:
            raise ConfigError(_freq_says(text))
        return found
    if any(one not in (0, 1) for one in found):
        raise ConfigError(_freq_says(text))
    return found


def _freq_says(text: str) -> str:
    return f"--moe-layer-freq is {text!r}; it must be a number such as 1, or a list such as ([0]*3+[1]*58)"


def _value(node: ast.expr) -> int | list[int]:
    """Of an expression of numbers, lists of them, ``+`` and ``*``. ``ValueError`` for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_number(_value(one)) for one in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list):
            return left * _times(left, _number(right))
    raise ValueError(ast.unparse(node))


def _number(found: int | Sequence[int]) -> int:
    if not isinstance(found, int):
        raise ValueError("a number was expected")
    return found


def _times(left: Sequence[int], number: int) -> int:
    if number * len(left) > _MAX_LAYERS:
        raise ValueError("too many layers")
    return number
