# SPDX-License-Identifier: Apache-2.0
"""What settings leave open: replicas, as the nodes allow, and what becomes of the memory of a run without a name."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fabrics import loopback_fabrics
from session_job import Adapter, Job, together

from megatron_moetion.run.prepare import settled_replicas
from megatron_moetion.units import Inventory

MADE_UP = "1c1b4a52-0f0e-4c79-8b34-5ad1e0b0a9d7"
"""As torchrun makes up a run id."""


def said(caplog: pytest.LogCaptureFixture, about: str) -> list[str]:
    return [m for r in caplog.records if about in (m := r.getMessage())]


@pytest.mark.parametrize(("nodes", "expected"), [("aaa", 0), ("aab", 1), ("abb", 1)])
def test_replicas_are_what_the_nodes_allow_and_a_given_number_stays(nodes: str, expected: int) -> None:
    fabrics = loopback_fabrics(3)

    def settle(given: int) -> list[int]:
        return together(*(partial(settled_replicas, given, f, node) for f, node in zip(fabrics, nodes, strict=True)))

    assert settle(-1) == [expected] * 3
    assert settle(2) == [2] * 3


def test_a_run_goes_on_with_the_settled_number(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    assert [prepared.config.replicas for prepared in job.prepared] == [1, 1]
    assert [session.running.coding.holders for session in job.sessions] == [1, 1]


class WithGuide(Adapter):
    """A state whose framework says whether a checkpoint has a place for it."""

    problem: str | None = None

    def inventory(self) -> Inventory:
        return replace(super().inventory(), guide=json.dumps({"problem": self.problem}))


class NotExported(WithGuide):
    problem = "the optimizer is a Lion"


@pytest.mark.parametrize(("state", "lines"), [(WithGuide, 0), (NotExported, 1)])
def test_a_run_that_export_could_not_rescue_says_so_when_it_begins_and_when_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, state: type[WithGuide], lines: int
) -> None:
    for attempt in range(2):
        caplog.clear()
        job = Job(tmp_path, attempt=attempt, state=state)
        with caplog.at_level(logging.INFO):
            job.start()
            job.train(3)
            job.crash()
        found = said(caplog, "moetion export could not")
        assert ["2 ranks" in line and "a Lion" in line for line in found] == [True] * lines


@pytest.mark.parametrize(("elastic_id", "is_removed"), [(MADE_UP, True), ("my-run", False)])
def test_arenas_that_no_launch_finds_again_are_removed_when_all_have_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, elastic_id: str, is_removed: bool
) -> None:
    at_exit: list[Callable[[], None]] = []
    job = Job(tmp_path, run_id="", elastic_id=elastic_id, host={"at_exit": at_exit.append})
    with caplog.at_level(logging.INFO):
        job.start()
    lines = said(caplog, "torchrun has made up the run id")
    assert [elastic_id in line and "--moetion-run-id" in line for line in lines] == [True] * is_removed
    job.train(2)
    together(*(session.close for session in job.sessions))
    assert len(list(tmp_path.glob(f"{elastic_id}/node*/*.arena"))) == 4, "training may still fail, and be restarted"
    for action in at_exit:
        action()
    assert list(tmp_path.iterdir()) == ([] if is_removed else [tmp_path / elastic_id])


def test_arenas_stay_where_a_rank_has_not_closed(tmp_path: Path) -> None:
    at_exit: list[Callable[[], None]] = []
    job = Job(tmp_path, run_id="", elastic_id=MADE_UP, host={"at_exit": at_exit.append}, timeout_s=2)
    job.start()
    job.train(1)
    closing = threading.Thread(target=job.sessions[0].close)
    closing.start()
    closing.join()
    assert at_exit == []
