# SPDX-License-Identifier: Apache-2.0
"""``StateAdapter`` for Megatron-Core: the model's and optimizer's state as units, and the way back."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.layout import ModelLayout, Place, dense_unit
from megatron_moetion.mcore.settings import given, masked, settle
from megatron_moetion.mcore.shards import Shard, chain, copy_main_to_model, create_state, set_steps, shards, steps
from megatron_moetion.mcore.steplog import StepLog, groups_of, load_group, plain
from megatron_moetion.mcore.tokens import MegatronTokens
from megatron_moetion.recover.capacity import CapacityRules
from megatron_moetion.replicate.agreement import WINDOW
from megatron_moetion.snapshot.host_state import encode, size_bound
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

_logger = logging.getLogger("megatron_moetion")
_CAPTURES_IN_FLIGHT = WINDOW + 1
_SAMPLED_ELEMENTS = 1024
_SPARE_HOST_BYTES = 64 << 10
"""Room for the host state to grow beyond its shape at start (a training loop's own lists, say)."""


class UserState(Protocol):
    """The training loop's own state: iteration, consumed samples, whatever a resume needs."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, text, bytes, lists, tuples and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        ...


class MegatronState:
    """Inventory, host state and write-back of one rank.

    ``model`` is the list of DDP-wrapped chunks; ``capacity`` says how capacities are raised after a recovery, None: not
    at all; ``log_steps`` says that steps can be replayed (mode ``exact``); without it the inventory has no
    gradients. Keeps references to all tensors that regions point into; the
    inventory is taken once, here, so optimizer state is created if it does not exist yet.
    """

    def __init__(
        self,
        *,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler | None,
        user_state: UserState,
        count_tokens: bool = False,
        capacity: CapacityRules | None = None,
        log_steps: bool = False,
    ) -> None:
        self._model = tuple(model)
        self._links = chain(optimizer)
        self._scheduler = scheduler
        self._user_state = user_state
        layout = ModelLayout([_unwrap(chunk) for chunk in model])
        self._blocks = layout.blocks
        if self._blocks and self._blocks[0].module.config.fp8:
            raise UnsupportedState(
                "--fp8-format is not supported: quantised parameters carry scales beside their bytes"
            )
        if log_steps and self._blocks and getattr(self._blocks[0].module.config, "qk_clip", False):
            raise UnsupportedState("qk_clip is not supported in mode 'exact': it changes parameters after the step")
        self.tokens: MegatronTokens | None = None
        self.step_log: StepLog | None = None
        with ExitStack() as hooks:
            if count_tokens:
                self.tokens = MegatronTokens(self._blocks, capacity)
                hooks.callback(self.tokens.close)
            for link in self._links:
                create_state(link.optimizer)
            for module in (m for chunk in model for m in chunk.modules() if isinstance(m, TopKRouter)):
                module._maintain_float32_expert_bias()  # else the first forward would do it, and move the bias
            self._given = given(self._links, scheduler)
            held = [list(shards(link)) for link in self._links]
            self._shards = {id(s.parameter): s for of_link in held for s in of_link}
            if log_steps:
                self.step_log = StepLog(optimizer, self._links, [_sample(of_link) for of_link in held])
                hooks.callback(self.step_log.close)
            self._inventory = self._take_inventory(layout)
            self._residents = [*_optimizer_residents(self._links), *_module_residents(model, layout)]
            if self.step_log is not None:
                self._residents.extend(_gradient_residents(s.parameter for s in self._shards.values()))
            self._hooks = hooks.pop_all()

    # -- StateAdapter ---------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """See ``StateAdapter``."""
        return self._inventory

    def expert_peers(self) -> tuple[int, ...]:
        """See ``StateAdapter``: the expert-data-parallel group."""
        return tuple(torch.distributed.get_process_group_ranks(parallel_state.get_expert_data_parallel_group()))

    def host_state(self) -> dict[str, Any]:
        """See ``StateAdapter``."""
        optimizers = [_optimizer_fields(link) for link in self._links]
        return {
            "rng": _rng_state(),
            "scheduler": self._scheduler.num_steps if self._scheduler is not None else None,
            "optimizers": optimizers,
            "given": self._given,
            "steps": self.step_log.state(optimizers) if self.step_log is not None else None,
            "user": self._user_state.state_dict(),
        }

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """See ``StateAdapter``."""
        _load_rng_state(state["rng"])
        if self._scheduler is not None:
            self._scheduler.num_steps = 0
            self._scheduler.step(increment=state["scheduler"])
        settled = settle(state["given"], self._given, [fields["groups"] for fields in state["optimizers"]])
        for link, fields, groups in zip(self._links, state["optimizers"], settled.groups, strict=True):
            _load_optimizer_fields(link, {**fields, "groups": groups})
        if settled.acts and self._scheduler is not None:
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

    def after_step(self) -> None:
        """See ``StateAdapter``."""
        if self.tokens is not None:
            self.tokens.after_step()

    def resync(self) -> None:
        """See ``StateAdapter``. Only between an optimizer step and the next forward."""
        with torch.no_grad():
            for link in self._links:
                copy_main_to_model(link)
            for chunk in self._model:
                if chunk.ddp_config.use_distributed_optimizer:
                    chunk.start_param_sync(force_sync=True)

    def state_hash(self) -> str:
        """See ``StateAdapter``. Copies all state to the host: for checks, not for every iteration of a large model."""
        state = {k: v for k, v in self.host_state().items() if k != "given"}  # it tells of the start, not of training
        digest = hashlib.blake2b(encode(state), digest_size=16)
        for view in self._views:
            digest.update(view.detach().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def moved(self) -> str | None:
        """See ``StateAdapter``. Looks each tensor up where its owner keeps it; 0.1 us a tensor."""
        for holder, key, address in self._residents:
            if holder[key].data_ptr() != address:
                return f"the tensor {key!r} that was at {address:#x} was replaced or moved after attach()"
        return None

    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers whose ``step`` changes state."""
        return [link.optimizer for link in self._links]

    def close(self) -> None:
        """Remove the hooks on the model."""
        self._hooks.close()

    # -- inventory ------------------------------------------------------------------------------------

    def _take_inventory(self, layout: ModelLayout) -> Inventory:
        regions: dict[str, list[Region]] = {}
        self._views: list[torch.Tensor] = []
        places: dict[str, Place] = {}

        def add(place: Place, tensor: torch.Tensor, role: Role, first: int, start: int, end: int, **how: bool) -> None:
            """Elements [start, end) of a parameter; ``tensor`` begins at element ``first``."""
            size = tensor.element_size()
            if role is not Role.GRAD:
                self._views.append(tensor.detach().reshape(-1)[start - first : end - first])
            places.setdefault(place.unit, place)
            regions.setdefault(place.unit, []).append(
                Region(
                    unit=place.unit,
                    tensor=place.tensor,
                    role=role,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    start=start,
                    nbytes=(end - start) * size,
                    address=tensor.data_ptr() + (start - first) * size,
                    device=str(tensor.device),
                    **how,
                )
            )

        for parameter, spans in layout.parameters():
            shard = self._shards.get(id(parameter))
            for place in spans:
                if place.kind is UnitKind.FROZEN:
                    _require_contiguous(parameter, place.tensor)
                    add(place, parameter, Role.WEIGHT, 0, 0, parameter.numel())
                elif shard is not None:
                    start, end = max(place.start, shard.start), min(place.end, shard.end)
                    for role, tensor in shard.tensors.items() if start < end else ():
                        add(place, tensor, role, shard.start, start, end)
                    if self.step_log is not None and start < end:
                        gradient = _gradient(parameter)
                        _require_contiguous(gradient, place.tensor)
                        add(place, gradient, Role.GRAD, 0, start, end, at_once=True)
        for buffer, place in layout.buffers():
            if buffer.numel():
                _require_contiguous(buffer, place.tensor)
                add(place, buffer, Role.BUFFER, 0, 0, buffer.numel(), at_once=True)
        for block, name, tensor in self.tokens.buffers() if self.tokens is not None else ():
            place = Place(
                unit=dense_unit(block), kind=UnitKind.DENSE, tensor=name, start=0, end=tensor.numel(), layer=block.layer
            )
            add(place, tensor, Role.BUFFER, 0, 0, tensor.numel(), at_once=True)
        units = [
            Unit(
                name=name,
                kind=places[name].kind,
                regions=tuple(found),
                layer=places[name].layer,
                expert=places[name].expert,
            )
            for name, found in regions.items()
        ]
        self._require_complete(layout)
        return Inventory(units=(*units, self._host_unit()))

    def _host_unit(self) -> Unit:
        experts = [block.expert_unit(e) for block in self._blocks for e in block.experts]
        each = 8 * len(experts)
        session = {"lost": bytes(each), "recent": bytes(each), "history": bytes(3 * _CAPTURES_IN_FLIGHT * each)}
        state = self.host_state()
        size = size_bound({"adapter": {**state, "given": masked(state["given"])}, "session": session})
        return Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=size + _SPARE_HOST_BYTES)

    def _require_complete(self, layout: ModelLayout) -> None:
        known = {id(p) for p, _ in layout.parameters()}
        strangers = [s for s in self._shards.values() if id(s.parameter) not in known]
        if strangers:
            raise UnsupportedState(
                f"the optimizer holds {len(strangers)} parameter(s) that the given model chunks do not contain; "
                f"pass all chunks to attach()"
            )


