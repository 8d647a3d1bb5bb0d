# SPDX-License-Identifier: Apache-2.0
"""What the launcher's settings mean for faults to come. Pure: it reads an environment and says a sentence."""

from __future__ import annotations

from collections.abc import Mapping

SHARE_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def replacement_warning(environ: Mapping[str, str]) -> str | None:
    """One line where ``torchrun`` could restart this job but not with another node in a lost one's place.

    With torch 2.13 a node that joins a rendezvous later waits for an address that is published only at the first
    start; after a minute it and the survivors end. With the variable set, the address is published at each start.
    """
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's word to its workers
    several_nodes = int(environ.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if not (shared and several_nodes and restarts) or environ.get(SHARE_SWITCH) == "1":
        return None
    return (
        f"no node can replace a lost one: {SHARE_SWITCH} is {environ.get(SHARE_SWITCH, 'not set')}; start torchrun on "
        f"every node with {SHARE_SWITCH}=1 and --rdzv-backend=c10d"
    )
