# SPDX-License-Identifier: Apache-2.0
"""The part of an optimizer that is no state tensor: fields of parameter groups, step counts, the loss scaler.

``create_state`` makes the tensors that a first step would make.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.chain import makes_its_own_state
from megatron_moetion.units import Role

MASTER_KEY = "master_param"
"""What Transformer Engine's ``FusedAdam`` calls a main value of its own."""


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimizer the state that its first step would create, so that it can be captured and written to.

    Apex, Transformer Engine and our CPU ``FusedAdam`` count steps in the parameter group; torch's own counts
    per parameter. SGD with momentum starts from a zero buffer, which its first step treats the same. Muon and its kind
    are asked for theirs, as Megatron does before it loads a checkpoint.
    """
    if makes_its_own_state(optimizer):
        _let_it_make_state(optimizer)
        return
    per_parameter = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            if hasattr(optimizer, "initialize_state"):
                _initialize(optimizer, parameter)
            elif "betas" in group:
                if per_parameter:
                    on_device = group.get("capturable") or group.get("fused")
                    device = parameter.device if on_device else torch.device("cpu")
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter.detach())
                state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
            elif group.get("momentum"):
                state["momentum_buffer"] = torch.zeros_like(parameter.detach())
        if "betas" in group and not per_parameter:
            group.setdefault("step", 0)


def _initialize(optimizer: Any, parameter: torch.Tensor) -> None:
    """By Transformer Engine's ``FusedAdam`` itself; before 2.1 it knows no remainders."""
    remainders = getattr(optimizer, "store_param_remainders", None)
    how = () if remainders is None else (remainders and parameter.dtype is torch.bfloat16,)
    optimizer.initialize_state(parameter, *how)


def _let_it_make_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if hasattr(optimizer, "_init_group"):
            optimizer._init_group(group, skip_non_grad_params=False)
        else:  # the first releases, whose step makes a momentum where there is none
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.detach()))


def fields_of(link: MegatronOptimizer) -> dict[str, Any]:
    """Everything of one optimizer that is not a state tensor, as plain values."""
    scaler = _scaler_of(link)
    return {
        "groups": groups_of(link),
        "steps": steps(link),
        "grad_scaler": {k: plain(v) for k, v in scaler.state_dict().items()} if scaler is not None else None,
    }


def load_fields(link: MegatronOptimizer, fields: Mapping[str, Any]) -> None:
    """Put back what ``fields_of`` returned."""
    for group, values in zip(link.optimizer.param_groups, fields["groups"], strict=True):
        load_group(group, values)
    if fields["steps"] is not None:
        set_steps(link, fields["steps"])
    scaler = _scaler_of(link)
    if fields["grad_scaler"] is not None and scaler is not None:
        now = scaler.state_dict()
        if now.keys() != fields["grad_scaler"].keys():
            return  # the scale was constant and adapts now, or the other way round: it begins with this start's value
        scaler.load_state_dict(
            {
                k: torch.full_like(now[k], v) if isinstance(now[k], torch.Tensor) else v
                for k, v in fields["grad_scaler"].items()
            }
        )


def groups_of(link: MegatronOptimizer) -> list[dict[str, Any]]:
    """The fields of each parameter group as plain values."""
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in link.optimizer.param_groups]


def load_group(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put a group's fields back, in place where they are tensors."""
    for key, value in values.items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def plain(value: Any) -> Any:
    """A number instead of a tensor of one."""
    return value.item() if isinstance(value, torch.Tensor) else value


def steps(link: MegatronOptimizer) -> float | None:
    """The one step count of a torch optimizer that keeps it per parameter; None where groups hold it."""
    counts: dict[torch.device, list[torch.Tensor]] = {}
    for state in link.optimizer.state.values():
        if "step" in state:
            count = torch.as_tensor(state["step"]).reshape(())
            counts.setdefault(count.device, []).append(count)
    # Fused and capturable optimizers keep them on the GPU: all of them are read by one wait for it.
    found = {float(n) for of_device in counts.values() for n in torch.stack(of_device).tolist()}
    if len(found) > 1:
        raise UnsupportedState(
            f"parameters of one optimizer have taken different numbers of steps: {sorted(found)[:4]}"
        )
    return found.pop() if found else None


def set_steps(link: MegatronOptimizer, value: float) -> None:
    """Write the step count of every parameter."""
    for state in link.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(value)
        elif "step" in state:  # Lion counts in plain numbers
            state["step"] = int(value)


def unscaled(role: Role, name: str, values: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a captured state stands for, in fp32, as Megatron's checkpoints have it; ``values`` itself where it is that.

    ``name``: of the state in a checkpoint. ``scales``: by the names of ``shards``. A remainder is a number like others.
    """
    name = MASTER_KEY if role is Role.MASTER else name
    if values.dtype is torch.uint8:
        return values.view(torch.float8_e4m3fn).float().mul_(scales[f"{name}.scale_inv"])
    if values.dtype is torch.float16 and f"{name}.factor" in scales:
        return values.float().mul_(scales[f"{name}.factor"])
    return values.float()


def _scaler_of(link: MegatronOptimizer) -> Any:
    return getattr(link, "grad_scaler", None)  # FP32Optimizer has none
