# SPDX-License-Identifier: Apache-2.0
"""Where passes are thrown away and where a step makes them count. Whole models: ``dist/test_reruns.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_moetion.mcore.step_watch import StepWatch


class Wrapper(torch.nn.Module):
    """What a DDP wrapper is here: a module whose gradients are zeroed by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.zeroed = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.weight * tokens).sum()

    def zero_grad_buffer(self) -> None:
        self.zeroed += 1


class Training:
    """A model of two wrappers, with two optimizers, and what it hears of itself."""

    def __init__(self, *, trains: bool = True) -> None:
        self.heard: list[str] = []
        self.model = [Wrapper(), Wrapper()]
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in self.model if trains]
        self.watch = StepWatch(
            self.model,
            self.optimizers,
            zeroed=lambda: self.heard.append("zeroed"),
            again=lambda: self.heard.append("again"),
            stepping=lambda: self.heard.append("stepping"),
        )

    def zero(self) -> None:
        for wrapper in self.model:
            wrapper.zero_grad_buffer()

    def passes(self) -> None:
        for wrapper in self.model:
            wrapper(torch.ones(2)).backward()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def said(self) -> list[str]:
        found, self.heard[:] = list(self.heard), []
        return found


@pytest.fixture
def training() -> Training:
    return Training()


def test_passes_that_a_step_uses_are_no_rerun(training: Training) -> None:
    for _ in range(3):
        training.zero()
        training.passes()
        training.passes()  # gradients add up
        training.step()
        assert training.said() == ["zeroed", "zeroed", "stepping"]


def test_gradients_zeroed_after_the_step_are_no_rerun(training: Training) -> None:
    for _ in range(3):
        training.passes()
        training.step()
        training.zero()
        assert training.said() == ["stepping", "zeroed", "zeroed"]


@pytest.mark.parametrize("zeroes_first", [True, False])
def test_without_optimizers_nothing_runs_again_and_all_passes_count(zeroes_first: bool) -> None:
    training = Training(trains=False)
    for _ in range(3):
        if zeroes_first:
            training.zero()
        training.passes()
        training.step()
        if not zeroes_first:
            training.zero()
    assert training.said() == ["stepping"] * (2 if zeroes_first else 3)


def test_evaluation_is_no_pass(training: Training) -> None:
    with torch.no_grad():
        training.model[0](torch.ones(2))
    training.zero()
    assert training.said() == ["zeroed", "zeroed"]


def test_megatrons_rerun_state_machine_is_seen(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RerunStateMachine, "_reduce_any", lambda self, value: value)
    monkeypatch.setattr(RerunStateMachine, "_maybe_report_stats", lambda self: None)
    for state in ("_save_state", "_restore_state"):  # of a GPU's random numbers
        monkeypatch.setattr(RerunStateMachine, state, lambda self: None)
    machine = RerunStateMachine(mode=RerunMode.REPORT_DETERMINISM_STATS)
    while machine.should_run_forward_backward(None):
        training.zero()
        training.passes()
        machine.validate_result(torch.zeros(()), rejection_func=lambda _: False, message="none", fatal=False)
    training.step()
    assert training.said() == ["zeroed", "zeroed", "zeroed", "again", "zeroed", "stepping"]


def test_everything_is_put_back(training: Training) -> None:
    training.watch.close()
    training.zero()
    training.passes()
    training.zero()
    training.step()
    assert training.said() == []
    for wrapper in training.model:
        assert wrapper.zeroed == 2
        assert "zero_grad_buffer" not in vars(wrapper)


def test_what_cannot_be_watched_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper: Any = Wrapper()
    with pytest.raises(AttributeError):
        StepWatch([wrapper, torch.nn.Linear(1, 1)], [])  # type: ignore[list-item]
    assert "zero_grad_buffer" not in vars(wrapper)
    assert not wrapper._forward_pre_hooks
