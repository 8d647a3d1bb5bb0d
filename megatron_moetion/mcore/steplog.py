# SPDX-License-Identifier: Apache-2.0
"""The inputs of each optimizer step, recorded so that the step can be replayed (mode ``exact``).

Gradients are logged by ``snapshot``; here is the rest of a step's input: the fields of the parameter groups, step
counts, and, where gradients are reduced in less than fp32, what they were multiplied by on the way to the optimizer
(there, the product that was applied exists in fp32 only and is twice as large as what it is made from).

Inputs are read in a pre-hook of each inner optimizer's ``step``. For gradients that are reduced in less than fp32
megatron-core 0.16 has no hook. There, from ``StepLog(...)`` to ``close``, methods of these objects, and no attribute of
a class or module, are replaced by functions that call them: ``update`` of each loss scaler, and ``get_grad_norm`` of a
``ChainedOptimizer`` or ``clip_grad_norm`` of a single optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

from megatron_moetion.errors import CorruptArena, UnsupportedState
from megatron_moetion.framework import StepNote
from megatron_moetion.mcore.optimizer_state import groups_of, load_group, set_steps, steps
from megatron_moetion.mcore.replace import replace_method

BYTES_A_GROUP = 256
"""Room in the host state for what changes in one parameter group from step to step: rate, decay, count.

