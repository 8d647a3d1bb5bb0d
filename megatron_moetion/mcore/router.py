# SPDX-License-Identifier: Apache-2.0
"""Counts tokens per expert, and gives experts more capacity after a recovery.

``TokenCounters`` works with any model: a hook on each layer's experts. ``CapacityRouter`` is given through the layer
spec (``use_capacity_router``); it drops tokens exactly as Megatron's ``TopKRouter`` does until ``RouterWatch`` raises
capacities, and tells what was routed, processed and dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.cuda_graphs import is_graph_warmup
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity
from megatron.core.transformer.moe.router import TopKRouter
from torch import distributed as dist
from torch import nn

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore.layout import MoeBlock, dense_unit
from megatron_moetion.recover.capacity import CapacityRules, boosts, repaid

RECENT_ITERATIONS = 10
"""What the moving averages of an iteration's tokens look back, about."""
_NO_RANK = -1
_INNER_LAYER = ("mtp_model_layer", "transformer_layer")
"""What a spec of a layer for multi-token prediction calls the layer that it runs, in megatron-core 0.19 and 0.16."""


class TokenCounters:
    """One int64[num_local_experts] tensor a layer, on the experts' device; tokens trained on since the run began.

    Counts only while gradients are enabled: evaluation does not train, and recomputation runs a forward twice,
    once without gradients. What is counted is in ``totals`` from ``commit`` on, and undone by ``discard``: passes whose
    gradients are thrown away train nothing. Adds on the device, so nothing waits for the host, and an addition that was
    captured into a CUDA graph is replayed with it.
    """

    def __init__(self, blocks: Sequence[MoeBlock]) -> None:
        self.totals: list[torch.Tensor] = []
        self._pending: list[torch.Tensor] = []
        self._counts: list[_Count] = []
        self._undo = ExitStack()
        for config in (block.module.config for block in blocks):
            if config.moe_pad_expert_input_to_capacity and config.moe_apply_probs_on_input:
                raise UnsupportedState(
                    "--moe-pad-expert-input-to-capacity with moe_apply_probs_on_input hides which tokens are padding, "
                    "so popularity cannot be read: use --moetion-mode full, or drop either"
                )
        for block in blocks:
            config = block.module.config
            device = next(block.module.parameters()).device
            total = torch.zeros(len(block.experts), dtype=torch.int64, device=device)
            self.totals.append(total)
            self._pending.append(torch.zeros_like(total))
            count = _Count(self._pending[-1], padded=config.moe_pad_expert_input_to_capacity)
            self._counts.append(count)
            self._undo.callback(block.module.experts.register_forward_pre_hook(count).remove)

    def commit(self) -> None:
        """What was counted since the last call of this or ``discard`` was trained on."""
        if self.totals:
            torch._foreach_add_(self.totals, self._pending)
        self.discard()

    def discard(self) -> None:
        """What was counted since the last call of this or ``commit`` was not trained on."""
        if self._pending:
            torch._foreach_zero_(self._pending)

    def unseen(self) -> list[int]:
        """Layers, by position, whose experts have never run Python since this was made."""
        return [i for i, count in enumerate(self._counts) if not count.has_run]

    def close(self) -> None:
        """Remove the hooks."""
        self._undo.close()


class _Count:
    def __init__(self, total: torch.Tensor, padded: bool) -> None:
        self._total = total
        self._padded = padded
        self.has_run = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not _trains():
            return
        self.has_run = True
        tokens_per_expert: torch.Tensor = args[1]
        if self._padded:  # all experts get as many rows; those that are padding have probability 0
            probs: torch.Tensor = args[2]
            tokens_per_expert = (probs.detach().reshape(len(self._total), -1) > 0).sum(dim=1)
        self._total += tokens_per_expert.to(self._total.device, torch.int64, non_blocking=True)


def _trains() -> bool:
    """Whether a forward pass is one of training: neither an evaluation nor a rehearsal before a graph's capture."""
    return torch.is_grad_enabled() and not is_graph_warmup()


# -- the router ----------------------------------------------------------------------------------------------


