# SPDX-License-Identifier: Apache-2.0
"""``moetion plan``, called as a person does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_moetion import cli


def plan(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints; it succeeds and complains of nothing."""
    assert cli.main(["plan", *arguments.split()]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def document(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Its JSON."""
    found: dict[str, Any] = json.loads(plan(f"{arguments} --json", capsys))
    return found
