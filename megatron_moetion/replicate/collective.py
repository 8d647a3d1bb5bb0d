# SPDX-License-Identifier: Apache-2.0
"""What may fail on one rank alone, between calls that all ranks make together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

from megatron_moetion import errors
from megatron_moetion.errors import ChannelError, MoetionError, shared
from megatron_moetion.replicate.channel import Fabric

T = TypeVar("T")


def on_all_ranks(fabric: Fabric, action: Callable[[], T]) -> T:
    """Do ``action``, which talks to nobody; where it fails on any rank, every rank raises that error. Collective.

    So no rank waits for one that has given up. The error names the rank and host where it arose and is of the same kind
    everywhere; an error that is not ours is raised as it is where it arose, and as a ``MoetionError`` elsewhere.
    """
    problem: Exception | None = None
    note: dict[str, str] = {}
    try:
        result = action()
    except ChannelError:
        raise  # there is nobody to tell any more, and the others find out by themselves
    except Exception as error:  # whatever it is, the others hear of it before it goes on
        problem = error
        ours = isinstance(error, MoetionError)
        note = {
            "kind": type(error).__name__ if ours else MoetionError.__name__,
            "text": str(error) if ours else f"{type(error).__name__}: {error}",
            "host": socket.gethostname(),
        }
    notes = fabric.gather(note)
    failed = [rank for rank, found in enumerate(notes) if found]
    if not failed:
        return result
    if problem is not None and not isinstance(problem, MoetionError):
        raise problem
    first = notes[failed[0]]
    others = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
    kind: type[MoetionError] = getattr(errors, first["kind"])
    raise shared(kind(f"rank {failed[0]} on {first['host']}: {first['text']}{others}")) from problem
