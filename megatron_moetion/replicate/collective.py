# SPDX-License-Identifier: Apache-2.0
"""What may fail on one rank alone, between calls that all ranks make together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megatron_moetion import errors
from megatron_moetion.errors import ChannelError, ConfigError, MoetionError, shared, understood
from megatron_moetion.replicate.channel import Fabric

T = TypeVar("T")
_TEXT_MAX = 4000
"""Characters of an error that others hear."""
_KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MoetionError)
}
"""Of errors that others hear of, by name."""


def on_all_ranks(fabric: Fabric, action: Callable[[], T]) -> T:
    """Do ``action``, which talks to nobody; where it fails on any rank, every rank raises that error. Collective.

    So no rank waits for one that has given up. The error names the rank and host where it arose and is of the same kind
    everywhere; an error that is not ours is raised as it is where it arose, and as a ``MoetionError`` elsewhere.
    """
    problem: Exception | None = None
    mine: dict[str, Any] | None = None
    try:
        result = action()
    except ChannelError:
        raise  # there is nobody to tell any more, and the others find out by themselves
    except Exception as error:  # whatever it is, the others hear of it before it goes on
        problem = error
        ours = isinstance(error, MoetionError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        mine = {
            "rank": fabric.rank,
            "host": socket.gethostname(),
            "kind": type(error).__name__ if ours else MoetionError.__name__,
            "text": text[:_TEXT_MAX],
            "ranks": 1,
        }
    first = fabric.reduce(mine, _first)
    if first is None:
        return result
    if problem is not None and not isinstance(problem, MoetionError):
        raise problem
    with understood("why it failed"):
        others = f" (and {first['ranks'] - 1} more ranks failed)" if first["ranks"] > 1 else ""
        text, kind = f"rank {first['rank']} on {first['host']}: {first['text']}{others}", _KINDS[first["kind"]]
    raise shared(kind(text)) from problem


def require_same(fabric: Fabric, settings: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` on all ranks where these JSON-able settings are not the same on all. Collective.

    The error names the lowest rank, the lowest one that differs from it, and the first setting in which they differ.
    """
    mine = {"rank": fabric.rank, "settings": dict(settings)}
    found = fabric.reduce({"first": mine, "other": None}, _first_difference)
    with understood("its settings"):
        first, other = found["first"], found["other"]
        if other is None:
            return
        one, another = first["settings"], other["settings"]
        name = next(k for k in (*one, *another) if one.get(k) != another.get(k))
        text = (
            f"ranks {first['rank']} and {other['rank']} were started differently: {name} is {one.get(name)!r} on one "
            f"and {another.get(name)!r} on the other; give all ranks the same settings"
        )
    raise shared(ConfigError(text))


def _first_difference(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    """Of two sets of neighbouring ranks: the first rank, and the first one that differs from it."""
    other = lower["other"]
    if other is None:
        is_same = higher["first"]["settings"] == lower["first"]["settings"]
        other = higher["other"] if is_same else higher["first"]
    return {"first": lower["first"], "other": other}


def _first(lower: dict[str, Any] | None, higher: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the failures of two sets of ranks: that of the lowest rank, and how many ranks have failed."""
    if lower is None or higher is None:
        return lower or higher
    return {**lower, "ranks": lower["ranks"] + higher["ranks"]}
