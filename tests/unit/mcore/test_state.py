# SPDX-License-Identifier: Apache-2.0
"""The room that is reserved for a host state, and what is forgotten after loading.

Inventories of whole models are in ``tests/dist/test_inventory.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moetion.mcore.homes import Homes
from megatron_moetion.mcore.rng import load_rng_states, rng_states
from megatron_moetion.mcore.state import SPARE_HOST_BYTES, MegatronState, host_unit
from megatron_moetion.mcore.steplog import StepLog
from megatron_moetion.snapshot.host_state import decode, encode, size_bound


def state(**changes: Any) -> dict[str, Any]:
    return {"given": {"lr_decay_style": "linear"}, "user": {"iteration": 0}, "rng": bytes(100), **changes}


def test_the_adapter_reserves_its_own_share_and_what_it_may_grow_by() -> None:
    reserved = host_unit(state(given={})).reserved_bytes
    assert reserved == size_bound({"adapter": state(given={})}) + SPARE_HOST_BYTES
    grown = state(user={"iteration": 1 << 60, "log": bytes(SPARE_HOST_BYTES // 2)})
    assert len(encode({"adapter": grown})) < host_unit(state()).reserved_bytes


def test_room_does_not_depend_on_settings_that_a_restart_may_change() -> None:
    assert host_unit(state()) == host_unit(state(given={"lr_decay_style": "inverse-square-root"}))


def test_steps_that_loading_takes_are_of_no_iteration() -> None:
    """A checkpoint of ``torch_dist`` is loaded into what a step of the optimizer has made."""
    link: Any = FP32Optimizer.__new__(FP32Optimizer)
    link.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    loading = MegatronState.__new__(MegatronState)
    loading.step_log = log = StepLog(link, [link], [torch.zeros(2)])
    loading._homes = Homes([link.optimizer])
    link.optimizer.step()
    loading.loaded()
    link.optimizer.step()
    assert log.note_step(1).problem is None
    link.optimizer.step()
    link.optimizer.step()
    assert log.note_step(2).problem == "2 optimizer steps were taken in one iteration"
    log.close()


@pytest.mark.parametrize("has_trained", [True, False])
def test_draws_after_the_start_are_taken_back_where_training_had_begun(
    has_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that had not begun draws again what its first start drew: there the state before it is too early."""
    device = torch.Generator()
    monkeypatch.setattr(torch.cuda, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", device.set_state)
    adapter = MegatronState.__new__(MegatronState)
    adapter.restore_rng()  # nothing was recovered
    adapter.has_trained = has_trained
    adapter._recovered_rng = rng_states()
    expected = torch.rand(3)
    if not has_trained:
        expected = torch.rand(3)
    load_rng_states(adapter._recovered_rng)
    torch.rand(3)  # as a data loader does
    adapter.restore_rng()
    assert torch.equal(torch.rand(3), expected)


class Warmup:
    """A scheduler of somebody's own."""

    steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class MoreThanMegatrons(OptimizerParamScheduler):
    """It holds something that Megatron's does not."""

    extra = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.extra = state["extra"]


def megatrons(kind: type[OptimizerParamScheduler]) -> OptimizerParamScheduler:
    optimizer: Any = SimpleNamespace(param_groups=[])
    return kind(optimizer, 0.0, 1.0, 0.0, 5, 100, "linear", 0.1, 0.1, 100, "constant")


def carried(scheduler: Any, onto: Any) -> None:
    """The state of one scheduler, over the bytes of a host state, into another one, as a recovery does."""
    states = []
    for each in (scheduler, onto):
        adapter = MegatronState.__new__(MegatronState)
        adapter._scheduler = each
        states.append(adapter)
    states[1].load_scheduler(decode(encode({"it": states[0].scheduler_state()}))["it"])


def test_every_kind_of_scheduler_is_carried() -> None:
    own, again = Warmup(), Warmup()
    own.steps = 7
    carried(own, again)
    assert again.steps == 7
    for kind in (OptimizerParamScheduler, MoreThanMegatrons):
        then, now = megatrons(kind), megatrons(kind)
        then.step(increment=7)
        then.extra = 3
        now.step(increment=2)  # of a checkpoint that was loaded before, say
        carried(then, now)
        assert now.num_steps == 7
        assert kind is OptimizerParamScheduler or now.extra == 3
    carried(None, None)
