# SPDX-License-Identifier: Apache-2.0
"""One rank of ``measure``, as ``torchrun`` starts it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.cluster.measure import work

if __name__ == "__main__":
    folder, pp, ep, cycles = sys.argv[1:]
    work(Path(folder), int(pp), int(ep), int(cycles))