class CapacityRouter(TopKRouter):
    """Megatron's router with a capacity for each expert.

    Routes without dropping first (its own copy of the configuration has no capacity factor), then drops; the auxiliary
    losses do not depend on what is dropped, and the expert bias is updated afterwards. At base capacity the result
    is bitwise Megatron's.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **more: Any) -> None:
        """``more``: what a newer Megatron tells its routers, such as ``is_mtp_layer`` in 0.19."""
        dropless = copy.copy(config)
        dropless.moe_expert_capacity_factor = None
        super().__init__(config=dropless, pg_collection=pg_collection, **more)
        self.factor: float | None = config.moe_expert_capacity_factor
        self._policy = config.moe_token_drop_policy
        self.pads: bool = config.moe_pad_expert_input_to_capacity
        self.counts: Counts | None = None
        self.boost: torch.Tensor | float = 1.0
        """What base capacity is multiplied by: float64[E], in training; or one number for all experts, with padding
        also in evaluation, because the dispatcher's buffers have that size."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``TopKRouter.routing``: (probs, map), both [num_tokens, E], of what is not dropped."""
        probs, routed = super().routing(logits, padding_mask=padding_mask)
        kept_probs, kept = self._drop(probs, routed)
        super()._apply_expert_bias(kept, padding_mask=None if padding_mask is None else padding_mask.reshape(-1))
        if self.counts is not None and _trains():
            base = self._capacity(len(routed)) if self.factor is not None else len(routed)
            self.counts.add(routed, kept & routed if self.pads else kept, base)
        return kept_probs, kept

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Called by ``TopKRouter.routing`` before anything is dropped: too early."""

    def _capacity(self, num_tokens: int) -> int:
        return int(
            get_capacity(
                num_tokens=num_tokens * self.topk, num_experts=self.num_experts, capacity_factor=self.factor or 0.0
            )
        )

    def _drop(self, probs: torch.Tensor, routed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.factor is None:
            return probs, routed
        if isinstance(self.boost, torch.Tensor) and self.training:
            kept = routed & keep_mask(probs, routed, self._capacity(len(probs)), self.boost, self._policy)
            return probs * kept, kept
        kept_probs, kept = apply_router_token_dropping(
            probs,
            routed,
            router_topk=self.topk,
            capacity_factor=self.factor * (self.boost if isinstance(self.boost, float) else 1.0),
            drop_policy=self._policy,
            pad_to_capacity=self.pads,
        )
        return kept_probs, kept


def keep_mask(probs: torch.Tensor, routed: torch.Tensor, base: int, boost: torch.Tensor, policy: str) -> torch.Tensor:
    """Which of the routed tokens each expert keeps, bool[num_tokens, E], with a capacity of ceil(base * boost) each.

    ``policy`` is ``probs`` (the most probable ones) or ``position`` (the first ones). Nothing waits for a device.
    """
    num_tokens = len(probs)
    capacity = (base * boost).ceil().clamp(max=num_tokens)
    if policy == "position":
        return routed.cumsum(dim=0) <= capacity
    order = probs.detach().masked_fill(~routed, -1.0).argsort(dim=0, descending=True, stable=True)
    places = torch.arange(num_tokens, device=probs.device)[:, None].expand_as(order)
    return torch.empty_like(order).scatter_(0, order, places) < capacity


def use_capacity_router(spec: Any) -> None:
    """Put ``CapacityRouter`` into every MoE layer of a block spec (``get_gpt_decoder_block_spec``), in place.

    The spec of a block for multi-token prediction (``get_gpt_mtp_block_spec``) is one too. Dense layers and Mamba
    layers stay as they are, also where a block has no others: a pipeline stage may be like that, and its rank cannot
    tell. A whole model without MoE layers is refused at the start, if capacities are to be raised. Raises
    ``ConfigError`` for a spec or a layer of another kind, and for a router other than ``TopKRouter``: nothing is left
    out without a word.
    """
    layers = getattr(spec, "layer_specs", None)
    if layers is None:
        raise ConfigError(
            f"use_capacity_router() looks for layer_specs, which {type(spec).__name__} does not have; give the spec of "
            f"a block, as get_gpt_decoder_block_spec returns it"
        )
    for number, layer in enumerate(layers):
        inner = _inner_layer(layer)
        if _made_by(inner) is MambaLayer:
            continue
        submodules = _parts_of(inner)
        if not hasattr(submodules, "mlp"):
            raise ConfigError(
                f"layer {number} of the spec has no 'mlp' among its submodules, and is no Mamba layer: "
                f"use_capacity_router() does not know where its router would be, and found {_made_by(inner)}"
            )
        builder = submodules.mlp
        parts = _parts_of(builder)
        if hasattr(parts, "router"):
            if parts.router not in (TopKRouter, CapacityRouter):
                raise ConfigError(
                    f"layer {number} of the spec has a router of its own, {getattr(parts.router, '__name__', '?')}: "
                    f"use_capacity_router() replaces Megatron's TopKRouter only"
                )
            parts.router = CapacityRouter
        elif not _is_dense(builder):
            raise ConfigError(
                f"use_capacity_router() found no router in layer {number} of the spec, which is no dense layer: it "
                f"looks for 'router' in submodules.mlp.submodules and in the 'submodules' of a functools.partial, and "
                f"found {_made_by(builder)}"
            )


def _inner_layer(layer: Any) -> Any:
    """Of the spec of a layer for multi-token prediction, that of the layer that it runs; any other as it is."""
    found = (getattr(_parts_of(layer), name, None) for name in _INNER_LAYER)
    return next((inner for inner in found if inner is not None), layer)


def _parts_of(builder: Any) -> Any:
    """The submodules of a module's spec: a ``ModuleSpec`` in megatron-core 0.16, a ``functools.partial`` in 0.19."""
    if isinstance(builder, partial):
        return builder.keywords.get("submodules")
    return getattr(builder, "submodules", None)


