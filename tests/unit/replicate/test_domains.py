# SPDX-License-Identifier: Apache-2.0
"""Where a node stands: from a file, or as SLURM says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moetion.errors import ConfigError
from megatron_moetion.replicate.domains import own_domain

TREE = {"SLURM_TOPOLOGY_ADDR": "root.leaf7.tux12", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
FILE = """
# the cluster
tux12         row1/rack3
tux13         row1/rack4   # the new one
gpu1.a.org    row2/rack1
gpu2.a.org    row2/rack1
gpu2.b.org    row2/rack2
"""


@pytest.mark.parametrize("setting", ["auto", "slurm"])
@pytest.mark.parametrize(
    ("address", "pattern", "domain"),
    [
        ("root.leaf7.tux12", "switch.switch.node", "root/leaf7"),
        ("b8.tux12", "block.node", "b8"),
        ("s0.s[3-4].tux12.cluster.org", "switch.switch.node", "s0/s[3-4]"),
        ("torus:0:1:2.tux12", "torus:x:y:z.node", "torus:0:1:2"),
    ],
)
def test_slurm_names_what_is_above_a_node(setting: str, address: str, pattern: str, domain: str) -> None:
    environment = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert own_domain(setting, environment, "tux12") == domain


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_TOPOLOGY_ADDR": "tux12", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"},
        {"SLURM_TOPOLOGY_ADDR": "tux12", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node"},
        {"SLURM_TOPOLOGY_ADDR": ".tux12", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node"},
        {"SLURM_TOPOLOGY_ADDR": "root.tux12"},
    ],
)
def test_a_slurm_that_knows_of_no_switch_is_refused_where_it_was_asked(environment: dict[str, str]) -> None:
    assert own_domain("auto", environment, "tux12") == ""
    with pytest.raises(ConfigError, match=r"--moetion-failure-domains is slurm, .* tux12 .*Give a file instead"):
        own_domain("slurm", environment, "tux12")


def test_off_is_off() -> None:
    assert own_domain("off", TREE, "tux12") == ""


@pytest.mark.parametrize(
    ("slurm_name", "host", "domain"),
    [
        ("", "tux12", "row1/rack3"),
        ("tux13", "login.a.org", "row1/rack4"),
        ("", "tux13.cluster.org", "row1/rack4"),
        ("", "gpu1", "row2/rack1"),
        ("", "gpu2.b.org", "row2/rack2"),
    ],
)
def test_a_file_names_nodes_as_slurm_or_the_machine_does(
    tmp_path: Path, slurm_name: str, host: str, domain: str
) -> None:
    path = tmp_path / "nodes"
    path.write_text(FILE)
    environment = {"SLURMD_NODENAME": slurm_name} if slurm_name else {}
    assert own_domain(str(path), {**TREE, **environment}, host) == domain


@pytest.mark.parametrize(
    ("text", "host", "said"),
    [
        (FILE, "tux99", r"of tux99: none of the 5 nodes there is called so"),
        (FILE, "gpu2", r"of gpu2: it is in several domains"),
        ("a x\nb\n", "a", r"line 2, is 'b'; it must be the name of a node and its failure domain"),
        ("a x y", "a", r"line 1, is 'a x y'"),
        ("a x//y", "a", r"line 1, is 'a x//y'"),
        ("a /x", "a", r"line 1, is 'a /x'"),
        ("a x\na y\n", "a", r"line 2: a is in y, and in x before"),
        ("", "a", r"none of the 0 nodes"),
    ],
)
def test_what_a_file_does_not_say_is_refused(tmp_path: Path, text: str, host: str, said: str) -> None:
    path = tmp_path / "nodes"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        own_domain(str(path), {}, host)
    assert str(error.value).startswith(f"--moetion-failure-domains {path}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            own_domain(str(path), {}, "a")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        own_domain(str(tmp_path / "binary"), {}, "a")
