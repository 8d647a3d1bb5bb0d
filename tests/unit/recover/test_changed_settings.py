# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run that is started again with other settings, as docs/flags.md says it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from session_job import Job

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import IdentityMismatch

OTHER = {
    "replicas": 0, "coding_nodes": 4, "ranks_per_node": 2, "failure_domains": "off", "network_interface": "lo",
    "interval": 2, "selection": "sequential", "capacity_recalibration": "on", "recalibration_iterations": 9,
    "schedule": "eager",
    "pack_threads": 2, "pack_sms": 2, "max_stall_ms": 1900, "timeout_s": 11, "hang_timeout_s": 0, "holder_patience": 5,
    "max_unprotected_iterations": 9, "max_fruitless_recoveries": 0, "in_flight_bytes": 1 << 20,
    "state_hash_interval": 2, "trace_dir": "traces", "report": "report.jsonl", "allow_fresh": True,
    "inject_fault": "9:0:1:before-commit", "save": "off", "save_interval": 5, "grace_s": 5, "save_limit_s": 60,
    "warm_restarts": 3,
}  # fmt: skip
"""A value that is not the default, of each setting that may change."""
FIXED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("full", {}, {"mode": "popularity"}, "--moetion-mode: the arena has 'full', this run has 'popularity'"),
    ("full", {}, {"chunk_bytes": 8192}, "--moetion-chunk-bytes: the arena has 4096, this run has 8192"),
    ("popularity", {}, {"experts_per_snapshot": 3}, "room for 2 experts a snapshot, this run wants 3"),
    ("popularity", {}, {"max_experts_per_snapshot": 3}, "room for 2 experts a snapshot, this run wants 3"),
    ("popularity", {}, {"snapshot_bytes": 10**6}, "room for 2 experts a snapshot, this run wants 4"),
    ("popularity", {}, {"lost_token_budget": 0.0}, "room for 2 experts a snapshot, this run wants 1"),
    ("popularity", {"lost_token_budget": 0.0}, {"staleness_cap": 4}, "room for 1 experts a snapshot, this run wants 2"),
]


def trained(folder: Path, **settings: Any) -> int:
    """The iteration that a job leaves behind."""
    job = Job(folder, **settings)
    job.start()
    job.train(3)
    job.crash()
    return job.iteration


def test_every_setting_says_whether_it_may_change_and_is_tested() -> None:
    fixed = {f.name for f in fields(MoetionConfig) if "fixed" in f.metadata}
    assert set(OTHER) == {f.name for f in fields(MoetionConfig)} - fixed
    elsewhere = {"run_id", "store", "period"}  # another run, another memory; tests/dist/test_exact_faults.py
    assert fixed == {name for _, _, now, _ in FIXED for name in now} | elsewhere


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_settings_that_may_change_go_on_from_the_same_state(tmp_path: Path, mode: str) -> None:
    last = trained(tmp_path, mode=mode)
    meant = [f for f in fields(MoetionConfig) if f.name in OTHER and mode in f.metadata.get("modes", (mode,))]
    # The ranks of a ``Job`` have a node each; tests/dist/test_faults.py brings ranks back on other nodes. Two nodes are
    # too few for fragments; test_session_fragments.py goes over to them and back.
    changed = {f.name: OTHER[f.name] for f in meant if f.name not in ("ranks_per_node", "coding_nodes")}
    folders = {name: str(tmp_path / changed[name]) for name in ("trace_dir", "report")}
    second = Job(tmp_path, attempt=1, mode=mode, **{**changed, **folders})
    resumed = second.start()
    assert [r.iteration for r in resumed if r is not None] == [last, last]
    second.train(2)
    second.crash()


@pytest.mark.parametrize(("mode", "before", "now", "message"), FIXED)
def test_a_setting_that_is_fixed_is_refused_with_both_values(
    tmp_path: Path, mode: str, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    first = Job(tmp_path, **{"mode": mode, **before})
    first.start()  # a snapshot of the first state is stable
    first.crash()
    second = Job(tmp_path, attempt=1, **{"mode": mode, **before, **now})
    with pytest.raises(IdentityMismatch, match=message.replace("(", r"\(")):
        second.start()