After a restart with other settings the steps before it differ in those, too: bounds of the rate, betas, epsilon.
"""


class StepLog:
    """Watches one rank's optimizer; ``links`` are the parts of it that hold state. ``close`` undoes all of it.

    Remembers as many steps as ``remember`` says. ``samples``: a few elements of each link's reduced gradients, where
    they lie; by them it is seen that gradients were overwritten before they could be logged.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        links: Sequence[MegatronOptimizer],
        samples: Sequence[torch.Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._links = tuple(links)
        self._samples = tuple(samples)
        self._seen = [torch.zeros_like(sample) for sample in samples]
        is_on_gpu = any(sample.is_cuda for sample in samples)
        self._is_changed = torch.zeros((), dtype=torch.bool, pin_memory=is_on_gpu)
        """Whether the gradients of the last step were overwritten before ``note_step``; a device writes it."""
        self._inputs: list[dict[str, Any]] = [{} for _ in links]
        self._num_steps = [0] * len(links)
        self._has_seen_steps = False
        self._log: deque[tuple[int, list[dict[str, Any]] | None]] = deque(maxlen=1)
        self._norm: float | None = None
        self._undo = ExitStack()
        self._is_raw = [_has_raw_gradients(link) for link in links]
        self._inverse_scales: list[float | None] = [None] * len(links)
        for number, link in enumerate(links):
            handle = link.optimizer.register_step_pre_hook(partial(self._note_inputs, number))
            self._undo.callback(handle.remove)
            if self._is_raw[number] and getattr(link, "grad_scaler", None) is not None:
                self._watch(link.grad_scaler, "update", before=partial(self._note_scale, number))
        if any(self._is_raw):
            name = "get_grad_norm" if isinstance(optimizer, ChainedOptimizer) else "clip_grad_norm"
            self._watch(optimizer, name, after=self._note_norm)

    def close(self) -> None:
        """Remove every hook."""
        self._undo.close()

    @property
    def bytes_a_step(self) -> int:
        """What ``state`` may grow by for each step that is remembered."""
        groups = sum(len(link.optimizer.param_groups) for link in self._links)
        return 64 + (groups + len(self._links)) * BYTES_A_GROUP

    def remember(self, steps: int) -> None:
        """Keep the last ``steps`` ones."""
        self._log = deque(self._log, maxlen=steps)

    def discard(self) -> None:
        """Forget steps since the last ``note_step``: they were no training."""
        self._num_steps = [0] * len(self._links)

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        """Enter the step of ``iteration``, or that there was none.

        Hooks that have never seen a step are not believed, unless the loop says so (``stepped``) or a loss scaler may
        have skipped all of them.
        """
        times, self._num_steps = self._num_steps, [0] * len(self._links)
        self._has_seen_steps |= any(times)
        if not stepped:
            if any(times):
                return StepNote(problem="an optimizer step was taken where on_step_end() was told stepped=False")
            self._log.append((iteration, None))
            return StepNote(skipped=True)
        may_skip = self._has_seen_steps or any(getattr(link, "grad_scaler", None) is not None for link in self._links)
        if not any(times) and may_skip:
            self._log.append((iteration, None))
            return StepNote(skipped=True)
        if any(n != 1 for n in times):
            return StepNote(problem=f"{' and '.join(map(str, times))} optimizer steps were taken in one iteration")
        self._log.append((iteration, list(self._inputs)))
        self._enqueue_comparison()
        return StepNote(check=self._overwritten)

    def state(self, now: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The log as JSON-able values: of each step only what differs from ``now``, each link's fields at this time."""
        return [
            [iteration, None if step is None else [_difference(a, b) for a, b in zip(step, now, strict=True)]]
            for iteration, step in self._log
        ]

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        """Take the log from a host state: ``steps`` is what ``state`` returned for ``optimizers``."""
        now: Sequence[Mapping[str, Any]] = state["optimizers"]
        self._log.clear()
        for iteration, step in state["steps"]:
            self._log.append(
                (iteration, None if step is None else [_merged(a, b) for a, b in zip(step, now, strict=True)])
            )

    def replay(self, iteration: int) -> bool:
        """Take the step of ``iteration`` once more, with the gradients in the buffers; False if it was skipped."""
        log = dict(self._log)
        if iteration not in log:
            raise CorruptArena(f"the host state does not tell what the optimizer did in iteration {iteration}")
        step = log[iteration]
        if step is None:
            return False
        with torch.no_grad():
            for link, fields, is_raw in zip(self._links, step, self._is_raw, strict=True):
                for group, values in zip(link.optimizer.param_groups, fields["groups"], strict=True):
                    load_group(group, values)
                if fields["steps"] is not None:
                    set_steps(link, fields["steps"])
                _bring_gradients(link)
                if is_raw:
                    norms = {None: fields["norm"], **fields.get("norms", {})}
                    _scale_gradients(link, fields["inverse_scale"], norms, fields["clip_grad"])
                link.optimizer.step()
                link.optimizer.zero_grad()
        self.discard()
        return True

    def _enqueue_comparison(self) -> None:
        """Compare gradients with what the step saw, on their device; nobody waits for it here."""
        pairs = [(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(self._samples, self._seen, strict=True)]
        changed = [(a != b).any() for a, b in pairs if len(a)]
        if changed:
            self._is_changed.copy_(torch.stack(changed).any(), non_blocking=True)

    def _overwritten(self) -> str | None:
        """What the last comparison found, once the device has done it. Called by the packing thread."""
        if self._is_changed:
            return "gradients changed before on_step_end: zero them where a step begins"
        return None

    def _fields(self, number: int) -> dict[str, Any]:
        link = self._links[number]
        fields = {"groups": groups_of(link), "steps": steps(link)}
        if not self._is_raw[number]:
            return fields
        scale = self._inverse_scales[number]
        # Of parameters that are clipped by a norm of their own; 0.19 has such groups.
        norms = dict(getattr(self._optimizer, "grad_norms_by_group", {}))
        clip_grad = float(link.config.clip_grad)
        return {**fields, "inverse_scale": scale, "norm": self._norm, "norms": norms, "clip_grad": clip_grad}

    def _note_inputs(self, number: int, *_: Any) -> None:
        """One of the optimizers is about to step."""
        self._inputs[number] = self._fields(number)
        self._seen[number].copy_(self._samples[number])
        self._num_steps[number] += 1

    def _note_scale(self, number: int) -> None:
        """Gradients have just been divided by the loss scale, which is about to change."""
        self._inverse_scales[number] = float(self._links[number].grad_scaler.inv_scale)

    def _note_norm(self, norm: float | None) -> None:
        """What gradients are about to be clipped by."""
        self._norm = norm

    def _watch(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> None:
        """Call ``before`` and ``after`` around each call of this object's method, until ``close``."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if before is not None:
                    before()
                result = original(*args, **kwargs)
                if after is not None:
                    after(result)
                return result

            return watched

        replace_method(owner, name, wrap, self._undo)


def _has_raw_gradients(link: MegatronOptimizer) -> bool:
    """Whether the optimizer steps with a converted copy of the reduced gradients, which themselves stay.

    A precision-aware optimizer takes ``decoupled_grad`` of any type: the reduced gradients, unscaled and clipped in
    place.
    """
    if getattr(link.optimizer, "use_decoupled_grad", False):
        return False
    parameters = [p for group in link.optimizer.param_groups for p in group["params"]]
    models = getattr(link, "model_param_group_index_map", None)
    buffers = list(models) if models is not None else [*parameters, *_models_of(link)]
    raw = {p.main_grad.dtype is not torch.float32 for p in buffers if hasattr(p, "main_grad")}
    if len(raw) > 1:
        raise UnsupportedState(
            "gradients of one optimizer are reduced partly in fp32 and partly in less: mode 'exact' needs one of them"
        )
    return raw == {True}


def _models_of(link: MegatronOptimizer) -> list[torch.nn.Parameter]:
    return [p for group in getattr(link, "float16_groups", []) for p in group]


def _bring_gradients(link: MegatronOptimizer) -> None:
    if isinstance(link, FP32Optimizer):
        link.prepare_grads()
    else:
        link._copy_model_grads_to_main_grads()


def _scale_gradients(
    link: MegatronOptimizer, inverse_scale: float | None, norms: Mapping[str | None, float | None], clip_grad: float
) -> None:
    """What Megatron does to gradients between the reduction and the optimizer, by the same functions.

    ``norms``: what parameters are clipped by, by the name of their group; most are in the group None.
    """
    if inverse_scale is not None:
        gradients = link._collect_main_grad_data_for_unscaling()
        scale = torch.full_like(link.grad_scaler.inv_scale, inverse_scale)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, torch.zeros_like(link.found_inf), scale)
    groups: dict[str | None, list[torch.Tensor]] = {}
    for parameter in link.get_parameters():
        groups.setdefault(getattr(parameter, "grad_norm_group", None), []).append(parameter)
    for name, parameters in groups.items():
        norm = norms.get(name)
        if norm is not None and clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)


def _difference(step: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in a.items() if k not in b or b[k] != v}
        for a, b in zip(step["groups"], now["groups"], strict=True)
    ]
    return {**step, "groups": groups}


def _merged(step: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {**step, "groups": [{**b, **a} for a, b in zip(step["groups"], now["groups"], strict=True)]}
