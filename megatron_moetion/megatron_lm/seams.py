# SPDX-License-Identifier: Apache-2.0
"""Which functions of ``megatron.training`` are replaced, by functions that call them, and when that is refused.

Megatron's training loop has no callbacks. It looks these functions up in their modules at each call, in 0.16 to
0.20-dev alike, so a script that has imported ``pretrain`` already is served as well.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore.arguments import add_moetion_arguments
from megatron_moetion.mcore.versions import installed

TRAINING = "megatron.training.training"
REPLACED: Mapping[str, tuple[str, ...]] = {
    "megatron.training.arguments:add_megatron_arguments": ("parser",),
    "megatron.training.initialize:_initialize_distributed": ("store",),
    f"{TRAINING}:setup_model_and_optimizer": (),
    f"{TRAINING}:train": ("model", "optimizer", "opt_param_scheduler", "train_data_iterator", "checkpointing_context"),
    f"{TRAINING}:train_step": (),
    f"{TRAINING}:dummy_train_step": (),
    f"{TRAINING}:checkpoint_and_decide_exit": ("iteration", "num_floating_point_operations_so_far"),
    f"{TRAINING}:save_checkpoint_and_time": ("iteration", "non_persistent_ckpt"),
    f"{TRAINING}:get_forward_backward_func": (),
}
"""What is replaced, and the arguments that are read by name."""

CALLED: Mapping[str, tuple[str, ...]] = {
    f"{TRAINING}:get_args": (),
    f"{TRAINING}:load_checkpoint": ("checkpointing_context",),
    f"{TRAINING}:save_checkpoint": ("checkpointing_context", "train_data_iterator"),
    f"{TRAINING}:update_num_microbatches": ("consumed_samples", "consistency_check", "verbose"),
}
"""What is called of Megatron beside them; ``load_checkpoint`` is replaced while the model is set up."""

_MARK = "_replaced_by_moetion"


def install() -> None:
    """Let ``pretrain()`` of Megatron-LM recover in memory where its flags say ``--moetion``; call it before that.

    Without the flag ``pretrain()`` does what it did before, and nothing of the checkpointing runtime is imported. A
    second call does nothing. Raises ``ConfigError`` where there is no ``megatron.training``, ``UnsupportedState`` with
    the list of missing names where it is of a version that this does not fit; then nothing is replaced.
    """
    try:
        modules = {path: importlib.import_module(path.partition(":")[0]) for path in (*REPLACED, *CALLED)}
    except ImportError as error:
        raise ConfigError(
            f"Megatron-LM's training loop cannot be imported ({error}): run the script from a Megatron-LM checkout, or "
            f"put the checkout into PYTHONPATH; megatron-core's own wheel holds megatron.training since 0.19"
        ) from error
    if hasattr(getattr(modules[f"{TRAINING}:train"], "train", None), _MARK):
        return
    problems = list(missing(modules))
    if problems:
        raise UnsupportedState(
            f"this Megatron-LM (megatron-core {installed()}) does not have what MoEtion needs: {'; '.join(problems)}. "
            f"docs/compatibility.md lists versions that fit"
        )
    from megatron_moetion.megatron_lm.adapter import Adapter

    adapter = Adapter(modules[f"{TRAINING}:train"])
    for path in REPLACED:
        module, name = modules[path], path.partition(":")[2]
        wrapper = _with_our_arguments if name == "add_megatron_arguments" else getattr(adapter, name.lstrip("_"))
        setattr(module, name, _replacement(getattr(module, name), wrapper))


def missing(modules: Mapping[str, ModuleType]) -> Iterator[str]:
    """Names, and arguments, that a Megatron-LM lacks; ``modules`` holds the module of each path of the lists."""
    for path, arguments in {**REPLACED, **CALLED}.items():
        module, _, name = path.partition(":")
        function = getattr(modules[path], name, None)
        if not callable(function):
            yield f"no function {name} in {module}"
            continue
        known = inspect.signature(function).parameters
        yield from (f"{name}() in {module} takes no {a!r}" for a in arguments if a not in known)


def _replacement(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``wrapper`` with the original and its arguments."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(call, _MARK, True)
    return call


def _with_our_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's parser, ours behind its own."""
    return add_moetion_arguments(original(*args, **kwargs))
