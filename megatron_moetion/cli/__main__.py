# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_moetion.cli``, where the package is not installed."""

import sys

from megatron_moetion.cli import main

sys.exit(main())
