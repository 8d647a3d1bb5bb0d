# SPDX-License-Identifier: Apache-2.0
"""``TokenSource`` for Megatron-Core: token counts of experts, and their capacities after a recovery."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from megatron.core import parallel_state

from megatron_moetion.framework import TokenCounter
from megatron_moetion.mcore.layout import MoeBlock, dense_unit
from megatron_moetion.mcore.router import RouterWatch, TokenCounters
from megatron_moetion.recover.capacity import CapacityRules

_logger = logging.getLogger("megatron_moetion")


class MegatronTokens:
    """The tokens of one rank's MoE layers; ``close`` removes the hooks.

    ``capacity`` says how capacities are raised after a recovery, None: not at all. Raises ``UnsupportedState`` for
    layers whose tokens cannot be counted.
    """

    def __init__(self, blocks: Sequence[MoeBlock], capacity: CapacityRules | None = None) -> None:
        self._blocks = tuple(blocks)
        self._has_trained = self._is_checked = False
        with ExitStack() as undo:
            self.counters = TokenCounters(self._blocks)
            undo.callback(self.counters.close)
            self.routers = RouterWatch(self._blocks, capacity)
            undo.callback(self.routers.close)
            self._undo = undo.pop_all()

    def buffers(self) -> Iterator[tuple[MoeBlock, str, torch.Tensor]]:
        """What is captured with a layer's dense unit: the layer, the name of the tensor, and the live tensor."""
        for block, total in zip(self._blocks, self.counters.totals, strict=True):
            yield block, _counter_name(block), total
        for block, state in self.routers.regions():
            yield block, f"{block.prefix}.moetion.router", state

    def commit(self) -> None:
        """What was counted so far is trained on: the optimizer steps."""
        self._has_trained = True
        self._commit()

    def _commit(self) -> None:
        with torch.no_grad():
            self.counters.commit()
            self.routers.commit()

    def discard(self) -> None:
        """What was counted since the last step is not trained on: its gradients are zeroed."""
        with torch.no_grad():
            self.counters.discard()
            self.routers.discard()

    def after_step(self, *, sees_steps: bool) -> None:
        """Once an iteration, after the optimizer step; ``sees_steps``: whether ``commit`` is called before each step.

        A step that a loss scaler skipped trained nothing, and its tokens do not count: they go when its gradients are
        zeroed, before or after this call. Where no step is seen, all that passed counts.
        """
        if not sees_steps:
            self._commit()
        with torch.no_grad():
            self.routers.step()
        if self._has_trained and not self._is_checked:  # an iteration may be without passes
            self._is_checked = True
            self._check()

    def _check(self) -> None:
        """There was a step, so hooks on experts have run, unless graphs of these were captured before us."""
        unseen = [self._blocks[i].prefix for i in self.counters.unseen()]
        if unseen:
            _logger.warning(
                "[moetion] rank %d: tokens of %s are not counted, since the hook on their experts never ran: call "
                "attach() before the first iteration, and before CUDA graphs are captured. Popularity and lost tokens "
                "are wrong for these layers",
                torch.distributed.get_rank(),
                ", ".join(unseen),
            )

    def close(self) -> None:
        """Remove the hooks on the model; its routers are back at base capacity."""
        self._undo.close()

    # -- TokenSource ----------------------------------------------------------------------------------

    def token_counters(self) -> tuple[TokenCounter, ...]:
        """One for each expert of each layer, in order."""
        return tuple(
            TokenCounter(
                expert=block.expert_unit(expert), unit=dense_unit(block), tensor=_counter_name(block), position=i
            )
            for block in self._blocks
            for i, expert in enumerate(block.experts)
        )

    def counts_tokens(self) -> bool:
        """Whether this rank is the first of its expert tensor parallel group."""
        return int(parallel_state.get_expert_tensor_parallel_rank()) == 0

    def routed_tokens(self) -> dict[str, int]:
        """Of layers whose router is a ``CapacityRouter``."""
        return self.routers.routed()

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        """Of layers whose router is a ``CapacityRouter``."""
        return self.routers.shares()

    def capacity_problem(self) -> str | None:
        """See ``RouterWatch.why_fixed``."""
        return self.routers.why_fixed

    def recalibrate(self, lost: Mapping[str, int]) -> None:
        """Collective, after the routers' state is restored."""
        with torch.no_grad():
            self.routers.recover(lost)


def _counter_name(block: MoeBlock) -> str:
    return f"{block.prefix}.moetion.tokens_processed"
