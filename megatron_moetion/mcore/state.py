# SPDX-License-Identifier: Apache-2.0
"""``StateAdapter`` for Megatron-Core: one rank's training state as units, its host state, and the way back."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from torch import nn

from megatron_moetion.mcore.chain import chain
from megatron_moetion.mcore.guide import guide
from megatron_moetion.mcore.homes import Homes
from megatron_moetion.mcore.inventory import gradient_of, take_inventory
from megatron_moetion.mcore.layout import ModelLayout
from megatron_moetion.mcore.optimizer_state import create_state, fields_of, load_fields
from megatron_moetion.mcore.parameters import copy_parameters, gather_parameters, gather_whole_parameters
from megatron_moetion.mcore.quantised import create_scaling_state, refuse_parameters
from megatron_moetion.mcore.refusals import DELAYED, fp8_recipe, refuse_shared_scales, refuse_unsupported
from megatron_moetion.mcore.rng import decoded, encoded, load_rng_states, rng_states
from megatron_moetion.mcore.settings import initial_settings, masked, settle
from megatron_moetion.mcore.shards import Shard, shards
from megatron_moetion.mcore.step_watch import StepWatch
from megatron_moetion.mcore.steplog import StepLog
from megatron_moetion.mcore.tokens import MegatronTokens
from megatron_moetion.mcore.topology import place
from megatron_moetion.recover.capacity import CapacityRules
from megatron_moetion.snapshot.host_state import encode, size_bound
from megatron_moetion.units import HOST_UNIT, Inventory, Unit, UnitKind

_logger = logging.getLogger("megatron_moetion")
_SAMPLED_ELEMENTS = 1024
SPARE_HOST_BYTES = 64 << 10
"""Room for the host state to grow beyond its shape at start (a training loop's own lists, say)."""


class Stateful(Protocol):
    """A scheduler, or the training loop's own state: iteration, consumed samples, whatever a resume needs."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, text, bytes, lists, tuples and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        ...


@runtime_checkable
class HasMegatronFlags(Protocol):
    """A training loop's state that knows the loop's flags; Megatron-LM's ``args`` in a checkpoint are made of them."""

    def megatron_flags(self) -> Mapping[str, Any]:
        """By Megatron-LM's names, as they are when training begins."""
        ...


class MegatronState:
    """Inventory, host state and write-back of one rank; ``close`` removes the hooks.

    ``model`` is the list of DDP-wrapped chunks. ``count_tokens`` and ``log_steps`` say whether there are ``tokens``
    (mode ``popularity``) and a ``step_log`` (mode ``exact``); without a log the inventory has no gradients.
    ``capacity`` says how capacities are raised after a recovery, None: not at all. The inventory is taken once, here,
    so optimizer state is created if it does not exist yet; its tensors are kept alive. Raises ``UnsupportedState``
    for what cannot be captured exactly, and leaves no hook then.
    """

    tokens: MegatronTokens | None = None
    """Token counts and routers of this rank's experts; None where tokens are not counted."""
    step_log: StepLog | None = None
    """The inputs of recent optimizer steps; None where steps are not replayed."""
    has_trained: bool = False
    """Whether an iteration of the run has ended. Captured, and put back; the owner sets it before a capture."""
    initial_settings: Mapping[str, Any]
    """See ``initial_settings`` of ``mcore/settings.py``. Captured; the owner puts those of this start in their place
    where it makes the state only after training has changed some."""
    _recovered_rng: Mapping[str, Any] | None = None

    def __init__(
        self,
        *,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler | Stateful | None,
        user_state: Stateful,
        count_tokens: bool = False,
        capacity: CapacityRules | None = None,
        log_steps: bool = False,
    ) -> None:
        self._model = tuple(model)
        self._optimizer = optimizer
        self._links = chain(optimizer)
        self._scheduler = scheduler
        self._user_state = user_state
        layout = ModelLayout([_unwrap(chunk) for chunk in model])
        self._blocks = layout.blocks
        model_config = get_model_config(model[0])
        refuse_unsupported(model, model_config, self._links, self._blocks, log_steps=log_steps)
        refuse_parameters(model, optimizer)
        with ExitStack() as hooks:
            if count_tokens:
                self.tokens = MegatronTokens(layout.blocks, capacity)
                hooks.callback(self.tokens.close)
            for link in self._links:
                create_state(link.optimizer)
            self._homes = Homes(self.inner_optimizers())
            for module in (m for chunk in model for m in chunk.modules() if isinstance(m, TopKRouter)):
                module._maintain_float32_expert_bias()  # else the first forward would do it, and move the bias
            if fp8_recipe(model_config) == DELAYED:
                create_scaling_state(model, model_config)
            if self.tokens is not None:
                watch = StepWatch(
                    model, self.inner_optimizers(), zeroed=self.tokens.discard, stepping=self.tokens.commit
                )
                hooks.callback(watch.close)
            self.initial_settings = initial_settings(self._links, scheduler if is_megatrons(scheduler) else None)
            by_link = [list(shards(link)) for link in self._links]
            if log_steps:
                self.step_log = StepLog(optimizer, self._links, [_sample(of_link) for of_link in by_link])
                hooks.callback(self.step_log.close)
            self._tensors = take_inventory(
                model=model,
                layout=layout,
                links=self._links,
                shards=[shard for of_link in by_link for shard in of_link],
                tokens=self.tokens,
                with_gradients=log_steps,
            )
            if count_tokens:
                refuse_shared_scales(self._tensors.units)
            self._inventory = Inventory(
                units=(*self._tensors.units, host_unit(self.host_state())),
                place=place(),
                guide=guide(
                    model,
                    layout,
                    optimizer,
                    user_state.megatron_flags() if isinstance(user_state, HasMegatronFlags) else None,
                ),
            )
            self._hooks = hooks.pop_all()

    def inventory(self) -> Inventory:
        """As it was taken when this was made."""
        return self._inventory

    def moved(self) -> str | None:
        """Looks each tensor up where its owner keeps it, 0.1 us a tensor, and asks each MoE layer for its experts."""
        for block in self._blocks:
            if tuple(block.module.local_expert_indices) != block.experts:
                return (
                    f"{block.prefix} holds experts {list(block.module.local_expert_indices)} now and held "
                    f"{list(block.experts)} at attach(): experts that move between ranks are not supported"
                )
        return self._tensors.moved()

    def expert_peers(self) -> tuple[int, ...]:
        """The expert data parallel group."""
        return tuple(torch.distributed.get_process_group_ranks(parallel_state.get_expert_data_parallel_group()))

    def host_state(self) -> dict[str, Any]:
        """RNG states, schedule, optimizer fields and settings, remembered steps, and the loop's own state."""
        optimizers = [fields_of(link) for link in self._links]
        return {
            "rng": encoded(rng_states()),
            "trained": self.has_trained,
            "scheduler": self.scheduler_state(),
            "optimizers": optimizers,
            "given": self.initial_settings,  # arenas have it under this name
            "steps": self.step_log.state(optimizers) if self.step_log is not None else None,
            "user": self._user_state.state_dict(),
        }

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Settings that training has left alone stay as this start has them; rank 0 logs those that differ."""
        self.has_trained = state["trained"]
        self._recovered_rng = decoded(state["rng"])
        load_rng_states(self._recovered_rng)
        self.load_scheduler(state["scheduler"])
        settled = settle(state["given"], self.initial_settings, [f["groups"] for f in state["optimizers"]])
        for link, fields, groups in zip(self._links, state["optimizers"], settled.groups, strict=True):
            load_fields(link, {**fields, "groups": groups})
        if settled.acts and is_megatrons(self._scheduler):
            self._scheduler.step(increment=0)  # the groups have the rates of the old schedule
        self._user_state.load_state_dict(state["user"])
        if torch.distributed.get_rank() == 0:
            for lines, what in ((settled.acts, "act from here on"), (settled.stays, "were changed by training")):
                if lines:
                    _logger.warning(
                        "[moetion] rank 0: optimizer settings that differ from the last start's and %s: %s",
                        what,
                        ", ".join(lines),
                    )

    def scheduler_state(self) -> Any:
        """Of Megatron's the steps: the rest are settings, which a restart may change. Of another all that it says."""
        if is_megatrons(self._scheduler):
            return self._scheduler.num_steps
        return self._scheduler.state_dict() if self._scheduler is not None else None

    def load_scheduler(self, state: Any) -> None:
        """Put back what ``scheduler_state`` returned; rates of the groups may change with it."""
        if isinstance(self._scheduler, OptimizerParamScheduler):
            self._scheduler.num_steps = 0  # to load adds to it
        if is_megatrons(self._scheduler):
            self._scheduler.step(increment=state)
        elif self._scheduler is not None:
            self._scheduler.load_state_dict(state)

    def restore_rng(self) -> None:
        """Put the random generators back to the state that was recovered, if there is one that training had reached.

        A run that has not trained yet draws what it drew when it was first started, in the same order.
        """
        if self._recovered_rng is not None and self.has_trained:
            load_rng_states(self._recovered_rng)

    def loaded(self) -> None:
        """To be called when something else may have loaded a checkpoint: the optimizers' tensors are in place again.

        Steps taken meanwhile belong to no iteration: loading makes optimizers step to have their state.
        """
        self._homes.bring_back()
        if self.step_log is not None:
            self.step_log.discard()

    def after_step(self) -> None:
        """Brings the routers' averages up to date, and their capacities while they are raised."""
        if self.tokens is not None:
            self.tokens.after_step(sees_steps=bool(self._links))

    def copy_to_model(self) -> None:
        """Only between an optimizer step and the next forward."""
        with torch.no_grad():
            copy_parameters(self._links)

    def resync(self) -> None:
        """Only between an optimizer step and the next forward."""
        with torch.no_grad():
            gather_parameters(self._model, self._links)
            gather_whole_parameters(self._model, self._optimizer)

    def state_hash(self) -> str:
        """Copies all state to the host: for checks, not for every iteration of a large model."""
        state = {k: v for k, v in self.host_state().items() if k != "given"}  # of the start, not of training
        digest = hashlib.blake2b(encode(state), digest_size=16)
        for view in self._tensors.views:
            digest.update(view.detach().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers whose ``step`` changes state."""
        return [link.optimizer for link in self._links]

    def close(self) -> None:
        """Remove the hooks on model and optimizer."""
        self._hooks.close()


def is_megatrons(scheduler: object) -> TypeGuard[OptimizerParamScheduler]:
    """Whether it is Megatron's own scheduler: a class derived from it may hold more, and is known by what it says."""
    return type(scheduler) is OptimizerParamScheduler


def host_unit(state: Mapping[str, Any]) -> Unit:
    """The unit of a host state, with room for ``state`` and what it may grow by. Others add the room that they need."""
    size = size_bound({"adapter": {**state, "given": masked(state["given"])}})
    return Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=size + SPARE_HOST_BYTES)


def _sample(held: Sequence[Shard]) -> torch.Tensor:
    """A few elements of the gradient of a small parameter, in place."""
    if not held:
        return torch.zeros(0)
    small = min(held, key=lambda s: s.end - s.start)
    return gradient_of(small.parameter).view(-1)[small.start : min(small.end, small.start + _SAMPLED_ELEMENTS)]


def _unwrap(chunk: DistributedDataParallel) -> nn.Module:
    module: nn.Module = chunk.module
    return module.module if isinstance(module, Float16Module) else module
