# SPDX-License-Identifier: Apache-2.0
"""The states of all random generators that training may draw from.

They belong to a global rank. Megatron's own checkpoints key them by pipeline and tensor rank, so that on its own
resume other expert ranks get the stream of the first.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def rng_states() -> dict[str, Any]:
    """Copies of this process's states, under the names that Megatron's checkpoints have for them."""
    tracker = get_cuda_rng_tracker().get_states()
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(legacy=True),
        "torch_rng_state": torch.get_rng_state().clone(),
        "cuda_rng_state": torch.cuda.get_rng_state().clone(),
        "rng_tracker_states": {name: _tensor_of(state).clone() for name, state in tracker.items()},
    }


def load_rng_states(states: Mapping[str, Any]) -> None:
    """Put back what ``rng_states`` returned."""
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    tracker = get_cuda_rng_tracker()
    streams = tracker.get_states()
    for name, state in states["rng_tracker_states"].items():
        if isinstance(streams.get(name), torch.Generator):
            streams[name].set_state(state)
        else:
            streams[name] = state.clone()
    tracker.set_states(streams)
    # Without a GPU these are one generator, with one state.
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])


def encoded(states: Mapping[str, Any]) -> dict[str, Any]:
    """``rng_states`` as values that a host state can hold: numbers, text and bytes."""
    version, words, gauss = states["random_rng_state"]
    name, keys, position, has_gauss, cached = states["np_rng_state"]
    return {
        "torch": _bytes(states["torch_rng_state"]),
        "cuda": _bytes(states["cuda_rng_state"]),
        "tracker": {name: _bytes(state) for name, state in states["rng_tracker_states"].items()},
        "numpy": (str(name), np.asarray(keys).tobytes(), int(position), int(has_gauss), float(cached)),
        "python": (version, np.array(words, dtype=np.uint32).tobytes(), gauss),
    }


def decoded(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``encoded``."""
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    return {
        "random_rng_state": (version, tuple(np.frombuffer(words, dtype=np.uint32).tolist()), gauss),
        "np_rng_state": (name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached),
        "torch_rng_state": _tensor(state["torch"]),
        "cuda_rng_state": _tensor(state["cuda"]),
        "rng_tracker_states": {name: _tensor(data) for name, data in state["tracker"].items()},
    }


def _tensor_of(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    """The tracker keeps tensors, or generators where CUDA graphs are used."""
    return state.get_state() if isinstance(state, torch.Generator) else state


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
