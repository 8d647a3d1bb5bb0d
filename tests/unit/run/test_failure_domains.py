# SPDX-License-Identifier: Apache-2.0
"""Failure domains at the start of a run: where they come from, what is said, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from session_job import Job

from megatron_moetion.errors import ConfigError

ODDS = "placement: groups of nodes: 1 of 2; odds that all state survives lost nodes: 100% of 1, 0% of 2"


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_moetion")


def test_a_file_that_names_this_machine_counts_and_the_start_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("node7.cluster.org switch1/rack2\n")
    job = Job(tmp_path / "store", failure_domains=str(nodes), host={"name": "node7"})
    job.start()
    (placement, domains) = [r.getMessage() for r in caplog.records if " nodes" in r.getMessage()]
    assert placement.endswith(ODDS)
    assert domains.endswith("failure domains: all nodes are in switch1/rack2, which placement cannot change")
    job.crash()


def test_without_known_domains_only_the_odds_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(tmp_path)
    job.start()
    assert [r.getMessage().endswith(ODDS) for r in caplog.records if " nodes" in r.getMessage()] == [True]
    job.crash()


def test_a_node_that_the_file_does_not_name_ends_the_start_of_all_and_leaves_nothing(tmp_path: Path) -> None:
    nodes, store = tmp_path / "nodes", tmp_path / "store"
    nodes.write_text("node8 rack2\n")
    with pytest.raises(ConfigError, match="does not say the failure domain of node7") as error:
        Job(store, failure_domains=str(nodes), host={"name": "node7"})
    assert error.value.shared
    assert not list(store.rglob("node*"))
