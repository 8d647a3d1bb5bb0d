# SPDX-License-Identifier: Apache-2.0
"""What a restart with other flags means: some are refused, some act from here on, some do not matter. Pure."""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_moetion.config import flag_of
from megatron_moetion.errors import NOT_OURS, ConfigError, CorruptArena

RECORD_BYTES = 8192
"""A record's size, whatever the flags are: the size of state must not depend on a flag that may change."""
_LONGEST_VALUE = 160
_SHOWN = 60


class Effect(enum.Enum):
    """What it does to a run that goes on when one flag is another one than before."""

    MODEL = "the same weights would compute something else"
    RUN = "it would be another run: other data, random numbers, precision or layout"
    ACTS = "it acts as given from here on, and training goes on sensibly"
    FREE = "nothing that is learnt depends on it"


_FLAGS = {
    Effect.MODEL: (
        "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups "
        "position_embedding_type normalization swiglu add_bias_linear untie_embeddings_and_output_weights num_experts "
        "moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk moe_router_pre_softmax "
        "moe_router_score_function moe_router_enable_expert_bias"
    ),
    Effect.RUN: (
        "seed data_path split mock_data vocab_size seq_length max_position_embeddings make_vocab_size_divisible_by "
        "init_method_std attention_dropout hidden_dropout moe_router_load_balancing_type moe_expert_capacity_factor "
        "moe_pad_expert_input_to_capacity moe_token_drop_policy moe_grouped_gemm transformer_impl bf16 fp16 "
        "accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 initial_loss_scale tensor_model_parallel_size "
        "pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage expert_model_parallel_size "
        "expert_tensor_parallel_size sequence_parallel use_distributed_optimizer"
    ),
    Effect.ACTS: (
        "lr min_lr lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_init weight_decay clip_grad adam_beta1 "
        "adam_beta2 adam_eps moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate train_iters "
        "iterations_to_skip global_batch_size micro_batch_size loss_scale min_loss_scale loss_scale_window hysteresis "
        "moe_token_dispatcher_type device overlap_grad_reduce overlap_param_gather recompute_granularity "
        "recompute_method recompute_num_layers"
    ),
    Effect.FREE: (
        "distributed_timeout_minutes exit_interval data_cache_path log_interval eval_interval eval_iters "
        "tensorboard_dir metrics_path save save_interval load"
    ),
}
EFFECTS = {name: effect for effect, names in _FLAGS.items() for name in names.split()}
"""Of every flag but ``--moetion*``, by the name that it has in the parsed flags. Those are the runtime's to check."""
_REORDER = ("train_iters", "global_batch_size")
"""An indexed dataset shuffles as many samples as these ask for."""


def record(args: argparse.Namespace) -> bytes:
    """The checked flags that a restart has to be compared with, ``RECORD_BYTES`` long; of another program's those that
    it has."""
    values = vars(args)
    compared = (name for name, effect in EFFECTS.items() if effect is not Effect.FREE and name in values)
    kept = {name: _short(values[name]) for name in compared}
    text = json.dumps(kept, separators=(",", ":")).encode()
    assert len(text) <= RECORD_BYTES, f"{len(text)} bytes of flags; a record has room for {RECORD_BYTES}"
    return text.ljust(RECORD_BYTES)


def compare(before: bytes, now: bytes, *, same_run: bool) -> str:
    """What there is to say of the flags of two starts, as one line; empty where there is nothing.

    ``same_run``: state comes from the memory of this run; else from a checkpoint on disk, from which another run may
    begin. ``ConfigError`` names every flag that must not differ, with both values. A flag that one of the two records
    lacks is not compared.
    """
    try:
        then, today = dict(json.loads(before)), json.loads(now)
    except NOT_OURS as error:
        raise CorruptArena(f"the flags of the last start cannot be read: {error}") from error
    changed = [name for name in EFFECTS if name in then and name in today and then[name] != today[name]]
    fatal = (Effect.MODEL, Effect.RUN) if same_run else (Effect.MODEL,)
    refused = [name for name in changed if EFFECTS[name] in fatal]
    if refused:
        raise ConfigError(_refusal(", ".join(_changed(n, then, today) for n in refused), same_run=same_run))
    if not changed:
        return ""
    since = "the last start" if same_run else "the checkpoint was saved"
    line = f"flags changed since {since}: {', '.join(_changed(name, then, today) for name in changed)}"
    if today.get("data_path") and any(name in changed for name in _REORDER):
        line += " (samples of --data-path may come in another order)"
    return line


def _refusal(flags: str, *, same_run: bool) -> str:
    if same_run:
        return (
            f"flags that make this run what it is differ from those of the last start: {flags}. Its state stays in "
            f"memory as it is: go back to the flags that it was trained with, or take another --moetion-run-id"
        )
    return (
        f"the checkpoint is of another model: {flags}. Go back to the flags that it was saved with, or begin without "
        f"--load"
    )


def _changed(name: str, then: Mapping[str, Any], today: Mapping[str, Any]) -> str:
    if name == "add_bias_linear":  # the one flag that takes away
        return f"--disable-bias-linear {_shown(not then[name])} -> {_shown(not today[name])}"
    return f"{flag_of(name)} {_shown(then[name])} -> {_shown(today[name])}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


def _short(value: Any) -> Any:
    """The value, or its beginning and a digest of all of it."""
    text = json.dumps(value, default=str)
    if len(text) <= _LONGEST_VALUE:
        return json.loads(text)
    return f"{_shown(value)} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
