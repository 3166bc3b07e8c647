"""What verl's Qwen-VL attention takes from flash-attn, in plain torch: packed sequences on a CPU.

verl 0.9.1 has its own plain `unpad_input`, but in `verl.models.transformers.qwen2_vl` no plain
attention of several sequences in a row: without flash-attn `_flash_use_top_left_mask` and
`flash_attn_varlen_func` are undefined there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool, **_: Any) -> Tensor:
    """(T, H, D) of sequences in a row, each on its own."""
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([one(*(x[None] for x in part), causal)[0] for part in parts])


def one(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, L, H, D)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def unpacked(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, *_: Any, is_causal: bool, **__: Any
) -> Tensor:
    assert mask is None
    return one(q, k, v, is_causal)


@contextmanager
def plain_flash_attention() -> Iterator[None]:
    """verl's packed attention of Qwen2.5-VL; the classes are as before afterwards."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
    from verl.models.transformers import qwen2_vl

    patched = [qwen.Qwen2_5_VLAttention, qwen.Qwen2_5_VLTextModel, qwen.Qwen2_5_VLModel,
               qwen.Qwen2_5_VLForConditionalGeneration]  # fmt: skip
    forwards = [kind.forward for kind in patched]
    try:
        with mock.patch.multiple(
            qwen2_vl,
            create=True,
            flash_attn_varlen_func=varlen,
            _flash_attention_forward=unpacked,
            # flash-attn computes in bf16; this one takes what it gets.
            fa_peft_integration_check=lambda *states, target_dtype: states,
            _flash_use_top_left_mask=False,
            _flash_supports_window_size=False,
            _flash_supports_deterministic=False,
        ):
            yield
    finally:
        for kind, forward in zip(patched, forwards, strict=True):
            kind.forward = forward