_Resident = tuple[Any, Any, int]
"""A container, the key of a tensor in it, and the address that the tensor had."""


def _optimizer_residents(links: Sequence[MegatronOptimizer]) -> Iterator[_Resident]:
    for link in links:
        for group in link.optimizer.param_groups:
            for position, main in enumerate(group["params"]):
                yield group["params"], position, main.data_ptr()
                for key, value in link.optimizer.state[main].items():
                    if isinstance(value, torch.Tensor) and key != "step":
                        yield link.optimizer.state[main], key, value.data_ptr()


def _module_residents(model: Sequence[nn.Module], layout: ModelLayout) -> Iterator[_Resident]:
    captured = {id(buffer) for buffer, _ in layout.buffers()}
    for module in (m for chunk in model for m in chunk.modules()):
        for name, tensor in module._buffers.items():
            if tensor is not None and id(tensor) in captured:
                yield module._buffers, name, tensor.data_ptr()
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield module._parameters, name, parameter.data_ptr()


def _gradient_residents(parameters: Iterable[nn.Parameter]) -> Iterator[_Resident]:
    for parameter in parameters:
        yield vars(parameter), "main_grad", _gradient(parameter).data_ptr()


def _sample(held: Sequence[Shard]) -> torch.Tensor:
    """A few elements of the gradient of a small parameter, in place."""
    if not held:
        return torch.zeros(0)
    small = min(held, key=lambda s: s.end - s.start)
    return _gradient(small.parameter).view(-1)[small.start : min(small.end, small.start + _SAMPLED_ELEMENTS)]


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Where DDP accumulates and reduces a parameter's gradient."""
    found: torch.Tensor = vars(parameter)["main_grad"]
    return found


