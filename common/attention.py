"""Attention whose kernel does not depend on whether any row of the batch is padded.

transformers leaves the mask out when no row has padding, and torch then takes another kernel. So a single shorter row
changed the last bits of all others' results. Here the mask is always there.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ALWAYS_MASKED = "sdpa-always-masked"


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(*arguments, **options)


AttentionInterface.register(ALWAYS_MASKED, sdpa_attention_forward)
AttentionMaskInterface.register(ALWAYS_MASKED, _mask)


def always_mask(network: PreTrainedModel) -> None:
    """Replaces scaled-dot-product attention by the same with a mask in every batch.

    Other attention is left as it is; ``client.privacy.row_independence`` finds it if it mixes rows.
    """
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(ALWAYS_MASKED)
