# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: property tests replay the same examples, and ``support`` is found by the unit tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "unit"))

settings.register_profile("moetion", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("moetion")