def _made_by(builder: Any) -> Any:
    """The class whose instance a spec makes, where it tells; a class method stands for its class."""
    maker = builder.func if isinstance(builder, partial) else getattr(builder, "module", builder)
    return getattr(maker, "__self__", maker)


def _is_dense(builder: Any) -> bool:
    found = _made_by(builder)
    return found is None or (isinstance(found, type) and issubclass(found, MLP | IdentityOp))


# -- what routers saw ----------------------------------------------------------------------------------------


class Counts:
    """One layer's row of ``RouterWatch.state``, or what will be added to it: float64[E], tokens of this rank."""

    ROWS = 9

    def __init__(self, state: torch.Tensor) -> None:
        self.routed, self.processed, self.beyond = state[0], state[1], state[2]

    def add(self, routed: torch.Tensor, processed: torch.Tensor, base: int) -> None:
        """Count one micro batch."""
        kept = processed.sum(dim=0)
        self.routed += routed.sum(dim=0)
        self.processed += kept
        self.beyond += (kept - base).clamp(min=0)


class RouterWatch:
    """Counts of all ``CapacityRouter`` of this rank, and their capacities after a recovery.

    ``state`` is float64[layers, rows, E] on the routers' device; it is captured like the router bias and comes back
    with a recovery. Once an iteration, ``step``; nothing waits for the host, except with padding while capacity is
    raised. While it is raised, ranks that run the same layers add up what they saw, in a group of their own: training's
    groups are training's alone.
    """

    def __init__(self, blocks: Sequence[MoeBlock], rules: CapacityRules | None) -> None:
        self._all_blocks = tuple(blocks)
        self.blocks = [b for b in blocks if isinstance(b.module.router, CapacityRouter)]
        self._routers: list[CapacityRouter] = [b.module.router for b in self.blocks]
        self._rules = rules
        self._left = 0
        self._peers: dist.ProcessGroup | None = None  # never destroyed by us: that may wait for ranks that are gone
        self.state = torch.zeros(0)
        if not self._routers:
            return
        experts = self._routers[0].num_experts
        device = self._routers[0].weight.device
        self.state = torch.zeros(len(self._routers), Counts.ROWS, experts, dtype=torch.float64, device=device)
        self._pending = torch.zeros_like(self.state[:, :3])
        for router, pending in zip(self._routers, self._pending, strict=True):
            router.counts = Counts(pending)
        by_row = self.state.unbind(dim=1)
        self._totals = self.state[:, 0:2]
        self._beyond = by_row[2]
        self._marks = self.state[:, 3:5]
        self._recent = self.state[:, 5:7]
        self._debt = by_row[7]
        self._clock = by_row[8]

    @property
    def why_fixed(self) -> str | None:
        """Why capacities stay as they are after a recovery; None if they can be raised, or were never to be."""
        if self._rules is None or not self._all_blocks:
            return None
        if self._all_blocks[0].module.config.moe_expert_capacity_factor is None:
            return "the model is dropless: its experts have no capacity"
        others = [b for b in self._all_blocks if b not in self.blocks]
        if others:
            return (
                f"{len(others)} of {len(self._all_blocks)} MoE layers have no CapacityRouter, the first is "
                f"{others[0].prefix} with {type(others[0].module.router).__name__} "
                f"(megatron_moetion.mcore.router.use_capacity_router)"
            )
        dispatcher = self._all_blocks[0].module.token_dispatcher
        if self._routers[0].pads and not hasattr(dispatcher, "moe_expert_capacity_factor"):
            return f"{type(dispatcher).__name__} has buffers of a fixed size for padded inputs"
        return None

    @property
    def is_raised(self) -> bool:
        """Whether capacities are above the base now."""
        return self._left > 0

    def regions(self) -> Iterator[tuple[MoeBlock, torch.Tensor]]:
        """Each layer's part of ``state``."""
        return zip(self.blocks, self.state, strict=False)

    def routed(self) -> dict[str, int]:
        """Tokens that each layer routed on this rank since the run began, by the name of its dense unit. Waits."""
        sums = self.state[:, 0].sum(dim=-1).tolist() if self._routers else []
        return {dense_unit(b): int(n) for b, n in zip(self.blocks, sums, strict=True)}

    def commit(self) -> None:
        """As of ``TokenCounters``."""
        if self._routers:
            self.state[:, :3] += self._pending
            self._pending.zero_()

    def discard(self) -> None:
        """As of ``TokenCounters``."""
        if self._routers:
            self._pending.zero_()

    def step(self) -> None:
        """After an iteration: bring averages up to date, pay off debts, set the next iteration's capacities.

        From what is committed.
        """
        if not self._routers:
            return
        moved = self._totals - self._marks
        is_first = self._marks.sum(dim=(1, 2), keepdim=True) == 0
        self._recent += (moved - self._recent) * torch.where(is_first, 1.0, 1.0 / RECENT_ITERATIONS)
        self._marks.copy_(self._totals)
        if self.is_raised:
            self._left -= 1
            self._clock += 1
            self._debt.copy_(repaid(self._debt, self._reduced(self._beyond)))
            self._set_boosts()
        self._beyond.zero_()

    def recover(self, lost: Mapping[str, int]) -> None:
        """Begin to make up for ``lost`` tokens (expert's unit name to tokens, all ranks'), or go on with it.

        Collective, after ``state`` is restored. Raising goes on where an earlier recovery had begun it; new losses
        start the clock again.
        """
        if self._rules is not None and self._peers is None:
            self._peers = _group_of(self._routers[0].tp_dp_cp_group if self._routers else None)
        if not self._routers:
            return
        self.discard()
        self._beyond.zero_()
        if self._rules is None or self.why_fixed is not None:
            return
        for block, debt, clock in zip(self.blocks, self._debt, self._clock, strict=True):
            new = [float(lost.get(block.expert_unit(e), 0)) for e in range(len(debt))]
            debt *= clock < self._rules.iterations  # an older one whose time is over
            if any(new):
                clock.zero_()
                debt += torch.tensor(new, dtype=debt.dtype, device=debt.device)
        clocks = torch.where(self._debt.sum(dim=-1) > 0, self._clock[:, 0], float(self._rules.iterations))
        self._left = max(0, self._rules.iterations - int(clocks.min()))
        self._set_boosts()

    def shares(self) -> dict[str, dict[str, float]]:
        """Per layer: tokens that this rank routed and processed an iteration of late; debt, of all its ranks. Waits."""
        recent = self._recent.sum(dim=-1).tolist() if self._routers else []
        debts = self._debt.sum(dim=-1).tolist() if self._routers else []
        return {
            dense_unit(block): {"routed": routed, "processed": processed, "debt": debt}
            for block, (routed, processed), debt in zip(self.blocks, recent, debts, strict=True)
        }

    def close(self) -> None:
        """Let the routers go, at base capacity."""
        for block, router in zip(self.blocks, self._routers, strict=True):
            router.counts = None
            self._set(block, router, 1.0)

    def _reduced(self, local: torch.Tensor) -> torch.Tensor:
        total = local.clone()
        dist.all_reduce(total, group=self._peers)
        return total

    def _set_boosts(self) -> None:
        assert self._rules is not None
        factor = self._routers[0].factor
        assert factor is not None
        if not self.is_raised:
            for block, router in zip(self.blocks, self._routers, strict=True):
                self._set(block, router, 1.0)
            return
        load = self._reduced(self._recent[:, 0])
        for layer, (block, router) in enumerate(zip(self.blocks, self._routers, strict=True)):
            raised = boosts(load[layer], self._debt[layer], self._clock[layer, 0], factor, self._rules)
            # Padded inputs have one size, which the host must know: the largest that the headroom allows.
            self._set(block, router, min(1 + self._rules.headroom, float(raised.max())) if router.pads else raised)

    @staticmethod
    def _set(block: MoeBlock, router: CapacityRouter, boost: torch.Tensor | float) -> None:
        router.boost = boost
        dispatcher = block.module.token_dispatcher
        if router.pads and router.factor is not None:
            dispatcher.moe_expert_capacity_factor = router.factor * float(boost)


def _group_of(like: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A new group of the ranks of ``like``, for this rank if it is in one. Collective over all ranks."""
    everyone = dist.new_group(backend="gloo")
    lowest = min(dist.get_process_group_ranks(like)) if like is not None else _NO_RANK
    found = [torch.empty(1, dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([lowest], dtype=torch.int64, device="cpu"), group=everyone)
    dist.destroy_process_group(everyone)
    lowest_of = [int(each) for each in found]  # groups of one kind share no rank, so its lowest one stands for a group
    mine = None
    for first in sorted(set(lowest_of) - {_NO_RANK}):
        ranks = [rank for rank, each in enumerate(lowest_of) if each == first]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine
