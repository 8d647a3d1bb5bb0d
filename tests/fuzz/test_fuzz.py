# SPDX-License-Identifier: Apache-2.0
"""A short run of every fuzz target: seeds, inputs that have failed once, and some changes to them, always the same.

``scripts/fuzz.sh`` runs them at length.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import mutate
import pytest
from corpus import FOLDER, inputs
from limits import Finding, execute, timed
from targets import TARGETS, forget_folder, page_of, page_seeds

from megatron_moetion.store.manifest import decode_page, encode_page

EXECUTIONS = 120
TRACED_EVERY = 4


@pytest.fixture(autouse=True, scope="module")
def no_folder_stays() -> Iterator[None]:
    yield
    forget_folder()


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_what_it_must_not(name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)
    seeds = list(inputs(target).values())
    with timed():
        for seed in seeds:
            execute(target, seed, traced=True)
        for number in range(EXECUTIONS):
            data = mutate.mutate(chance.choice(seeds), target.shape, chance)
            try:
                execute(target, data, traced=number % TRACED_EVERY == 0)
            except Finding as error:
                raise AssertionError(f"{error}; the input: {data!r}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_come_through_their_shapes(name: str) -> None:
    """Else changes would be to bytes that no digest covers any more."""
    target = TARGETS[name]
    outcomes = set()
    for seed in target.seeds():
        again = target.shape.together(target.shape.apart(seed))
        with timed():
            before, after = execute(target, seed, traced=False), execute(target, again, traced=False)
        assert before == after
        outcomes.add(before)
    assert outcomes & {"fine", "StoreError"}, "what is right is read"


def test_digests_are_right_after_a_change() -> None:
    parts = mutate.changed([0], random.Random(1))
    assert parts != [0]
    magic, head, branches, records, *_ = TARGETS["page"].shape.apart(page_seeds()[0])
    head[2] = 5  # stable
    page = decode_page(TARGETS["page"].shape.together([magic, head, branches, records]))
    assert page is not None
    assert page.stable == 5
    assert page.records == page_of("full").records


def test_every_folder_of_the_corpus_is_of_a_target() -> None:
    assert {path.name for path in FOLDER.iterdir()} <= set(TARGETS)


def test_what_an_input_must_not_do_is_found() -> None:
    target = TARGETS["page"]

    def hang(data: bytes) -> None:
        while True:
            pass

    with timed():
        with pytest.raises(Finding, match="ZeroDivisionError"):
            execute(replace(target, run=lambda data: 1 // 0), b"", traced=False)
        with pytest.raises(Finding, match="bytes of memory"):
            execute(replace(target, run=lambda data: bytearray(1 << 22)), b"", traced=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("limits.SECONDS_MAX", 0.05)
            with pytest.raises(Finding, match="longer"):
                execute(replace(target, run=hang), b"", traced=False)
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_a_page_that_no_run_can_have_written_is_none() -> None:
    page = page_of("full")
    assert decode_page(encode_page(page, 64)) == page
    last = (1 << 64) - 1
    for change in ({"sequence": last}, {"lineage": last}, {"epoch": (1 << 32) - 1}, {"stable": 1 << 62}, {"stable": -2},
                    {"epoch": 0}, {"branches": page.branches * 2}):  # fmt: skip
        assert decode_page(encode_page(replace(page, **change), 64)) is None, change
