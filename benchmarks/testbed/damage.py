# SPDX-License-Identifier: Apache-2.0
"""Packets that are lost, or arrive with other content, by rules of nftables on a host's link."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

TABLE = "damage"
_UNTOUCHED_BYTES = 120
"""Headers of IP and TCP are shorter than that."""
_PER = 1000


def why_unavailable() -> str:
    """Why packets cannot be hurt here, with the remedy; empty if they can. Changes nothing."""
    if shutil.which("nft") is None:
        return "packets are hurt by rules of nftables, and there is no nft: apt-get install nftables"
    probe = ["unshare", "--net", "nft", "add table netdev probe"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    return f"nft cannot make a table ({done.stderr.strip()})" if done.returncode else ""


def rules(lost_share: float, damaged_share: float, ports: Sequence[int]) -> str:
    """The words of nft: these shares of the packets that arrive over ``eth0`` are lost, or have other bytes in them.

    ``ports``: of TCP, at either end; all traffic where there are none. A damaged packet has a sum that fits, as where
    memory of a switch rots: TCP does not see it.
    """
    if not all(0 <= share <= 1 for share in (lost_share, damaged_share)):
        raise ValueError(f"shares of {lost_share} and {damaged_share} of all packets; they must be from 0 to 1")
    listed = ", ".join(map(str, ports))
    some = [f"tcp {end}port {{ {listed} }} " for end in "sd"] if ports else [""]
    acts = ((lost_share, "drop"), (damaged_share, f"@nh,{8 * _UNTOUCHED_BYTES},32 set 0x12345678"))
    lines = [
        f"add rule netdev {TABLE} hurt {match}{_some(share)}counter {act}"
        for match in some
        for share, act in acts
        if share
    ]
    hook = "type filter hook ingress device eth0 priority 0 ;"
    return "\n".join([f"add table netdev {TABLE}", f"add chain netdev {TABLE} hurt {{ {hook} }}", *lines]) + "\n"


def _some(share: float) -> str:
    """The words for this share of packets; none for all of them."""
    return "" if share == 1 else f"numgen random mod {_PER} < {round(share * _PER)} "
