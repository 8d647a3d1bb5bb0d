# SPDX-License-Identifier: Apache-2.0
"""Which of Megatron's optimizers hold a rank's state. What is not known bit for bit is refused here, by class and name.

Classes are compared exactly: a subclass may keep other state, or synchronise parameters in a way of its own, and a
check that lets it through restores wrongly without a word. Sources: ``megatron.core.optimizer`` of 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_moetion.errors import UnsupportedState

_LINKS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
_ELEMENTWISE = {"Adam", "AdamW", "FusedAdam", "SGD", "FusedSGD"}
"""Optimizers, of torch, Apex and Transformer Engine, whose state we know and whose step works element by element."""


def chain(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that really hold state; raises ``UnsupportedState`` for those that we cannot capture exactly."""
    real = [link for link in _links(optimizer) if not link.is_stub_optimizer]
    for link in real:
        _require_known(link, _LINKS)
        if isinstance(link.optimizer, HybridDeviceOptimizer):
            raise UnsupportedState(
                "HybridDeviceOptimizer (--optimizer-cpu-offload) is not supported: its state is split"
            )
        name = type(link.optimizer).__name__
        if name not in _ELEMENTWISE:
            raise UnsupportedState(f"{name} is not supported: MoEtion knows {', '.join(sorted(_ELEMENTWISE))}")
    return real


def _links(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """All links of a chain, of chains within a chain too."""
    if not isinstance(optimizer, ChainedOptimizer):
        yield optimizer
        return
    _require_known(optimizer, (ChainedOptimizer,))
    for link in optimizer.chained_optimizers:
        yield from _links(link)


def _require_known(optimizer: MegatronOptimizer, known: tuple[type, ...]) -> None:
    if type(optimizer) in known:
        return
    bases = [c.__name__ for c in known if isinstance(optimizer, c)]
    what = f"{type(optimizer).__name__}, a kind of {bases[0]}," if bases else type(optimizer).__name__
    raise UnsupportedState(
        f"{what} is not supported: MoEtion knows DistributedOptimizer, Float16OptimizerWithFloat16Params and "
        f"FP32Optimizer, alone or in a ChainedOptimizer"
    )
