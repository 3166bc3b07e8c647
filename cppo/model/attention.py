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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.model.stream_sdpa import Runs, stream_sdpa

# Names inside transformers. "flash" in a name would make it build masks for its own kernels, "sdpa"
# would make it ask a flag of the model's class.
NAMES = {"sdpa": "cppo_plain", "varlen": "cppo_varlen", "flash_attention_2": "cppo_fa2"}
_HALF = (torch.float16, torch.bfloat16)
# What layers tell their attention that changes nothing, or that is computed here.
_KNOWN = {
    *("dropout", "scaling", "is_causal", "sliding_window", "position_ids", "cache_position"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_index", "runs"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "num_items_in_batch", "token_type_ids", "mm_token_type_ids"),
    *("position_embeddings", "cache", "past_key_values", "deterministic", "logits_to_keep"),
}
_MEANINGS = {"s_aux": "attention sinks", "softcap": "attn_logit_softcapping"}


class Bounds(NamedTuple):
    """Where the N sequences of a stream start and end, as the varlen kernels take it.

    Fields:
        cu_query, cu_key: (N+1,) int32.
        longest_query, longest_key: tokens of the longest sequence.
    """

    cu_query: Tensor
    cu_key: Tensor
    longest_query: int
    longest_key: int


class Layers(NamedTuple):
    """What the choice of a kernel must know of a model.

    Fields:
        head_sizes: (of queries and keys, of values), the largest.
        dtype: what the attention computes in; None: not known yet, it may be half precision.
    """

    head_sizes: tuple[int, int]
    dtype: torch.dtype | None = None


def head_sizes(config: Any) -> tuple[int, int]:
    """Numbers of a query's or key's head, and of a value's: the largest of a text config."""
    own = vars(config)

    def value(name: str) -> int:
        # Some families have another name for it.
        return own.get(name) or own.get(getattr(config, "attribute_map", {}).get(name, name)) or 0

    even = value("hidden_size") // max(1, value("num_attention_heads"))
    size = value("head_dim") or even
    if own.get("qk_nope_head_dim"):  # latent attention
        size = own["qk_nope_head_dim"] + own["qk_rope_head_dim"]
    size = max(size, own.get("global_head_dim") or 0)
    return size, own.get("v_head_dim") or size


def why_not(attention: str, device: torch.device | str, layers: Layers | None = None) -> str:
    """Why `attention` cannot run on `device`, for a model with such layers; '' when it can."""
    if attention == "sdpa":
        return ""
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if torch.device(device).type != "cuda":
        return f"the model is on {device}"
    if attention == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if attention == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
    return "" if layers is None else _why_not_for(layers)


def _why_not_for(layers: Layers) -> str:
    size, of_values = layers.head_sizes
    if size != of_values:
        return f"the model's keys have {size} numbers a head, its values {of_values}"
    if size > 256 or size % 8:
        return f"heads must have a multiple of 8 numbers up to 256, the model's have {size}"
    if layers.dtype not in (None, *_HALF):
        return f"it needs half precision, the model computes in {layers.dtype}"
    return ""


def choose_attention(
    attention: str,
    device: torch.device | str,
    option: str = "cppo: attention",
    layers: Layers | None = None,
) -> str:
    """The attention that the packed forward uses: "auto" takes the fastest that runs here.

    Raises: ValueError naming the option if another one is asked for and cannot run here.
    """
    if attention == "auto":
        order = ("flash_attention_2", "varlen", "sdpa")
        return next(name for name in order if not why_not(name, device, layers))
    reason = why_not(attention, device, layers)
    if reason:
        able = [name for name in NAMES if not why_not(name, device, layers)]
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
    mask_of = functools.partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(name, mask_of)
    return name


def _mask(make: Callable[..., Tensor | None], *sizes: Any, **options: Any) -> Tensor | None:
    """The mask of a padded batch, by transformers' function for sdpa.

    For one token it is always made: whether it could be left out would be read off the padding,
    and the host would wait for the GPU at every token.
    """
    is_one = options.get("q_length") == 1 or len(options.get("cache_position", ())) == 1
    if is_one and options.get("attention_mask") is not None:
        options["allow_is_causal_skip"] = False
    return make(*sizes, **options)


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
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    cu_query, cu_key = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    _refuse_more(module, options)
    scale = options.get("scaling")
    query, key, value = as_autocast(query, key, value)
    if cu_query is None or not causal:
        is_packed = attention_mask is not None and attention_mask.numel() == 1
        if is_packed and query.shape[2] > 1:
            raise ValueError(
                f"cppo: {type(module).__name__} must attend within each sequence of a packed "
                "stream, but it "
                + ("is not causal" if cu_query is not None else "never gets cu_seq_lens")
            )
        dropout = options.get("dropout", 0.0) if module.training else 0.0
        return _padded(query, key, value, attention_mask, causal, scale, dropout), None
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError(
            f"cppo: {type(module).__name__} must attend to all of a sequence before a token, but "
            f"it has a mask of its own of shape {tuple(attention_mask.shape)}"
        )
    cu_key = cu_query if cu_key is None else cu_key
    if (key_index := options.get("key_index")) is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    window = options.get("sliding_window") or None
    if window is not None and options["max_length_k"] <= window:
        window = None
    if kernel is not None and query.dtype in _HALF:
        bounds = Bounds(cu_query, cu_key, options["max_length_q"], options["max_length_k"])
        streams = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernel(*streams, bounds, scale, window)[None], None
    runs = options.get("runs") or Runs(cu_query, cu_key)
    out = stream_sdpa(query, key, value, runs, scale, window)
    return out.transpose(1, 2).contiguous(), None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype of autocast, if it is on: fp32 rotary positions make queries and keys
    fp32, and no kernel of this file is one that autocast knows."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """(B, S, heads, d) of a padded batch, by sdpa: queries (B, heads, S, d), keys with a cache."""
    batch, heads, length, _ = query.shape
    groups, options = heads // key.shape[1], {}
    is_folded = length == 1 and groups > 1 and (mask is None or mask.shape[1] == 1)
    if is_folded:
        # One token's heads of a group see the same keys: to the kernel they are a few tokens.
        query = query.reshape(batch, key.shape[1], groups, -1)
    elif groups > 1 and mask is not None and query.is_cuda:
        # With a mask no fast kernel of CUDA knows grouped heads.
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    elif groups > 1:
        options["enable_gqa"] = True
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        dropout_p=dropout,
        is_causal=causal and mask is None and length > 1,
        **options,
    )
    if is_folded:
        return out.reshape(batch, 1, heads, -1)
    return out.transpose(1, 2).contiguous()


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
    bounds: Bounds,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(S, heads, d) each, by `torch.nn.attention.varlen`."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": _sides(window)}
    if query.shape[1] != key.shape[1]:
        if _knows_groups(varlen_attn):
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out: Any = varlen_attn(query, key, value, *bounds, **options)
    return out


@functools.cache
def _knows_groups(kernel: Callable[..., Any]) -> bool:
    """torch 2.11 does not know grouped heads here."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(S, heads, d) each, by flash-attn."""
    from flash_attn import flash_attn_varlen_func

    options = {"softmax_scale": scale, "causal": True, "window_size": _sides(window)}
    return flash_attn_varlen_func(query, key, value, *bounds, **options)


def _sides(window: int | None) -> tuple[int, int]:
    """Tokens that the kernels see to the left and to the right of a token; -1: all."""
    return (-1 if window is None else window - 1, 0)


_KERNELS: dict[str, Callable[..., Tensor] | None] = {
    "sdpa": None,
    "varlen": _varlen,
    "flash_attention_2": _flash,
}
