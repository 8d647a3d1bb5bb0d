# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one machine: own network, own memory, a rate on every link. See ``python -m benchmarks.testbed``."""

from benchmarks.testbed.hosts import Testbed
from benchmarks.testbed.launch import Job, JobFailed, run_torchrun
from benchmarks.testbed.namespaces import TestbedUnavailable, remove_leftovers, why_unavailable

__all__ = ["Job", "JobFailed", "Testbed", "TestbedUnavailable", "remove_leftovers", "run_torchrun", "why_unavailable"]
