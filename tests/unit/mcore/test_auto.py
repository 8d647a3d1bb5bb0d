# SPDX-License-Identifier: Apache-2.0
"""Mode auto around a loop: what is called when, and what a loop sees before the choice."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from ends import AT_END
from fabrics import loopback_fabrics
from support import ManualClock

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.mcore.auto import AutoAttached
from megatron_moetion.plan.choice import Choice
from megatron_moetion.plan.costs import Cost, HostMemory
from megatron_moetion.run.trial import MEASURED, WARM_UP, Offers, Trial

CHOSEN_AT = WARM_UP + MEASURED
NOTHING = HostMemory(state_bytes=0, log_bytes=0, pending_bytes=0)
EXACT = Cost(
    mode="exact",
    period=4,
    snapshot_bytes=1,
    sent_bytes=1,
    arena=NOTHING,
    rank=NOTHING,
    node_bytes=1,
)


@dataclass
class Run:
    """What ``attach`` returns, as far as mode auto calls it."""

    calls: list[Any] = field(default_factory=list)
    pipeline_arguments: dict[str, Any] = field(default_factory=lambda: {"p2p_communicator": "ours"})
    stable_iteration: int = 7

    def start(self, load: Any, newest: Any) -> str:
        self.calls.append(("start", load, newest))
        return "resumed"

    def begin_at(self, iteration: int) -> None:
        self.calls.append(("begin_at", iteration))

    def on_step_end(self, iteration: int, *, healthy: bool, stepped: bool) -> None:
        self.calls.append(("step", iteration))

    def drain(self) -> None:
        self.calls.append("drain")

    def scalars(self) -> dict[str, float]:
        return {"moetion/k": 1.0}

    def close(self) -> None:
        self.calls.append("close")

    def abandon(self, wait_s: float) -> bool:
        self.calls.append("abandon")
        return True


@dataclass
class Loop:
    """A loop of one rank in mode auto."""

    is_first: bool = True
    fails: bool = False
    run: Run = field(default_factory=Run)
    configs: list[MoetionConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.fabric,) = loopback_fabrics(1)
        offers = Offers(costs=(EXACT,), refused={"full": "no room in heaven"})

        def choose(trial: Trial) -> Choice:
            return trial.choose(link_bytes_a_s=None, node_bytes=1 << 30, device_bytes=None)

        def attach(config: MoetionConfig) -> Any:
            if self.fails:
                raise StoreError("no memory")
            self.configs.append(config)
            return self.run

        self.auto = AutoAttached(
            config=MoetionConfig(run_id="r"),
            fabric=self.fabric,
            offers=offers,
            trial=Trial(self.fabric, offers, ManualClock(), lost_token_budget=0.0),
            choose=choose,
            attach=attach,
            is_first=self.is_first,
            undo=ExitStack(),
        )
        AT_END.callback(self.auto.close)

    def train(self, first: int, last: int) -> None:
        for iteration in range(first, last + 1):
            self.auto.on_step_end(iteration)


def test_a_first_start_trains_without_snapshots_and_begins_where_it_chose(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "megatron_moetion")
    loop = Loop()
    assert loop.auto.start() is None
    assert f"snapshots begin after {CHOSEN_AT} iterations" in caplog.text
    loop.train(1, CHOSEN_AT - 1)
    assert (loop.run.calls, loop.auto.pipeline_arguments, loop.auto.stable_iteration) == ([], {}, -1)
    assert (loop.auto.scalars(), loop.auto.experts()) == ({}, ())
    loop.auto.drain()
    loop.train(CHOSEN_AT, CHOSEN_AT + 1)
    assert loop.run.calls == [("begin_at", CHOSEN_AT), ("step", CHOSEN_AT + 1)]
    assert [(c.mode, c.period) for c in loop.configs] == [("exact", 4)]
    assert "full is left out: no room in heaven" in caplog.text
    assert loop.auto.pipeline_arguments == {"p2p_communicator": "ours"}
    assert loop.auto.stable_iteration == 7
    loop.auto.drain()
    loop.auto.close()
    assert loop.run.calls[-2:] == ["drain", "close"]


def test_a_first_start_goes_on_from_the_checkpoint_on_disk() -> None:
    loop = Loop()
    assert loop.auto.start(load_persistent=lambda: 30) is None
    loop.train(31, 30 + CHOSEN_AT)
    assert loop.run.calls == [("begin_at", 30 + CHOSEN_AT)]


def test_a_restart_chooses_at_once_and_recovers_as_any_other() -> None:
    def load() -> int:
        return 3

    loop = Loop(is_first=False)
    assert loop.auto.start(load) == "resumed"
    assert loop.run.calls == [("start", load, None)]
    loop.train(4, 4)
    assert loop.run.calls[1:] == [("step", 4)]


def test_iterations_without_a_step_do_not_count() -> None:
    loop = Loop()
    loop.auto.start()
    for iteration in range(1, CHOSEN_AT + 3):
        loop.auto.on_step_end(iteration, stepped=iteration > 2)
    assert loop.run.calls == [("begin_at", CHOSEN_AT + 2)]


def test_a_run_that_ends_before_the_choice_says_that_there_is_no_snapshot(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    with loop.auto:
        loop.auto.start()
        loop.train(1, 2)
    assert "the run ended before mode auto had chosen" in caplog.text
    with pytest.raises(ConfigError, match="was closed"):
        loop.auto.on_step_end(3)


def test_calls_out_of_order_say_so() -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match=r"call start\(\)"):
        loop.auto.on_step_end(1)
    loop.auto.start()
    with pytest.raises(ConfigError, match="has not chosen yet"):
        _ = loop.auto.session


def test_a_choice_that_cannot_be_kept_is_an_error_and_lets_go_of_the_network() -> None:
    loop = Loop(fails=True)
    loop.auto.start()
    loop.train(1, CHOSEN_AT - 1)
    with pytest.raises(StoreError, match="no memory"), loop.auto:
        loop.train(CHOSEN_AT, CHOSEN_AT)
