# SPDX-License-Identifier: Apache-2.0
"""Everything that lets the real Megatron-Core run on a machine without a GPU.

Megatron-Core asks for streams, events, device generators and ``device="cuda"`` in many places. ``install``
redirects those names to the CPU; collectives then run over gloo. It refuses where CUDA is available: a real
device is never patched. Call it before anything of Megatron-Core is imported or built.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.cuda.random
from torch import distributed as dist

CPU = torch.device("cpu")

_FACTORIES = (
    "tensor zeros ones empty full arange rand randn randint as_tensor empty_like zeros_like ones_like "
    "full_like linspace eye empty_strided"
).split()
_ENGINE_OPTIMIZERS = "transformer_engine.pytorch.optimizers"
_TENSOR_TYPES = "Float Half BFloat16 Int Long Byte Double Bool".split()


class HostStream:
    """A stream on which all work is already done."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> HostEvent:
        return event if isinstance(event, HostEvent) else HostEvent()

    def query(self) -> bool:
        return True

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *exc: object) -> None: ...


class HostEvent:
    """An event that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        return 0.0


class _DefaultGenerators:
    """``torch.cuda.default_generators``: on every index, torch's CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def is_installed() -> bool:
    """Whether ``install`` has run in this process."""
    stream_class: Any = torch.cuda.Stream
    return stream_class is HostStream


def install() -> None:
    """Redirect torch's and Megatron-Core's CUDA names to the CPU. Safe to call twice.

    Raises ``RuntimeError`` where CUDA is available.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"cpu_device.install() would patch torch on a machine with {torch.cuda.device_count()} usable GPU(s); "
            "set CUDA_VISIBLE_DEVICES='' before torch is imported to take the CPU path on purpose"
        )
    _redirect_streams()
    _redirect_generators()
    _redirect_tensors()
    _redirect_all_to_all()
    _skip_compiler()
    _redirect_megatron()


def _redirect_streams() -> None:
    # torch._dynamo keeps one rule per function object: every name below needs a function of its own.
    cuda: Any = torch.cuda
    stream = HostStream()
    cuda.Stream, cuda.Event = HostStream, HostEvent
    cuda.current_stream = lambda *args, **kwargs: stream
    cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.nvtx.range_push = lambda *args: 0
    cuda.nvtx.range_pop = lambda *args: 0


def _redirect_generators() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    # Megatron's RNG tracker switches streams inside a lazy call: it has to run, and run now.
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.default_generators = _DefaultGenerators()


def _host(device: Any) -> Any:
    """``"cuda"``, ``"cuda:0"`` and a device index become the CPU; anything else stays."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    return CPU if is_index or str(device).startswith("cuda") else device


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        if kwargs.get("pin_memory"):  # for copies to a device
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _redirect_tensors() -> None:
    torch_names: Any = torch
    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    for name in _FACTORIES:
        setattr(torch_names, name, _on_host(getattr(torch_names, name)))
    for name in _TENSOR_TYPES:
        setattr(torch.cuda, f"{name}Tensor", getattr(torch_names, f"{name}Tensor"))
    tensor_class.cuda = lambda self, *args, **kwargs: self
    module_class.cuda = lambda self, *args, **kwargs: self

    tensor_to, tensor_type = tensor_class.to, tensor_class.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_host(a) if isinstance(a, (str, torch.device)) else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        moved: torch.Tensor = tensor_to(self, *args, **kwargs)
        return moved

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        # The optimizers look for 'torch.cuda.FloatTensor' by name. A subclass of tensors may have come here before.
        return tensor_type(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")

    tensor_class.to, tensor_class.type = to, type_name


def _redirect_all_to_all() -> None:
    collective = dist.all_to_all_single

    def splits(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # The token dispatcher passes split sizes as CPU tensors; gloo wants lists.
        return collective(
            output, input, splits(output_split_sizes), splits(input_split_sizes), group=group, async_op=async_op
        )

    names: Any = dist
    names.all_to_all_single = all_to_all_single


def _skip_compiler() -> None:
    def compile(model: Any = None, **kwargs: Any) -> Any:
        # Used as a function and as a decorator factory. Importing the compiler takes a third of a start, and
        # at every restart, and its kernels would need a C++ compiler at run time.
        return model if model is not None else lambda function: function

    names: Any = torch
    names.compile = compile


def _quiet_expected_warnings() -> None:
    """Without a GPU neither Apex nor Transformer Engine can be there; saying so from every rank helps nobody."""
    for message in ("Transformer Engine and Apex are not installed", "Apex is not installed"):
        warnings.filterwarnings("ignore", message=message)
    # The tracker warns when the CPU's stream moves inside a fork; here it is the stream that was forked.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _redirect_megatron() -> None:
    _quiet_expected_warnings()
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_moetion.mcore.cpu_adam import FusedAdam
    from megatron_moetion.mcore.engine_names import bind_engine_names

    bind_engine_names()
    _avoid_kernels()
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    _offer_precision_aware_adam(FusedAdam)


def _offer_precision_aware_adam(adam: type[torch.optim.Optimizer]) -> None:
    """``--use-precision-aware-optimizer`` asks Transformer Engine for its optimizer and its version: give ours, as 2.1.

    Under the one name that Megatron asks for: ``import transformer_engine`` fails as before where it is not installed.
    Where it is, Megatron has imported it by now, and its real class answers.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import optimizer_config

    if _ENGINE_OPTIMIZERS in sys.modules:
        return
    module = types.ModuleType(_ENGINE_OPTIMIZERS, "The CPU twin of Transformer Engine's optimizer.")
    sys.modules[_ENGINE_OPTIMIZERS] = module
    vars(module)["FusedAdam"] = adam

    def is_te_min_version(version: str, check_equality: bool = True) -> bool:
        # Both modules ask for 2.1 and nothing else: since then there are remainders.
        return True

    vars(optimizer)["is_te_min_version"] = vars(optimizer_config)["is_te_min_version"] = is_te_min_version


def _avoid_kernels() -> None:
    """Where Transformer Engine is installed, Megatron-Core takes its kernels, which need a GPU, outside models too.

    Norms and scaling of gradients, and the router's product, as they are where it is not installed.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as base
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    clip_grads.multi_tensor_applier = base.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = base.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None
