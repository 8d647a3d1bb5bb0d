# SPDX-License-Identifier: Apache-2.0
"""A ``pretrain_*.py`` as Megatron-LM has them, that needs nothing but the wheel of megatron-core.

It has Megatron's own datasets and loaders, and knows nothing of MoEtion.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from official_pretrain import build_model


def datasets(sizes: Any, vp_stage: int | None = None) -> Any:
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_of, batch["loss_mask"])


def loss_of(mask: torch.Tensor, output: torch.Tensor) -> Any:
    losses = output.float().view(-1) * mask.view(-1)
    total, tokens = losses.sum(), mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack((total.detach(), tokens.float()))}


if __name__ == "__main__":
    args = parse_and_validate_args()
    pretrain(pretrain_cfg_container_from_args(args), datasets, ModelType.encoder_or_decoder, forward_step, build_model)
