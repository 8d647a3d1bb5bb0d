# SPDX-License-Identifier: Apache-2.0
"""Other ways to checkpoint, beside ours: the same training, links and faults. See ``python -m benchmarks.peers``."""
