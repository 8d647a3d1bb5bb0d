# SPDX-License-Identifier: Apache-2.0
"""Settings: every mistake is refused with the flag and the value in the message."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_moetion.config import AUTO, MODES, SCHEDULES, MoetionConfig, resolved_schedule
from megatron_moetion.errors import ConfigError


def test_defaults_are_valid_and_frozen() -> None:
    config = MoetionConfig()
    assert config.mode == AUTO
    assert config.allowed_modes == MODES
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "full"  # type: ignore[misc]


def test_the_default_schedule_follows_where_training_computes() -> None:
    default = MoetionConfig().schedule
    assert resolved_schedule(default, on_device=False) == "bubble"
    assert resolved_schedule(default, on_device=True) == "steady"
    for chosen in set(SCHEDULES) - {"auto"}:
        assert resolved_schedule(chosen, on_device=True) == chosen


def test_every_setting_says_what_it_is() -> None:
    assert all(f.metadata["help"] for f in dataclasses.fields(MoetionConfig))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interval": 0}, "--moetion-interval is 0"),
        ({"staleness_cap": 0}, "--moetion-staleness-cap is 0"),
        ({"max_stall_ms": -1}, "--moetion-max-stall-ms is -1"),
        ({"timeout_s": 0}, "--moetion-timeout-s is 0"),
        ({"in_flight_bytes": 0}, "--moetion-in-flight-bytes is 0"),
        ({"replicas": -2}, "--moetion-replicas is -2; it must be at least -1"),
        ({"ranks_per_node": -2}, "--moetion-ranks-per-node is -2"),
        ({"experts_per_snapshot": -1}, "--moetion-experts-per-snapshot is -1"),
        ({"pack_threads": -1}, "--moetion-pack-threads is -1"),
        ({"mode": "partial"}, "'partial'; choose one of auto, full, popularity"),
        ({"selection": "luck"}, "--moetion-selection is 'luck'"),
        ({"capacity_recalibration": "maybe"}, "--moetion-capacity-recalibration is 'maybe'"),
        ({"mode": "full", "capacity_recalibration": "on"}, "--moetion-capacity-recalibration on has no .*'full', only"),
        ({"mode": "exact", "capacity_recalibration": "on"}, "--moetion-capacity-recalibration on .*loses no tokens"),
        ({"lost_token_budget": 1.0}, "--moetion-lost-token-budget is 1.0; it is a share"),
        ({"lost_token_budget": -0.1}, "--moetion-lost-token-budget is -0.1; it is a share"),
        ({"experts_per_snapshot": 2, "snapshot_bytes": 9}, "--moetion-snapshot-bytes 9 both say"),
        ({"experts_per_snapshot": 4, "max_experts_per_snapshot": 2}, "--moetion-max-experts-per-snapshot 2 is less"),
        ({"mode": "full", "experts_per_snapshot": 2}, "no meaning in mode 'full'"),
        ({"mode": "full", "snapshot_bytes": 2}, "--moetion-snapshot-bytes 2 has no meaning in mode 'full', only in"),
        (
            {"mode": "popularity", "period": 4},
            "--moetion-period 4 has no meaning in mode 'popularity', only in 'ex",
        ),
        ({"period": 4, "interval": 2}, "no mode has a meaning for .*: --moetion-interval, --moetion-period; leave one"),
        ({"mode": "exact", "period": 1}, "--moetion-period is 1; it must be from 2"),
        ({"mode": "exact", "interval": 2}, "--moetion-interval 2 has no meaning in mode 'exact', .* every iteration"),
        ({"mode": "exact", "experts_per_snapshot": 2}, "--moetion-experts-per-snapshot 2 has no .*--moetion-period"),
        ({"mode": "exact", "period": 4, "snapshot_bytes": 9}, "--moetion-period 4 and --moetion-snapshot-bytes 9 both"),
        ({"selection": "full"}, "--moetion-selection is 'full'; choose one of unsaved-tokens"),
        ({"chunk_bytes": 2048}, "--moetion-chunk-bytes is 2048"),
        ({"chunk_bytes": 4097}, "--moetion-chunk-bytes is 4097"),
    ],
)
def test_a_mistake_names_the_flag_and_the_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoetionConfig(**wrong)


@pytest.mark.parametrize("mode", ["full", "popularity", "exact"])
def test_recalibration_may_be_off_in_all_modes(mode: str) -> None:
    assert not MoetionConfig(mode=mode, capacity_recalibration="off").recalibrates


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"replicas": 2}, ("full", "popularity", "exact")),
        ({"interval": 2}, ("full", "popularity")),
        ({"period": 4}, ("exact",)),
        ({"snapshot_bytes": 1 << 20}, ("popularity", "exact")),
        ({"experts_per_snapshot": 2}, ("popularity",)),
        ({"mode": "exact"}, ("exact",)),
    ],
)
def test_mode_auto_chooses_among_modes_in_which_all_settings_have_a_meaning(
    given: dict[str, Any], allowed: tuple[str, ...]
) -> None:
    assert MoetionConfig(**given).allowed_modes == allowed


def test_the_choice_of_mode_auto_keeps_a_given_period() -> None:
    assert MoetionConfig().in_mode("exact", 6).period == 6
    assert MoetionConfig(period=4).in_mode("exact", 6).period == 4
