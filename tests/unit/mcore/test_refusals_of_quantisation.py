# SPDX-License-Identifier: Apache-2.0
"""Settings of quantised parameters that are refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import Fp8Recipe
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.refusals import FP8_RECIPES, fp8_recipe, refuse_unsupported


def link(*, of_step: dict[str, Any] | None = None, of_gather: dict[str, Any] | None = None) -> DistributedOptimizer:
    """One with these fields in its ``OptimizerConfig`` and in DDP's."""
    made = object.__new__(DistributedOptimizer)
    plain = {"reuse_grad_buf_for_mxfp8_param_ag": False, "overlap_param_gather": False}
    made.config = SimpleNamespace(**plain | {"use_precision_aware_optimizer_no_fp8_or_ds_fp8": False} | (of_step or {}))
    made.optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    made.ddp_config = SimpleNamespace(**plain | {"fp8_param_gather": True} | (of_gather or {}))
    return made


def refuse(config: Any, links: list[Any], *, log_steps: bool) -> None:
    chunk = object.__new__(DistributedDataParallel)
    vars(chunk)["ddp_config"] = DistributedDataParallelConfig()
    refuse_unsupported([chunk], config, links, [], log_steps=log_steps)


SHARED = {"reuse_grad_buf_for_mxfp8_param_ag": True}
OVERLAPPED = {**SHARED, "overlap_param_gather": True}


@pytest.mark.parametrize("recipe", [*FP8_RECIPES, *(r for r in Fp8Recipe if r.value != "custom")])
def test_known_recipes_pass(recipe: Any) -> None:
    config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
    refuse(config, [link()], log_steps=True)
    assert fp8_recipe(config) in FP8_RECIPES


def test_without_fp8_there_is_no_recipe() -> None:
    assert fp8_recipe(SimpleNamespace()) is None
    assert fp8_recipe(SimpleNamespace(fp8=None, fp8_recipe="delayed")) is None
    refuse(SimpleNamespace(fp8=None, fp8_recipe="custom"), [link()], log_steps=True)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        pytest.param("fp4", "e2m1", "--fp4-format", marks=pytest.mark.proves("NVFP4", "refused")),
        pytest.param(
            "fp8_dot_product_attention",
            True,
            "fp8_dot_product_attention",
            marks=pytest.mark.proves("Attention in FP8", "refused"),
        ),
        ("fp8_multi_head_attention", True, "fp8_multi_head_attention"),
        ("use_kitchen", True, "use_kitchen"),
        ("quant_recipe", object(), "quant_recipe"),
    ],
)
def test_quantisation_that_nobody_has_tested_is_refused(
    field: str, value: Any, named: str, record_property: Callable[[str, object], None]
) -> None:
    with pytest.raises(UnsupportedState, match=named) as raised:
        refuse(SimpleNamespace(**{field: value}), [link()], log_steps=False)
    record_property("message", str(raised.value))


@pytest.mark.proves("FP8, custom recipe", "refused")
@pytest.mark.parametrize("recipe", [Fp8Recipe.custom, "a recipe of next year"])
def test_a_recipe_that_is_not_known_is_refused_by_name(
    recipe: Any, record_property: Callable[[str, object], None]
) -> None:
    with pytest.raises(UnsupportedState, match=f"--fp8-recipe {getattr(recipe, 'value', recipe)}") as raised:
        refuse(SimpleNamespace(fp8="e4m3", fp8_recipe=recipe), [link()], log_steps=False)
    record_property("message", str(raised.value))


def test_delayed_scaling_within_fused_operations_is_refused_and_other_recipes_there_are_not() -> None:
    config = SimpleNamespace(fp8="e4m3", fp8_recipe="delayed", use_transformer_engine_op_fuser=True)
    with pytest.raises(UnsupportedState, match="--use-transformer-engine-op-fuser"):
        refuse(config, [link()], log_steps=False)
    config.fp8_recipe = "mxfp8"
    refuse(config, [link()], log_steps=False)


@pytest.mark.proves("MXFP8 parameters, gradients share their memory, not overlapped, mode exact", "refused")
def test_steps_that_overwrite_their_gradients_are_refused_in_mode_exact_only(
    record_property: Callable[[str, object], None],
) -> None:
    config = SimpleNamespace(fp8="e4m3", fp8_recipe="mxfp8")
    refuse(config, [link(of_step=SHARED, of_gather=SHARED)], log_steps=False)
    refuse(config, [link(of_step=OVERLAPPED, of_gather=OVERLAPPED)], log_steps=True)
    with pytest.raises(UnsupportedState, match=r"without --overlap-param-gather .* mode 'exact'") as raised:
        refuse(config, [link(of_step=SHARED, of_gather=SHARED)], log_steps=True)
    record_property("message", str(raised.value))


@pytest.mark.parametrize("of_step", [{}, OVERLAPPED])
def test_settings_of_the_step_and_of_the_gather_must_be_the_same(of_step: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedState, match="in OptimizerConfig and"):
        refuse(SimpleNamespace(), [link(of_step=of_step, of_gather=SHARED)], log_steps=False)


def test_an_optimizer_that_quantises_within_its_step_is_refused() -> None:
    config = SimpleNamespace(fp8="e4m3", fp8_recipe="delayed")
    held = {"use_precision_aware_optimizer_no_fp8_or_ds_fp8": True}
    with pytest.raises(UnsupportedState, match="--use-precision-aware-optimizer with --fp8-param-gather"):
        refuse(config, [link(of_step=held)], log_steps=False)
    refuse(config, [link(of_step=held, of_gather={"fp8_param_gather": False})], log_steps=False)
