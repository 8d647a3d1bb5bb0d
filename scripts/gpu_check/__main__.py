# SPDX-License-Identifier: Apache-2.0
"""``python -m gpu_check``, with ``scripts`` on the path."""

import sys

from gpu_check.main import main

sys.exit(main())
