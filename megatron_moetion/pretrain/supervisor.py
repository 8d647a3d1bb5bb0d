# SPDX-License-Identifier: Apache-2.0
"""What the launcher's settings mean for faults to come. Pure: it reads an environment and says a sentence."""

from __future__ import annotations

from collections.abc import Mapping

SHARE_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def replacement_warning(environ: Mapping[str, str]) -> str | None:
    """One line where ``torchrun`` may restart this job but cannot take in another node for a lost one.

    With torch 2.13 a node that joins a ``c10d`` rendezvous later waits for an address that is published only at the
    first start; after a minute it and the survivors end. With the variable set, the address is published at each start.
    Workers are not told which rendezvous it is, so the line says for which one it holds.
    """
    shares_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several_nodes = int(environ.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if not (shares_store and several_nodes and restarts):
        return None
    return (
        f"with --rdzv-backend=c10d no other node can join for a lost one: {SHARE_SWITCH} is "
        f"{environ.get(SHARE_SWITCH, 'not set')}; start torchrun with {SHARE_SWITCH}=1 on every node"
    )
