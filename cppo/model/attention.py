"""Attention within each sequence of a packed stream: the one place that chooses how.

    flash_attention_2   flash-attn's varlen kernel: CUDA, half precision, the package installed
    varlen              PyTorch's own `torch.nn.attention.varlen`: CUDA, half precision
    sdpa                `scaled_dot_product_attention`, sequence by sequence: anywhere

Each is registered with transformers' `AttentionInterface` under a name of its own. A call without
`cu_seq_lens_q` (a padded batch, `generate`) is plain sdpa under every name, so that one model
serves both.

Queries and keys may be cut differently: sequence i of the queries sees all of sequence i of the
keys up to its own place counted from the end (causal, aligned at the lower right), or as many of
them as the layer's sliding window holds, the token itself included. With `key_index`, the keys are
first gathered from the stream; that is how a shared prompt is seen by several completions without
being computed more than once.

What a layer asks for beyond that (sinks, capped scores, biases) is refused rather than left out.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names inside transformers. "flash" in a name would make it build masks for its own kernels, "sdpa"
# would make it ask a flag of the model's class.
NAMES = {"sdpa": "cppo_plain", "varlen": "cppo_varlen", "flash_attention_2": "cppo_fa2"}
_HALF = (torch.float16, torch.bfloat16)
# What layers tell their attention that changes nothing, or that is computed here.
_KNOWN = {
    *("dropout", "scaling", "is_causal", "sliding_window", "position_ids", "cache_position"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_index"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "num_items_in_batch", "token_type_ids", "mm_token_type_ids"),
    *("position_embeddings", "cache", "past_key_values", "deterministic"),
}
_MEANINGS = {"s_aux": "attention sinks", "softcap": "attn_logit_softcapping"}


def why_not(attention: str, device: torch.device | str) -> str:
    """Why `attention` cannot run on `device`; '' when it can."""
    if attention == "sdpa":
        return ""
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if torch.device(device).type != "cuda":
        return f"the model is on {device}"
    if attention == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return ""


def choose_attention(
    attention: str, device: torch.device | str, option: str = "cppo: attention"
) -> str:
    """The attention that the packed forward uses: "auto" takes the fastest that runs here.

    Raises: ValueError naming the option if another one is asked for and cannot run here.
    """
    if attention == "auto":
        order = ("flash_attention_2", "varlen", "sdpa")
        return next(name for name in order if not why_not(name, device))
    reason = why_not(attention, device)
    if reason:
        able = [name for name in NAMES if not why_not(name, device)]
        raise ValueError(
            f"{option} must be 'auto' or one that runs here ({', '.join(able)}), got "
            f"{attention!r}: {reason}"
        )
    return attention


def register(attention: str) -> str:
    """Makes `attention` known to transformers; returns its name there."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = NAMES[attention]
    AttentionInterface.register(name, functools.partial(attend, _KERNELS[attention]))
    # Without a mask function a padded batch would silently lose its mask.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def no_mask(device: torch.device) -> Tensor:
    """The attention mask of a packed stream: nothing is read off it, `cu_seq_lens` says it all.

    It has four dimensions, because transformers would build an S x S mask from anything else. A
    layer that gets it without `cu_seq_lens`, or gets something else, is refused in `attend`.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend(
    kernel: Callable[..., Tensor] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For transformers' `AttentionInterface`: (1, heads, S, d) each, or a padded batch.

    Raises: ValueError if the layer asks for what is not computed here, or if the bounds of the
        sequences in a packed stream did not reach it.
    """
    scale, is_causal = options.get("scaling"), options.get("is_causal")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bounds = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    _refuse_more(module, options)
    is_packed = attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1
    if bounds[0] is None or not causal:
        if is_packed:
            raise ValueError(
                f"cppo: {type(module).__name__} must attend within each sequence of a packed "
                "stream, but it "
                + ("is not causal" if bounds[0] is not None else "never gets cu_seq_lens")
            )
        dropout = options.get("dropout", 0.0) if module.training else 0.0
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=scale,
            dropout_p=dropout,
            is_causal=causal and attention_mask is None and query.shape[2] > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError(
            f"cppo: {type(module).__name__} must attend to all of a sequence before a token, but "
            f"it has a mask of its own of shape {tuple(attention_mask.shape)}"
        )
    key_index = options.get("key_index")
    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    window = options.get("sliding_window") or None
    if window is not None and options["max_length_k"] <= window:
        window = None
    if kernel is not None and query.dtype in _HALF:
        longest = options["max_length_q"], options["max_length_k"]
        streams = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernel(*streams, *bounds, *longest, scale, window)[None], None
    lengths = [cu.diff().tolist() for cu in bounds if cu is not None]
    out = _sdpa(query, key, value, lengths[0], lengths[-1], scale, window)
    return out.transpose(1, 2).contiguous(), None


