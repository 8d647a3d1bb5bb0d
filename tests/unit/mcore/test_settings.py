# SPDX-License-Identifier: Apache-2.0
"""Of an optimizer's fields, what was given and never moved is a setting; what training moved is state."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moetion.mcore.settings import masked, settle
from megatron_moetion.snapshot.host_state import decode, encode, size_bound

SCHEDULE = {"init_lr": 0.0, "max_lr": 1e-2, "min_lr": 0.0, "lr_decay_style": "linear", "lr_decay_steps": 80}
GROUP = {"lr": 1e-2, "weight_decay": 0.1, "max_lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "step": 0, "wd_mult": 1.0}


def given(scheduler: dict[str, Any] | None = SCHEDULE, clip_grad: float = 1.0, **fields: Any) -> dict[str, Any]:
    """As a start gives it, after the trip through host state."""
    group = {**GROUP, **fields}
    return decode(encode({"groups": [[group, dict(group)]], "clip_grad": [clip_grad], "scheduler": scheduler}))


def captured(**fields: Any) -> list[list[dict[str, Any]]]:
    """Two groups of one optimizer after five steps of training."""
    group = {**GROUP, "lr": 5e-3, "step": 5, **fields}
    return [[group, dict(group)]]


def test_with_the_same_settings_everything_is_as_it_was_captured() -> None:
    found = captured(betas=(0.8, 0.9), odd="kept")
    settled = settle(given(), given(), found)
    assert settled.groups == found
    assert (settled.acts, settled.stays) == ([], [])


def test_settings_act_as_given_and_state_goes_on() -> None:
    now = given(
        {**SCHEDULE, "max_lr": 2e-3, "lr_decay_style": "cosine"}, 0.5, max_lr=2e-3, betas=(0.8, 0.999), eps=1e-6
    )
    settled = settle(given(), now, captured())
    for group in settled.groups[0]:
        assert (group["max_lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.999), 1e-6)
        assert (group["step"], group["lr"]) == (5, 5e-3), "the scheduler computes the rate anew"
    assert settled.acts == [
        "max_lr 0.01 -> 0.002",
        "betas (0.9, 0.999) -> (0.8, 0.999)",
        "eps 1e-08 -> 1e-06",
        "lr_decay_style linear -> cosine",
        "clip_grad 1.0 -> 0.5",
    ]
    assert settled.stays == []


def test_a_step_count_is_never_taken_back() -> None:
    for steps in (0, 1, 5):
        settled = settle(given(), given(eps=1e-6), captured(step=steps))
        assert [g["step"] for g in settled.groups[0]] == [steps, steps]


def test_what_the_loop_changed_on_its_way_goes_on_and_is_named_where_it_was_given_otherwise() -> None:
    """A loop of its own kind, without Megatron's scheduler, that raised beta and lowered the rate in training."""
    found = captured(lr=2e-3, betas=(0.95, 0.999))
    same = settle(given(None), given(None), found)
    assert same.groups == found
    other = settle(given(None), given(None, lr=5e-3, betas=(0.8, 0.999), wd_mult=0.5), found)
    assert [(g["lr"], g["betas"], g["wd_mult"]) for g in other.groups[0]] == [(2e-3, (0.95, 0.999), 0.5)] * 2
    assert other.acts == ["wd_mult 1.0 -> 0.5"]
    assert other.stays == [
        "lr 0.01 -> 0.005 (stays 0.002)",
        "betas (0.9, 0.999) -> (0.8, 0.999) (stays (0.95, 0.999))",
    ]


def test_without_a_scheduler_a_constant_rate_acts_as_given() -> None:
    settled = settle(given(None), given(None, lr=5e-3), captured(lr=1e-2))
    assert [g["lr"] for g in settled.groups[0]] == [5e-3, 5e-3]
    assert settled.acts == ["lr 0.01 -> 0.005"]


@pytest.mark.parametrize("style", ["linear", "inverse-square-root", "WSD"])
def test_room_for_settings_does_not_depend_on_them(style: str) -> None:
    now = given({**SCHEDULE, "lr_decay_style": style})
    assert size_bound(masked(now)) == size_bound(masked(given()))
    assert len(encode(now)) <= size_bound(masked(now))
