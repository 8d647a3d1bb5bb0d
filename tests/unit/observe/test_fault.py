# SPDX-License-Identifier: Apache-2.0
"""Faults strike the named rank at the named point of the named attempt, and nowhere else."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_moetion.errors import ConfigError
from megatron_moetion.observe.fault import POINTS, Fault, make_probe, parse_faults


def test_faults_are_parsed() -> None:
    assert parse_faults("") == ()
    assert parse_faults("0:1:7:mid-pack,1:0:-1:survey") == (
        Fault(attempt=0, rank=1, iteration=7, point="mid-pack"),
        Fault(attempt=1, rank=0, iteration=-1, point="survey"),
    )


@pytest.mark.parametrize("text", ["0:1:7", "0:1:7:nowhere", "0:1:7:mid-pack:more", "a:1:7:mid-pack"])
def test_a_mistake_is_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_faults(text)


def test_a_probe_kills_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    faults = parse_faults("1:0:7:mid-pack,1:0:-1:fetch")
    for attempt, rank in ((0, 0), (1, 1)):
        probe = make_probe(faults, attempt, rank)
        for point in POINTS:
            probe(point, 7)
    assert killed == []
    probe = make_probe(faults, 1, 0)
    probe("mid-pack", 6)
    probe("before-select", 7)
    assert killed == []
    probe("mid-pack", 7)
    probe("fetch", 3)
    assert killed == [(os.getpid(), signal.SIGKILL)] * 2
