# SPDX-License-Identifier: Apache-2.0
"""What a model's and a process's settings mean for checkpointing on a GPU: one line each, for ``attach`` to log. Pure.

Field names are those of megatron-core 0.16 and 0.19; one that a version lacks counts as not set. ``enable_cuda_graph``
and ``external_cuda_graph`` become a value of ``cuda_graph_impl`` when a config is made, and ``moe_enable_deepep`` one
of ``moe_flex_dispatcher_backend``; ``cuda_graph_scope`` is called ``cuda_graph_modules`` in 0.19.

What was looked at for graphs: hooks are Python and run when a graph is captured, never when it is replayed. What they
enqueue on the device is part of the graph. So a count of tokens, which is an addition on the device, goes on; a mark of
time or a message to another thread does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moetion.errors import ConfigError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_FIELDS = ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope", "cuda_graph_modules")
_OFF = ("none", False, None)
_ROUTER = ("moe", "moe_router", "full", "full_iteration")
"""Parts of a model whose capture holds the router; so does that of a whole layer, an empty list."""
_BACKENDS = {"deepep": "DeepEP", "hybridep": "HybridEP", "ncclep": "NCCL EP"}
_BUDGET = "moe_expert_rank_capacity_factor"
_PADS = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")


def graph_settings(config: Any) -> dict[str, Any]:
    """Which settings of CUDA graphs a ``TransformerConfig`` has on; empty where no graph is ever captured."""
    found = {name: vars(config)[name] for name in _FIELDS if name in vars(config)}
    if all(found.get(name, False) in _OFF for name in _FIELDS[:3]):
        return {}
    return {name: value for name, value in found.items() if value not in _OFF}


def captures_iterations(settings: Mapping[str, Any]) -> bool:
    """Whether ``graph_settings`` ask for one graph of all forward and backward passes of an iteration."""
    return settings.get("cuda_graph_impl") == "full_iteration" or "full_iteration" in _parts(settings)


def schedule_with_graphs(schedule: str, settings: Mapping[str, Any]) -> str:
    """The schedule to take where ``schedule`` was asked for: gaps between messages that nobody sees cannot be used."""
    return "steady" if schedule == "bubble" and captures_iterations(settings) else schedule


def graph_note(settings: Mapping[str, Any], schedule: str = "steady") -> str | None:
    """What to say of ``graph_settings`` and the schedule that was asked for; None where there are no graphs."""
    if not settings:
        return None
    named = ", ".join(f"{name}={_text(value)}" for name, value in settings.items())
    what = f"CUDA graphs are on ({named}), which was not tested on a GPU"
    if captures_iterations(settings):
        sent = "snapshots leave evenly (--moetion-schedule steady)"
        if schedule == "bubble":
            sent += " and not in the gaps that --moetion-schedule bubble asks for"
        return (
            f"{what}: captures, recoveries and token counts work as without; no traffic of an iteration is seen, so "
            f"{sent}, and an iteration seems to have more room for them than it has"
        )
    return (
        f"{what}: captures, recoveries and token counts work as without; traffic inside a graph is not seen, so an "
        f"iteration seems to have more room for snapshots than it has"
    )


def dispatcher_note(config: Any) -> str | None:
    """What to say of a dispatcher that exchanges tokens by kernels of its own; None where there is none."""
    if getattr(config, "moe_token_dispatcher_type", None) != "flex":
        return None
    backend = str(getattr(config, "moe_flex_dispatcher_backend", None) or "deepep")
    name = _BACKENDS.get(backend, backend)
    return (
        f"{name} exchanges tokens (--moe-token-dispatcher-type flex, --moe-flex-dispatcher-backend {backend}), which "
        f"was not tested on a GPU: captures, recoveries and token counts do not depend on it; of its traffic the bytes "
        f"that a rank hands over are seen, and not the copies for several ranks, so an iteration may seem to have more "
        f"room for snapshots than it has"
    )


def stash_note(config: Any) -> str | None:
    """What to say of iterations that may run twice, because their tokens do not fit a buffer; None where none may."""
    if not getattr(config, "moe_paged_stash", False) and getattr(config, _BUDGET, None) is None:
        return None
    named = "moe_paged_stash" if getattr(config, "moe_paged_stash", False) else _BUDGET
    return (
        f"{named} is on, which was not tested on a GPU: an iteration whose tokens do not fit runs twice; its tokens "
        f"and its step count once, and no window for snapshots is derived from it"
    )


def padding_note(config: Any, *, counts_tokens: bool) -> str | None:
    """What to say where experts get rows that are no tokens and cannot be told from them; None where they do not."""
    pads = any(getattr(config, name, False) for name in _PADS)
    kernels = getattr(config, "moe_token_dispatcher_type", None) == "flex"
    aligned = kernels and (getattr(config, "fp8", None) or getattr(config, "fp4", None))
    if not counts_tokens or not (pads or aligned):
        return None
    return (
        "experts' inputs are padded for FP8 or FP4: token counts, and tokens at risk or lost with them, include the "
        "padding, at most one alignment (16 to 256 rows) less one an expert and micro batch"
    )


def check_graphs(settings: Mapping[str, Any], *, recalibrates: bool) -> None:
    """Raise ``ConfigError`` where a captured graph would hold on to what changes between iterations."""
    parts = _parts(settings)
    if settings and recalibrates and (not any(parts) or any(part in _ROUTER for part in parts)):
        raise ConfigError(
            f"--moetion-capacity-recalibration on changes the capacity of experts between iterations, and a CUDA graph "
            f"of the router ({', '.join(f'{n}={_text(v)}' for n, v in settings.items())}) keeps the one that it was "
            f"captured with; turn one of them off, or capture only attention and dense layers"
        )


def connections_note(environment: Mapping[str, str]) -> str | None:
    """What to say of the number of hardware queues of a process that trains on a GPU; None where all is well."""
    if environment.get(CONNECTIONS) != "1":
        return None
    return (
        f"{CONNECTIONS}=1: all streams share one hardware queue, so that training's launches wait behind those of "
        f"snapshots. Unset it (8 queues), except where tensor or context parallelism asks for 1"
    )


def _parts(settings: Mapping[str, Any]) -> list[str]:
    """The parts of a layer that are captured; an empty list where it is all of it."""
    scope = settings.get("cuda_graph_modules", settings.get("cuda_graph_scope", ()))
    return [_text(part) for part in scope] if isinstance(scope, list | tuple) else _text(scope).split(",")


def _text(value: Any) -> str:
    """A setting as its flag has it: parts of a scope are members of an enum, and so may be what holds them."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(getattr(value, "name", value))
