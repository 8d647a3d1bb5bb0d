# SPDX-License-Identifier: Apache-2.0
"""Settings whose state cannot be captured exactly are refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.transformer.moe.router import Router, TopKRouter

from megatron_moetion.errors import MoetionError
from megatron_moetion.mcore.refusals import IN_BUFFERS, refuse_unsupported
from megatron_moetion.mcore.router import CapacityRouter

Say = Callable[[str, object], None]


class Wrapped(DistributedDataParallel):
    """Data parallelism with what refusals look at."""

    def __init__(self, **settings: Any) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.weight.main_grad = torch.zeros(2)
        self.ddp_config = SimpleNamespace(**settings)


def ddp(**how: Any) -> Any:
    made = Wrapped(**how)
    made.__class__ = DistributedDataParallel
    return made


def of(kind: type) -> Any:
    return kind.__new__(kind)


def config(**fields: Any) -> Any:
    sizes = {"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    return SimpleNamespace(**{"params_dtype": torch.bfloat16, **sizes, **fields})


def link(name: str = "AdamW", module: str = "torch.optim.adamw", **settings: Any) -> Any:
    base = type(name, (), {"__module__": module})
    inner = base()
    inner.param_groups = [{"params": [], "weight_decay": 0.1}]
    inner.weight_decay_method = settings.pop("weight_decay_method", "decoupled")
    vars(inner).update(settings.pop("inner", {}))
    off = {"reuse_grad_buf_for_mxfp8_param_ag": False, "muon_tp_mode": "blockwise", "clip_grad": 1.0}
    return SimpleNamespace(optimizer=inner, config=SimpleNamespace(**off | settings))


def block(kind: type, **fields: Any) -> Any:
    router = type(kind.__name__, (kind,), fields) if fields else kind
    return SimpleNamespace(prefix="layers.3", module=SimpleNamespace(router=of(router)))


def muon(name: str = "tp_mode", mode: str = "duplicated", **settings: Any) -> Any:
    """``name``: what the optimizer itself calls its mode, in 0.19; it is ``mode`` in 0.16."""
    return link("TensorParallelMuon", "megatron.core.optimizer.muon", inner={name: mode}, **settings)


class OwnRouter(TopKRouter): ...


class OtherRouter(Router):
    def routing(self, logits: Any) -> None: ...

    def forward(self, inputs: Any) -> None: ...


class OfAnotherName(DistributedDataParallel): ...


def refuse(**what: Any) -> None:
    usual = {"model": [ddp()], "config": config(), "links": [link()], "blocks": [], "log_steps": True}
    refuse_unsupported(**{**usual, **what})


FSDP = next(c for n, c in vars(mcore_fsdp_adapter).items() if n.startswith("FullyShardedDataParallel"))
MODES = {"exact": True, "full": False}


def proves(feature: str, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.proves(feature, "refused"))


@pytest.mark.parametrize(
    ("what", "modes", "says"),
    [
        proves("Megatron-FSDP", {"model": [of(FSDP)]}, MODES, r"Megatron-FSDP \(Fully.*without --use-megatron-fsdp"),
        ({"model": [ddp(use_megatron_fsdp=True)]}, MODES, r"Megatron-FSDP \(use_megatron_fsdp\) is not supported"),
        ({"model": [ddp(use_custom_fsdp=True)]}, MODES, r"Megatron-FSDP \(use_custom_fsdp\) is not supported"),
        proves(
            "Torch FSDP2", {"model": [of(TorchFullyShardedDataParallel)]}, MODES, r"torch FSDP2 .*--use-distributed-opt"
        ),
        proves(
            "Subclasses of DistributedDataParallel", {"model": [ddp(), of(OfAnotherName)]}, MODES,
            r"holds OfAnotherName \(a kind of DistributedDataParallel\); every chunk",
        ),
        proves(
            "Several instances of the distributed optimizer", {"model": [ddp(num_distributed_optimizer_instances=2)]},
            MODES, "^2 instances of the distributed optimizer are not supported.*--num-distributed-opt",
        ),
        proves(
            "GTP (weight rematerialisation groups)", {"config": config(gtp_weight_remat_size=2)}, MODES,
            r"gtp_weight_remat_size=2, expert_gtp_weight_remat_size=1\) is not supported.*weight shards",
        ),
        ({"config": config(expert_gtp_weight_remat_size=4)}, MODES, "expert_gtp_weight_remat_size=4"),
        proves(
            "CUDA-graphed optimizer step (--optimizer-cuda-graph)", {"links": [link(optimizer_cuda_graph=True)]}, MODES,
            "--optimizer-cuda-graph is not supported: .*Leave it out",
        ),
        proves(
            "qk_clip, mode exact", {"config": config(qk_clip=True, params_dtype=torch.float32)}, ("exact",),
            "qk_clip is not supported in mode 'exact'",
        ),
        proves(
            "qk_clip, bf16 parameters", {"config": config(qk_clip=True)}, MODES,
            "qk_clip is not supported (in mode 'exact'|with torch.bfloat16 parameters: .*Train without)",
        ),
        proves(
            "Muon with tensor parallelism (duplicated, distributed), mode exact",
            {"links": [muon()], "config": config(tensor_model_parallel_size=2)}, ("exact",),
            r"size 2 \(experts: 1\) and muon_tp_mode='duplicated' is not supported in mode 'exact'.*blockwise",
        ),
        ({"links": [muon()], "config": config(expert_tensor_parallel_size=2)}, ("exact",), r"size 1 \(experts: 2\)"),
        (
            {"links": [muon("mode", "distributed")], "config": config(tensor_model_parallel_size=2)}, ("exact",),
            "muon_tp_mode='distributed' is not supported",
        ),
        proves(
            "Muon and Lion with L2 weight decay, mode exact", {"links": [muon(weight_decay_method="l2")]}, ("exact",),
            "TensorParallelMuon with weight_decay_method='l2' is not supported in mode 'exact'.*decoupled",
        ),
        proves(
            "Routers of other kinds", {"blocks": [block(OwnRouter)]}, MODES,
            f"layers.3: the router OwnRouter, a kind of TopKRouter, is not supported: .*{IN_BUFFERS} = True",
        ),
        ({"blocks": [block(OtherRouter)]}, MODES, "the router OtherRouter is not supported.*subclass of TopKRouter"),
    ],
)  # fmt: skip
def test_refused_by_name_with_what_to_do(what: Any, modes: Any, says: str, record_property: Say) -> None:
    for mode, log_steps in MODES.items():
        if mode not in modes:
            refuse(**what, log_steps=log_steps)
            continue
        with pytest.raises(MoetionError, match=says) as error:
            refuse(**what, log_steps=log_steps)
        record_property("message", str(error.value))


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"model": [ddp(use_megatron_fsdp=False), ddp()]},
        {"config": config(gtp_weight_remat_size=1, qk_clip=False)},
        {"links": [muon()]},
        {"links": [muon("tp_mode", "blockwise")], "config": config(tensor_model_parallel_size=2)},
        {"links": [muon("mode", "blockwise")], "config": config(tensor_model_parallel_size=2)},
        {
            "links": [muon("tp_mode", "blockwise", muon_tp_mode="duplicated")],
            "config": config(tensor_model_parallel_size=2),
        },
        {"links": [link()], "config": config(tensor_model_parallel_size=2)},
        {"blocks": [block(TopKRouter), block(CapacityRouter), block(OwnRouter, **{IN_BUFFERS: True})]},
    ],
)
def test_the_rest_passes(what: Any) -> None:
    refuse(**what)
