# SPDX-License-Identifier: Apache-2.0
"""Which optimizers pass: exact classes of Megatron, and inside them classes of known packages with known settings."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.chain import chain, is_elementwise, layer_wise, makes_its_own_state
from megatron_moetion.mcore.cpu_adam import FusedAdam
from megatron_moetion.mcore.optimizer_state import create_state

Say = Callable[[str, object], None]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 3))]


def link(inner: Any, kind: type = FP32Optimizer, **fields: Any) -> Any:
    """An optimizer of Megatron with what ``chain`` looks at."""
    made = kind.__new__(kind)
    vars(made).update(
        optimizer=inner,
        is_stub_optimizer=inner is None,
        config=SimpleNamespace(use_precision_aware_optimizer=False),
        **fields,
    )
    return made


def chained(*links: Any, kind: type = ChainedOptimizer) -> Any:
    made = kind.__new__(kind)
    made.chained_optimizers = list(links)
    return made


def named(name: str, module: str, base: type = torch.optim.SGD) -> Any:
    """An optimizer whose class has this name and is of this module."""
    return type(name, (base,), {"__module__": module})(parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer])
@pytest.mark.parametrize(
    "inner",
    [
        torch.optim.Adam(parameters()),
        torch.optim.AdamW(parameters(), foreach=True),
        torch.optim.SGD(parameters(), momentum=0.9, nesterov=True),
        FusedAdam(parameters()),
        named("FusedAdam", "apex.optimizers.fused_adam"),
        named("FusedSGD", "transformer_engine.pytorch.optimizers.fused_sgd"),
    ],
    ids=lambda o: type(o).__name__,
)
def test_what_is_known_passes(kind: type, inner: Any) -> None:
    found = link(inner, kind, grad_scaler=DynamicGradScaler.__new__(DynamicGradScaler))
    assert chain(found) == [found]
    assert is_elementwise(inner)
    assert not makes_its_own_state(inner)


def test_chains_in_chains_are_walked_and_parts_without_parameters_left_out() -> None:
    muon = named("TensorParallelMuon", "megatron.core.optimizer.emerging_optimizers")
    a, b, empty = link(muon), link(FusedAdam(parameters())), link(None)
    inner = chained(a, empty, kind=LayerWiseDistributedOptimizer)
    assert chain(chained(inner, b)) == [a, b]
    assert layer_wise(chained(inner, b)) == [inner]
    assert layer_wise(chained(b)) == []
    assert not is_elementwise(muon)


class OwnDistributed(DistributedOptimizer): ...


class OwnLayerWise(LayerWiseDistributedOptimizer): ...


class OwnScaler(ConstantGradScaler): ...


class OwnSGD(torch.optim.SGD): ...


ADAM = FusedAdam(parameters())


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        pytest.param(
            link(ADAM, OwnDistributed),
            r"OwnDistributed, a kind of DistributedOptimizer, is not supported: .*get_megatron_optimizer",
            marks=pytest.mark.proves("Subclasses of Megatron's optimizers", "refused"),
        ),
        (chained(link(ADAM), kind=OwnLayerWise), "OwnLayerWise, a kind of LayerWiseDistributedOptimizer, is not"),
        (chained(chained(link(ADAM, OwnDistributed))), "OwnDistributed, a kind of"),
        (chained(ADAM), "FusedAdam is not supported: MoEtion knows DistributedOptimizer"),
        pytest.param(
            link(OwnSGD(parameters(), lr=0.1)),
            r"test_chain.OwnSGD is not supported: its state is not known. Use one of .*torch.optim.SGD",
            marks=pytest.mark.proves("Inner optimizers of other libraries", "refused"),
        ),
        (link(named("FusedAdam", "bitsandbytes.optim")), "bitsandbytes.optim.FusedAdam is not supported"),
        (link(named("Adam", "torch.optimizers_of_another")), "torch.optimizers_of_another.Adam is not supported"),
        (link(named("SOAP", "emerging_optimizers.soap")), "emerging_optimizers.soap.SOAP is not supported"),
        pytest.param(
            link(HybridDeviceOptimizer.__new__(HybridDeviceOptimizer)),
            r"HybridDeviceOptimizer \(--optimizer-cpu-offload\) is not supported: its state is split.*Leave",
            marks=pytest.mark.proves("CPU-offloaded optimizer (--optimizer-cpu-offload)", "refused"),
        ),
        (link(torch.optim.AdamW(parameters(), amsgrad=True)), "AdamW with amsgrad=True is not supported.*amsgrad off"),
        (link(torch.optim.SGD(parameters(), momentum=0.9, dampening=0.5)), "with dampening=0.5 is not supported.*to 0"),
        (
            link(ADAM, DistributedOptimizer, grad_scaler=OwnScaler.__new__(OwnScaler)),
            "the loss scaler OwnScaler is not supported.*ConstantGradScaler or DynamicGradScaler",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name_with_what_is(optimizer: Any, says: str, record_property: Say) -> None:
    with pytest.raises(UnsupportedState, match=says) as error:
        chain(optimizer)
    record_property("message", str(error.value))


def test_fresh_state_is_asked_of_those_that_make_it_themselves() -> None:
    def _init_group(self: Any, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        assert not skip_non_grad_params
        for parameter in group["params"]:
            self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)

    base = type("Base", (torch.optim.Optimizer,), {"_init_group": _init_group})
    base.__init__ = lambda self, p, lr: torch.optim.Optimizer.__init__(self, p, {"betas": (0.9, 0.99)})
    lion = named("Lion", "emerging_optimizers.scalar_optimizers", base)
    create_state(lion)
    assert [list(state) for state in lion.state.values()] == [["exp_avg"]], (
        "no second moment, whatever it has betas for"
    )
    first_release = named("TensorParallelMuon", "megatron.core.optimizer.muon", base)
    del base._init_group
    create_state(first_release)
    assert [list(state) for state in first_release.state.values()] == [["momentum_buffer"]]
