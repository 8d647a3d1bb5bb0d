# SPDX-License-Identifier: Apache-2.0
"""What a test has begun ends with it: threads that go on take the time of all tests that follow."""

from __future__ import annotations

from contextlib import ExitStack

AT_END = ExitStack()
"""Closed after each test of tests/unit."""
