# SPDX-License-Identifier: Apache-2.0
"""What the other files of this folder stand on."""

from __future__ import annotations

import transformer_engine.pytorch as te
from megatron.core.extensions import transformer_engine as extensions

from megatron_moetion.mcore import cpu_device


def test_megatron_has_found_the_real_transformer_engine() -> None:
    assert cpu_device.is_installed()
    assert extensions.HAVE_TE
    assert issubclass(extensions.TEGroupedLinear, te.GroupedLinear)


def test_a_grouped_linear_is_made_on_the_cpu() -> None:
    module = te.GroupedLinear(2, 16, 32, bias=False, device="cpu")
    assert [name for name, _ in module.named_parameters()] == ["weight0", "weight1"]
