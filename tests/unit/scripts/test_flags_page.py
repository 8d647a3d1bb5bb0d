# SPDX-License-Identifier: Apache-2.0
"""docs/flags.md is what the settings say, and what they say is enough for a reference."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import flags_page
import pytest

from megatron_moetion.config import MAX_PERIOD, TOPICS, MoetionConfig, flag_of
from megatron_moetion.errors import ConfigError

SETTINGS = fields(MoetionConfig)
DOCS = Path(__file__).parents[3]


def test_the_page_is_what_the_script_makes_of_the_settings() -> None:
    assert flags_page.PAGE.read_text() == flags_page.page(), "run scripts/flags_page.py"


def test_every_setting_is_on_the_page_once_with_its_topic() -> None:
    assert [f.name for f in SETTINGS if f.metadata.get("topic") not in TOPICS] == []
    headings = re.findall(r"^### (\S+)$", flags_page.page(), re.MULTILINE)
    assert sorted(headings) == sorted(flag_of(f"moetion_{f.name}") for f in SETTINGS)


def test_every_number_has_a_unit() -> None:
    assert [f.name for f in SETTINGS if type(f.default) in (int, float) and "unit" not in f.metadata] == []


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("period", (0, 2, MAX_PERIOD), (-1, 1, MAX_PERIOD + 1)),
        ("lost_token_budget", (0.0, 0.99), (-0.01, 1.0)),
        ("chunk_bytes", (4096, 4160), (4032, 4100)),
    ],
)
def test_the_values_that_are_put_in_words_are_those_that_are_checked(
    name: str, allowed: tuple[float, ...], refused: tuple[float, ...]
) -> None:
    for value in allowed:
        MoetionConfig(**{name: value})
    for value in refused:
        with pytest.raises(ConfigError, match=flag_of(f"moetion_{name}")):
            MoetionConfig(**{name: value})


def test_every_other_setting_with_values_in_words_is_tested_above() -> None:
    assert {f.name for f in SETTINGS if "values" in f.metadata} == {"period", "lost_token_budget", "chunk_bytes"}


def test_flags_that_pages_name_are_there() -> None:
    known = {flag_of(f"moetion_{f.name}") for f in SETTINGS} | {"--moetion"}
    pages = [DOCS / "README.md", *sorted((DOCS / "docs").glob("*.md")), *(DOCS / "examples").rglob("*.md")]
    found = {flag for page in pages for flag in re.findall(r"--moetion(?:-[a-z]+)*\b(?!-)", page.read_text())}
    assert found - known == set()
