# SPDX-License-Identifier: Apache-2.0
"""Somebody who outlives the ranks and knows whether this run has ever had a state to lose.

Without a witness, a restart that finds no arena cannot tell a run that died before its first snapshot from one whose
copies are all gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from torch import distributed as dist

from megatron_moetion.config import ENDPOINT
from megatron_moetion.rendezvous import HOSTED, connect_to_store

_TIMEOUT = timedelta(seconds=20)


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of earlier starts of this run."""

    is_known: bool = False
    """Whether the witness was there from the first start on, so that it would know of a baseline."""
    had_baseline: bool = False
    """Whether this run has had a state to lose."""


class Witness(Protocol):
    """Asked and told by rank 0 only."""

    def past(self) -> Past:
        """What is known so far."""
        ...

    def note_baseline(self) -> None:
        """Note that there is a state to lose from now on."""
        ...


class NoWitness:
    """Knows nothing."""

    def past(self) -> Past:
        """See ``Witness``."""
        return Past()

    def note_baseline(self) -> None:
        """See ``Witness``."""


NO_WITNESS = NoWitness()


class StoreWitness:
    """Keeps its note in a rendezvous store. ``is_first``: the store is known to be as old as the run."""

    def __init__(self, store: dist.Store, run_id: str, *, is_first: bool) -> None:
        self._store = store
        self._baseline = f"moetion/{run_id}/baseline"
        self._is_first = is_first

    def past(self) -> Past:
        """See ``Witness``. A store that does not answer knows nothing."""
        try:
            return Past(is_known=self._is_first, had_baseline=self._store.check([self._baseline]))
        except RuntimeError:  # torch raises nothing narrower for a lost store
            return Past()

    def note_baseline(self) -> None:
        """See ``Witness``."""
        try:
            self._store.set(self._baseline, "1")
        except (
            RuntimeError
        ):  # torch raises nothing narrower for a lost store; at worst a later restart asks for consent
            return


def open_endpoint(endpoint: str, timeout: timedelta) -> dist.Store:
    """The store at host:port; ``RuntimeError`` or ``ValueError`` where there is none."""
    host, _, port = endpoint.rpartition(":")
    return connect_to_store(host, int(port), timeout)


def witness_of(environment: Mapping[str, str], run_id: str) -> Witness:
    """The launcher's store, if it outlives an attempt: named by ``MOETION_RENDEZVOUS``, else torchrun's own.

    torchrun keeps one store for all attempts of a job, unless it was told not to share it. A requeued SLURM job has a
    new one. Warm parents host one for an attempt of the launcher.
    """
    is_requeued = environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    named = environment.get(ENDPOINT, "")
    shared = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") not in ("1", "true", "True")
    if named:
        endpoint = named
    elif HOSTED in environment:  # it lives as long as the launcher's attempt
        endpoint = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        is_requeued = is_requeued or environment[HOSTED] != "0"
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and shared:
        endpoint = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    else:
        return NO_WITNESS
    try:
        store = open_endpoint(endpoint, _TIMEOUT)
    except (RuntimeError, ValueError):  # torch raises nothing narrower where nobody listens
        return NO_WITNESS
    return StoreWitness(store, run_id, is_first=not is_requeued)
