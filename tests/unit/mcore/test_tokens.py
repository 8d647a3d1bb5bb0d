# SPDX-License-Identifier: Apache-2.0
"""Which iterations' tokens count, however a loop orders its calls, and when a layer that nobody counts is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moetion.mcore.step_watch import StepWatch
from megatron_moetion.mcore.tokens import MegatronTokens


class Experts(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        return hidden * 1.0


class Layer(torch.nn.Module):
    """An MoE layer with two experts and a router of its own, in a wrapper of DDP's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(moe_pad_expert_input_to_capacity=False, moe_apply_probs_on_input=False)
        self.weight, self.experts, self.router = torch.nn.Parameter(torch.ones(6)), Experts(), torch.nn.Identity()

    def zero_grad_buffer(self) -> None: ...

    def forward(self, tokens: torch.Tensor, *, captured: bool = False) -> torch.Tensor:
        """A graph that was captured before runs no hook on the experts."""
        return (self.weight if captured else self.experts(self.weight, tokens)).sum()


class Training:
    """Iterations of one layer, whose steps a loss scaler may skip."""

    def __init__(self, *, zeroes_first: bool, trains: bool = True) -> None:
        self.layer, self._zeroes_first = Layer(), zeroes_first
        block: Any = SimpleNamespace(experts=(0, 1), module=self.layer, prefix="layers.0")
        self.tokens = MegatronTokens([block])
        self.optimizers = [torch.optim.SGD(self.layer.parameters(), lr=0.1)] if trains else []
        model: Any = [self.layer]
        StepWatch(model, self.optimizers, zeroed=self.tokens.discard, stepping=self.tokens.commit)

    def iteration(self, *, passes: bool = True, skipped: bool = False, captured: bool = False) -> list[int]:
        """The counters, as they are captured at its end."""

        def step() -> None:
            for optimizer in self.optimizers if passes and not skipped else []:
                optimizer.step()

        def run() -> None:
            if passes:
                self.layer(torch.tensor([4, 2]), captured=captured).backward()

        order: list[Callable[[], None]] = [run, step]
        order.insert(0 if self._zeroes_first else 2, self.layer.zero_grad_buffer)
        for call in order:
            call()
        self.tokens.after_step(sees_steps=bool(self.optimizers))
        found: list[int] = self.tokens.counters.totals[0].tolist()
        return found


@pytest.mark.parametrize("zeroes_first", [True, False])
def test_a_skipped_steps_tokens_do_not_count_whenever_gradients_are_zeroed(zeroes_first: bool) -> None:
    training = Training(zeroes_first=zeroes_first)
    found = [training.iteration(skipped=skipped) for skipped in (True, False, True, True, False)]
    assert found == [[0, 0], [4, 2], [4, 2], [4, 2], [8, 4]]


@pytest.mark.parametrize("zeroes_first", [True, False])
def test_without_an_optimizer_all_that_passes_counts(zeroes_first: bool) -> None:
    training = Training(zeroes_first=zeroes_first, trains=False)
    assert [training.iteration() for _ in range(3)] == [[4, 2], [8, 4], [12, 6]]


def test_a_layer_that_is_not_counted_is_named_once_there_was_a_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    caplog.set_level(logging.WARNING, "megatron_moetion")
    training = Training(zeroes_first=True)
    training.iteration(passes=False)
    training.iteration(skipped=True, captured=True)
    assert caplog.messages == []
    for _ in range(2):
        training.iteration(captured=True)
    (said,) = caplog.messages
    assert "tokens of layers.0 are not counted" in said


def test_a_first_iteration_without_passes_is_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    training = Training(zeroes_first=True)
    for passes in (False, True, True):
        training.iteration(passes=passes)
    assert caplog.messages == []
