# SPDX-License-Identifier: Apache-2.0
"""Which of Megatron's optimizers hold a rank's state. What is not known bit for bit is refused here, by class and name.

Classes are compared exactly: a subclass may keep other state, or synchronise parameters in a way of its own, and a
check that lets it through restores wrongly without a word. Sources: ``megatron.core.optimizer`` of 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_moetion.errors import UnsupportedState

_CHAINS = (LayerWiseDistributedOptimizer, ChainedOptimizer)
_LINKS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
_SCALERS = (type(None), ConstantGradScaler, DynamicGradScaler)
_ELEMENTWISE: Mapping[str, tuple[str, ...]] = {
    "torch.optim": ("Adam", "AdamW", "SGD"),
    "apex.optimizers": ("FusedAdam", "FusedSGD"),
    "transformer_engine.pytorch.optimizers": ("FusedAdam", "FusedSGD"),
    "megatron_moetion.mcore.cpu_adam": ("FusedAdam",),
    "emerging_optimizers.scalar_optimizers": ("Lion",),
}
"""By package, classes whose state we know and whose step works element by element."""
_OF_MATRICES: Mapping[str, tuple[str, ...]] = {
    "megatron.core.optimizer": ("TensorParallelMuon", "TensorParallelAdaptiveMuon"),
}
"""By package, classes whose state we know and whose step needs a whole parameter."""


def chain(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that really hold state; raises ``UnsupportedState`` for those that we cannot capture exactly."""
    for each in _flat(optimizer):
        _require_known(each)
    real = links(optimizer)
    for link in real:
        _require_known_inner(link.optimizer)
        _require_plain_settings(link.optimizer)
        _require_known_scaler(link)
    return real


def links(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that really hold state, of chains within a chain too; nothing is refused."""
    return [o for o in _flat(optimizer) if not isinstance(o, ChainedOptimizer) and not o.is_stub_optimizer]


def layer_wise(optimizer: MegatronOptimizer) -> list[LayerWiseDistributedOptimizer]:
    """The chains that give each rank whole parameters."""
    return [o for o in _flat(optimizer) if isinstance(o, LayerWiseDistributedOptimizer)]


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step of a known optimizer works element by element; else it needs whole parameters."""
    return not _is_among(optimizer, _OF_MATRICES)


def makes_its_own_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of the package ``emerging_optimizers``, which make fresh state when they are asked to."""
    return _is_among(optimizer, _OF_MATRICES) or type(optimizer).__module__.startswith("emerging_optimizers.")


def _flat(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """A chain, and all that is in it."""
    yield optimizer
    if isinstance(optimizer, ChainedOptimizer):
        for link in optimizer.chained_optimizers:
            yield from _flat(link)


def _is_among(optimizer: torch.optim.Optimizer, known: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether its exact class is one of these, by name, so that packages need not be installed."""
    module, name = f"{type(optimizer).__module__}.", type(optimizer).__name__
    return any(module.startswith(f"{package}.") and name in names for package, names in known.items())


def _require_known(optimizer: MegatronOptimizer) -> None:
    if type(optimizer) in (*_CHAINS, *_LINKS):
        return
    bases = [c.__name__ for c in (*_LINKS, *_CHAINS) if isinstance(optimizer, c)]
    what = f"{type(optimizer).__name__}, a kind of {bases[0]}," if bases else type(optimizer).__name__
    raise UnsupportedState(
        f"{what} is not supported: MoEtion knows DistributedOptimizer, Float16OptimizerWithFloat16Params and "
        f"FP32Optimizer, alone or in a ChainedOptimizer or LayerWiseDistributedOptimizer. Build the optimizer with "
        f"megatron.core.optimizer.get_megatron_optimizer"
    )


def _require_known_inner(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, HybridDeviceOptimizer):
        raise UnsupportedState(
            "HybridDeviceOptimizer (--optimizer-cpu-offload) is not supported: its state is split between the "
            "devices. Leave --optimizer-cpu-offload out"
        )
    if _is_among(optimizer, _ELEMENTWISE) or _is_among(optimizer, _OF_MATRICES):
        return
    known = [
        f"{package}.{name}" for known in (_ELEMENTWISE, _OF_MATRICES) for package in known for name in known[package]
    ]
    raise UnsupportedState(
        f"{type(optimizer).__module__}.{type(optimizer).__name__} is not supported: its state is not known. "
        f"Use one of {', '.join(known)}"
    )


def _require_plain_settings(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if group.get("amsgrad"):
            raise UnsupportedState(
                f"{type(optimizer).__name__} with amsgrad=True is not supported: it keeps a third moment. "
                f"Turn amsgrad off"
            )
        if group.get("dampening"):
            raise UnsupportedState(
                f"{type(optimizer).__name__} with dampening={group['dampening']} is not supported: its first step "
                f"differs from all others, and the state before it cannot be captured. Set dampening to 0"
            )


def _require_known_scaler(link: MegatronOptimizer) -> None:
    scaler = getattr(link, "grad_scaler", None)  # FP32Optimizer has none
    if type(scaler) not in _SCALERS:
        raise UnsupportedState(
            f"the loss scaler {type(scaler).__name__} is not supported: it may hold state that no checkpoint has. "
            f"Use Megatron's ConstantGradScaler or DynamicGradScaler"
        )
