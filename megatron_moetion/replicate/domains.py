# SPDX-License-Identifier: Apache-2.0
"""Which failure domain this rank's node is in: from a file, or as SLURM says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_moetion.config import AUTO, OFF, SLURM, flag_of
from megatron_moetion.errors import ConfigError

_FLAG = flag_of("moetion_failure_domains")
_ADDRESS, _PATTERN = "SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN"
_NODE = "node"


def own_domain(setting: str, environment: Mapping[str, str], host_name: str) -> str:
    """This node's failure domain, such as ``switch1/rack2``; "" where it is not known and need not be.

    ``setting`` is that of ``MoetionConfig.failure_domains``. ``ConfigError`` where the file cannot be read, has a line
    that is none, or does not name this node; and for 'slurm' where SLURM says nothing of switches or blocks.
    """
    if setting == OFF:
        return ""
    if setting in (AUTO, SLURM):
        found = of_slurm(environment)
        if setting == SLURM and not found:
            address = environment.get(_ADDRESS)
            said = f"{_ADDRESS} is {address!r}" if address else f"{_ADDRESS} is not set"
            raise ConfigError(
                f"{_FLAG} is {SLURM}, and SLURM says nothing of what {host_name} is connected to ({said}): it needs a "
                f"topology plugin, such as topology/tree, and ranks that srun has started. Give a file instead"
            )
        return found
    return _in_file(setting, [n for n in (environment.get("SLURMD_NODENAME", ""), host_name) if n])


def of_slurm(environment: Mapping[str, str]) -> str:
    """The switches, or the block, that SLURM puts this node below, the outermost first; "" where it says none.

    An address such as ``s0.s2.tux12`` has the pattern ``switch.switch.node``. The name of the node, which may have dots
    of its own, comes last.
    """
    address, pattern = (environment.get(name, "") for name in (_ADDRESS, _PATTERN))
    levels = pattern.split(".")
    if _NODE not in levels:
        return ""
    above = levels.index(_NODE)
    parts = address.split(".")
    return "/".join(parts[:above]) if len(parts) > above and all(parts[:above]) else ""


def read_domains(path: str) -> dict[str, str]:
    """The failure domain of each node that a file names: a line a node, its name and its domain.

    ``ConfigError`` where it cannot be read, a line is something else, or a node has two domains.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_FLAG} {path} cannot be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not all(words[1].split("/")):
            raise ConfigError(
                f"{_FLAG} {path}, line {number}, is {line.strip()!r}; it must be the name of a node and its failure "
                f"domain, such as: node17 switch1/rack2"
            )
        node, domain = words
        if found.setdefault(node, domain) != domain:
            raise ConfigError(f"{_FLAG} {path}, line {number}: {node} is in {domain}, and in {found[node]} before")
    return found


def _in_file(path: str, names: list[str]) -> str:
    """The domain of a node that has all these names; a domain name of the network behind the first dot may differ."""
    found = read_domains(path)
    for name in names:
        if name in found:
            return found[name]
    short = {_short(name) for name in names}
    domains = {domain for node, domain in found.items() if _short(node) in short}
    if len(domains) == 1:
        return domains.pop()
    what = "it is in several domains" if domains else f"none of the {len(found)} nodes there is called so"
    raise ConfigError(f"{_FLAG} {path} does not say the failure domain of {' or '.join(names)}: {what}")


def _short(name: str) -> str:
    return name.partition(".")[0]
