# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name."""

from __future__ import annotations

import torch

from emerging_optimizers.scalar_optimizers import Lion

_KNOWN: dict[str, type[torch.optim.Optimizer]] = {"lion": Lion}


def get_optimizer_name_list() -> list[str]:
    """All names."""
    return list(_KNOWN)


def get_optimizer_cls(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name."""
    return _KNOWN[name]
