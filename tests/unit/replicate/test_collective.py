# SPDX-License-Identifier: Apache-2.0
"""What fails on one rank alone is heard of by all, over real sockets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fabrics import Fabrics, loopback_fabrics
from support import together

from megatron_moetion.errors import ChannelError, ConfigError, MoetionError, StoreError
from megatron_moetion.replicate.collective import on_all_ranks, require_same


def outcomes(fabrics: Fabrics, action: Callable[[int], int]) -> list[int | Exception]:
    """What each rank's ``on_all_ranks`` returned or raised."""

    def attempt(rank: int) -> int | Exception:
        try:
            return on_all_ranks(fabrics[rank], lambda: action(rank))
        except Exception as error:
            return error

    return together(*(lambda r=f.rank: attempt(r) for f in fabrics))


def test_each_rank_has_its_own_result() -> None:
    with loopback_fabrics(5, ranks_per_host=2) as fabrics:
        assert outcomes(fabrics, lambda rank: rank * 10) == [0, 10, 20, 30, 40]


def test_all_raise_the_error_of_the_lowest_rank_and_know_how_many_failed() -> None:
    def action(rank: int) -> int:
        if rank == 1:
            raise StoreError("no room")
        if rank > 2:
            raise ConfigError(f"wrong on {rank}")
        return rank

    with loopback_fabrics(5, ranks_per_host=2) as fabrics:
        found = outcomes(fabrics, action)
        assert [type(error) for error in found] == [StoreError] * 5
        assert len({str(error) for error in found}) == 1
        said = str(found[0])
        assert said.startswith("rank 1 on ")
        assert said.endswith(": no room (and 2 more ranks failed)")
        assert all(isinstance(error, MoetionError) and error.shared for error in found)
        assert outcomes(fabrics, lambda rank: rank) == [0, 1, 2, 3, 4]


def test_a_bug_is_raised_as_it_is_where_it_arose() -> None:
    def action(rank: int) -> int:
        return 1 // rank

    with loopback_fabrics(3) as fabrics:
        found = outcomes(fabrics, action)
    assert isinstance(found[0], ZeroDivisionError)
    assert type(found[1]) is MoetionError
    assert "ZeroDivisionError" in str(found[1])


def test_an_error_without_end_reaches_the_others_in_part() -> None:
    def action(rank: int) -> int:
        raise StoreError("x" * 1_000_000)

    with loopback_fabrics(2) as fabrics:
        assert all(len(str(error)) < 5000 for error in outcomes(fabrics, action))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_is_a_channel_error_elsewhere(lost: int) -> None:
    with loopback_fabrics(2, timeout_s=0.3) as fabrics:
        fabrics[lost].abandon()
        with pytest.raises(ChannelError):
            on_all_ranks(fabrics[1 - lost], lambda: 1)


def test_the_first_rank_that_differs_is_named_with_the_setting() -> None:
    def attempt(fabrics: Fabrics, settings: list[dict[str, object]]) -> list[str]:
        def call(rank: int) -> str:
            try:
                require_same(fabrics[rank], settings[rank])
            except ConfigError as error:
                return str(error)
            return ""

        return together(*(lambda r=r: call(r) for r in range(len(fabrics))))

    with loopback_fabrics(5, ranks_per_host=2) as fabrics:
        assert attempt(fabrics, [{"mode": "full", "interval": 1}] * 5) == [""] * 5
        settings: list[dict[str, object]] = [{"mode": "full", "interval": 1} for _ in range(5)]
        settings[3] = {"mode": "full", "interval": 2}
        settings[4] = {"mode": "exact", "interval": 1}
        said = attempt(fabrics, settings)
        assert len(set(said)) == 1
        assert said[0].startswith("ranks 0 and 3 were started differently: interval is 1 on one and 2 on the other")