def _unwrap(chunk: DistributedDataParallel) -> nn.Module:
    module: nn.Module = chunk.module
    return module.module if isinstance(module, Float16Module) else module


def _require_contiguous(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise UnsupportedState(
            f"{name} is not contiguous (strides {tensor.stride()}) and cannot be captured as one span"
        )


def _optimizer_fields(link: MegatronOptimizer) -> dict[str, Any]:
    """Everything of one optimizer that is not a state tensor: group fields, step, loss scaler."""
    scaler = getattr(link, "grad_scaler", None)  # FP32Optimizer has none
    return {
        "groups": groups_of(link),
        "steps": steps(link),
        "grad_scaler": {k: plain(v) for k, v in scaler.state_dict().items()} if scaler is not None else None,
    }


def _load_optimizer_fields(link: MegatronOptimizer, fields: Mapping[str, Any]) -> None:
    for group, values in zip(link.optimizer.param_groups, fields["groups"], strict=True):
        load_group(group, values)
    if fields["steps"] is not None:
        set_steps(link, fields["steps"])
    scaler = getattr(link, "grad_scaler", None)
    if fields["grad_scaler"] is not None and scaler is not None:
        now = scaler.state_dict()
        if now.keys() != fields["grad_scaler"].keys():
            return  # the scale was constant and adapts now, or the other way round: it begins as it is given
        scaler.load_state_dict(
            {
                k: torch.full_like(now[k], v) if isinstance(now[k], torch.Tensor) else v
                for k, v in fields["grad_scaler"].items()
            }
        )


def _rng_state() -> dict[str, Any]:
    """All random states of this process. Saved per global rank: Megatron's own checkpoint keys them by (pp, tp)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": _bytes(torch.get_rng_state()),
        "cuda": _bytes(torch.cuda.get_rng_state()),
        "tracker": {k: _bytes(_state(v)) for k, v in get_cuda_rng_tracker().get_states().items()},
        "numpy": (str(name), np.asarray(keys).tobytes(), int(position), int(has_gauss), float(cached)),
        "python": _python_random_state(),
    }


def _python_random_state() -> tuple[int, bytes, float | None]:
    """``random.getstate()`` with its 625 words as bytes."""
    version, words, gauss = random.getstate()
    return version, np.array(words, dtype=np.uint32).tobytes(), gauss


def _load_rng_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(words, dtype=np.uint32).tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for key, value in state["tracker"].items():
        if isinstance(states[key], torch.Generator):
            states[key].set_state(_tensor(value))
        else:
            states[key] = _tensor(value)
    tracker.set_states(states)
    torch.cuda.set_rng_state(_tensor(state["cuda"]))
    torch.set_rng_state(_tensor(state["torch"]))


def _state(value: torch.Tensor | torch.Generator) -> torch.Tensor:
    return value.get_state() if isinstance(value, torch.Generator) else value


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
