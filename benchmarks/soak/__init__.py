# SPDX-License-Identifier: Apache-2.0
"""Real faults against real training, from a seed: see ``python -m benchmarks.soak --help``."""
