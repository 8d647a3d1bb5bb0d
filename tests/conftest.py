# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: property tests replay the same examples, and helper modules are found beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("unit", "dist")]
pytest.register_assert_rewrite("jobs")

settings.register_profile("moetion", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("moetion")
