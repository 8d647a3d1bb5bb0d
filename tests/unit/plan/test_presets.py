# SPDX-License-Identifier: Apache-2.0
"""Presets have the sizes that were published, and Megatron's own flags."""

from __future__ import annotations

import pytest

from megatron_moetion.plan.presets import MACHINES, MODELS
from megatron_moetion.plan.shape import ModelShape

PUBLISHED = {
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "mixtral-8x22b": (140.6e9, 39e9),
    "deepseek-v3": (671e9, 37e9),
    "qwen3-235b-a22b": (235e9, 22e9),
    "kimi-k2": (1.04e12, 32e9),
}
"""Total and active parameters; sources beside the presets."""
TOTAL_WITHIN = dict.fromkeys(PUBLISHED, 0.001) | {"kimi-k2": 0.015}
"""What was published is rounded to its last digit; Kimi-K2's configuration has 1.3% less than its paper says."""
ACTIVE_WITHIN = 0.03
"""Publishers round more, and some leave embeddings out."""


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_has_the_published_size(name: str) -> None:
    shape = ModelShape(**MODELS[name])
    total, active = PUBLISHED[name]
    assert shape.total_parameters == pytest.approx(total, rel=TOTAL_WITHIN[name])
    assert shape.active_parameters == pytest.approx(active, rel=ACTIVE_WITHIN)


def test_exact_sizes_that_are_known() -> None:
    """Bytes of the published bf16 weights, halved: model.safetensors.index.json of mistralai/Mixtral-8x7B-v0.1."""
    assert ModelShape(**MODELS["mixtral-8x7b"]).total_parameters == 93_405_585_408 // 2


def test_a_prediction_layer_of_deepseek_v3_has_what_was_published() -> None:
    """https://huggingface.co/deepseek-ai/DeepSeek-V3: 14e9 parameters, 11.5e9 without embedding and output layer."""
    assert ModelShape(**MODELS["deepseek-v3"]).prediction_parameters == pytest.approx(11.5e9, rel=0.01)


def test_machines_have_memory_and_bandwidth() -> None:
    for machine in MACHINES.values():
        assert machine.gpus == machine.interfaces == 8
        assert machine.memory_gib == 2048
        assert machine.peak_tflops > 300
