# SPDX-License-Identifier: Apache-2.0
"""Errors with a name. A user's mistake is a ``ValueError``; a bug is an ``AssertionError``."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar


class MoetionError(RuntimeError):
    """Base of every expected operational fault."""

    exit_code = 2
    shared: bool = False
    """All ranks have gathered it and raise it together; one a node prints it."""


E = TypeVar("E", bound=MoetionError)


def shared(error: E) -> E:
    """An error that all ranks raise, because they raise it over what they have gathered."""
    error.shared = True
    return error


class ConfigError(MoetionError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before iteration 1."""


class StoreError(MoetionError):
    """The store on this node cannot be used: not writable, too small, or locked by another process."""


class IdentityMismatch(StoreError):
    """An arena belongs to another run, topology, model or format. The message names both sides."""


class CorruptArena(StoreError):
    """An arena whose header, or both manifest pages, do not verify. It is never loaded."""


class ChannelError(MoetionError):
    """A transfer to or from a peer failed or ran past its time limit."""

    exit_code = 1


class DeviceFault(MoetionError):
    """The device refused or failed a copy. Snapshots stop on this rank; training goes on while the device lets it."""


class UnsupportedState(MoetionError):
    """The model or optimizer holds state that cannot be captured bit for bit."""


class NothingRecoverable(MoetionError):
    """A restart found no state that every rank can reach."""

    exit_code = 3


class ProtectionLost(MoetionError):
    """Snapshots have stopped for good and training has gone on long enough without; a restart brings them back."""

    exit_code = 4


class HungPeer(MoetionError):
    """A rank has been silent for so long that this process ends, so that its supervisor restarts the job."""

    exit_code = 5


NOT_OURS = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
)  # fmt: skip
"""What reading a JSON document raises that is none of ours, whatever it is: nested too deep, a number like no other."""


@contextmanager
def understood(what: str) -> Iterator[None]:
    """What another rank has said is read within this; ``ChannelError`` where that is not ``what`` it should be."""
    try:
        yield
    except MoetionError:
        raise  # a ``ConfigError`` is a ``ValueError`` too
    except (*NOT_OURS, struct.error) as error:
        raise ChannelError(f"another rank has said something else than {what}: {error!r}") from error
