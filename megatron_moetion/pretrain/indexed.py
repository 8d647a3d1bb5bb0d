# SPDX-License-Identifier: Apache-2.0
"""Megatron's indexed datasets (``--data-path``) as a token source."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.tokenizers import MegatronTokenizerBase

from megatron_moetion.errors import ConfigError
from megatron_moetion.pretrain.corpus import Split


class IdTokenizer(MegatronTokenizerBase):
    """The text is token ids already; one id past them marks the end of a document."""

    def __init__(self, num_ids: int) -> None:
        super().__init__(path="", config={})
        self._num_ids = num_ids
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict({"class": "IdTokenizer", "num_ids": num_ids})

    @property
    def eod(self) -> int:
        """The end-of-document id."""
        return self._num_ids

    @property
    def pad(self) -> int:
        """No token of a dataset is padding."""
        return -1

    @property
    def vocab_size(self) -> int:
        """Ids and the end-of-document id."""
        return self._num_ids + 1

    @property
    def vocab(self) -> dict[int, int]:
        """Each id stands for itself."""
        return {i: i for i in range(self.vocab_size)}

    def tokenize(self, text: str) -> list[int]:
        """Ids written in decimal, separated by spaces."""
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        """The inverse of ``tokenize``."""
        return " ".join(str(i) for i in ids)

    def apply_chat_template(self) -> None:
        """There is none."""
        raise NotImplementedError("token ids have no chat template")


class IndexedCorpus:
    """Training and validation samples of ``megatron.core.datasets.GPTDataset``.

    All ranks must construct it together: global rank 0 builds the indices, the others wait and map them.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        split: str,
        seq_length: int,
        seed: int,
        num_train: int,
        num_validation: int,
        num_ids: int,
        cache: str | None,
    ) -> None:
        tokenizer = IdTokenizer(num_ids)
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=get_blend_from_list(paths),
            split=split,
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_train, num_validation, 0], lambda: True, config)
        train, validation, _ = builder.build()
        self._datasets = {Split.TRAIN: train, Split.VALIDATION: validation}
        if train is None:
            raise ConfigError(f"--split {split} leaves no training samples of {' '.join(paths)}")
        self.vocab_size = tokenizer.vocab_size
        self.description = f"indexed datasets {' '.join(paths)}, split {split}"

    def sample(self, split: Split, number: int) -> torch.Tensor:
        """Sequence ``number`` as int64 ``[seq_length + 1]``; past the end of the dataset it starts again."""
        dataset = self._datasets[split]
        if dataset is None:
            raise ConfigError(f"--split leaves no samples for the {split.value} split")
        item = dataset[number % len(dataset)]
        return torch.cat([item["tokens"], item["labels"][-1:]])
