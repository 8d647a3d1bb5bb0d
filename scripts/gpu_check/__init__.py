# SPDX-License-Identifier: Apache-2.0
"""What only a machine with an NVIDIA GPU can show, in parts that run alone: see ``scripts/gpu_check.sh``."""