def _refuse_more(module: nn.Module, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _KNOWN or value is None or value is False:
            continue
        meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
        raise ValueError(
            f"cppo: {type(module).__name__} must do with plain attention, but it asks for {name!r}"
            f"{meaning}, which the attention of cppo.set_attention does not compute"
        )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(S, heads, d) each, by `torch.nn.attention.varlen`."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": _sides(window)}
    if query.shape[1] != key.shape[1]:
        # torch 2.11 does not know grouped heads here.
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    longest = longest_query, longest_key
    out: Any = varlen_attn(query, key, value, cu_query, cu_key, *longest, **options)
    return out


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(S, heads, d) each, by flash-attn."""
    from flash_attn import flash_attn_varlen_func

    longest = longest_query, longest_key
    bounds = cu_query, cu_key
    options = {"softmax_scale": scale, "causal": True, "window_size": _sides(window)}
    return flash_attn_varlen_func(query, key, value, *bounds, *longest, **options)


def _sides(window: int | None) -> tuple[int, int]:
    """Tokens that the kernels see to the left and to the right of a token; -1: all."""
    return (-1 if window is None else window - 1, 0)


_KERNELS: dict[str, Callable[..., Tensor] | None] = {
    "sdpa": None,
    "varlen": _varlen,
    "flash_attention_2": _flash,
}


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """(1, heads, S, d) each; neighbours with as much before them go side by side."""
    outputs, at, key_at = [], 0, 0
    pairs = [pair for pair in zip(lengths, key_lengths, strict=True) if any(pair)]
    for (before, is_empty), run in groupby(
        pairs, key=lambda pair: (pair[1] - pair[0], not pair[0])
    ):
        sizes = list(run)
        stop = at + sum(own for own, _ in sizes)
        key_stop = key_at + sum(seen for _, seen in sizes)
        if not is_empty:
            keys, values = key[:, :, key_at:key_stop], value[:, :, key_at:key_stop]
            own = [own for own, _ in sizes]
            one = functools.partial(_one, before=before, scale=scale, window=window)
            outputs.append(_alike(query[:, :, at:stop], keys, values, own, before, one))
        at, key_at = stop, key_stop
    return torch.cat(outputs, dim=2) if outputs else query


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    before: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of one sequence, or of several of one length, `before` keys ahead."""
    mask = None
    if before or window is not None:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(before)
        if window is not None:
            mask = mask.triu(before - window + 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _alike(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    before: int,
    attend: Callable[..., Tensor],
) -> Tensor:
    """Causal attention per sequence, each with `before` keys ahead of its own."""
    total, longest = sum(lengths), max(lengths)
    if len(lengths) == 1:
        return attend(query, key, value)
    # Padding costs time, and so does a call. Measured on a CPU they are even at about 12 tokens; on
    # a GPU calls cost more, but more than twice the work is too much there as well.
    mean = total / len(lengths)
    if longest - mean > (mean if query.is_cuda else 12):
        key_lengths = [before + n for n in lengths]
        parts = zip(
            query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2),
            strict=True,
        )  # fmt: skip
        return torch.cat([attend(*part) for part in parts], dim=2)
    # One call for all: right padding is harmless, a causal row never looks to its right.
    size = torch.tensor(lengths, device=query.device)

    def pad(x: Tensor, extra: int) -> Tensor:
        sizes = size + extra
        column = torch.arange(longest + extra, device=x.device)
        source = (sizes.cumsum(0) - sizes)[:, None] + column.minimum(sizes[:, None] - 1)
        return x[0][:, source].transpose(0, 1)

    out = attend(pad(query, 0), pad(key, before), pad(value, before))
    valid = torch.arange(longest, device=query.device) < size[:, None]
    return out.transpose(1, 2)[valid].transpose(0, 1)[None]
