# SPDX-License-Identifier: Apache-2.0
"""What a model's and a process's settings mean for checkpointing on a GPU: one line each, for ``attach`` to log. Pure.

Field names are those of megatron-core 0.16 and 0.19. ``enable_cuda_graph`` and ``external_cuda_graph`` become a value
of ``cuda_graph_impl`` when a config is made; ``cuda_graph_scope`` is called ``cuda_graph_modules`` in 0.19.
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


def graph_settings(config: Any) -> dict[str, Any]:
    """Which settings of CUDA graphs a ``TransformerConfig`` has on; empty where no graph is ever captured."""
    found = {name: vars(config)[name] for name in _FIELDS if name in vars(config)}
    if all(found.get(name, False) in _OFF for name in _FIELDS[:3]):
        return {}
    return {name: value for name, value in found.items() if value not in _OFF}


def graph_note(settings: Mapping[str, Any]) -> str | None:
    """What to say of ``graph_settings``; None where there are none."""
    if not settings:
        return None
    named = ", ".join(f"{name}={_text(value)}" for name, value in settings.items())
    return (
        f"CUDA graphs are on ({named}): not tested with checkpointing. Traffic inside a graph is not seen, so an "
        f"iteration seems to have more room for snapshots than it has"
    )


def check_graphs(settings: Mapping[str, Any], *, recalibrates: bool) -> None:
    """Raise ``ConfigError`` where a captured graph would hold on to what changes between iterations."""
    scope = settings.get("cuda_graph_modules", settings.get("cuda_graph_scope", ()))
    parts = [_text(part) for part in scope] if isinstance(scope, list | tuple) else _text(scope).split(",")
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


def _text(value: Any) -> str:
    """A setting as its flag has it: parts of a scope are members of an enum, and so may be what holds them."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(getattr(value, "name", value))
