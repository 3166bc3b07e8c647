"""How a model family is called on a packed stream.

A packed stream holds many sequences in one row. What keeps them apart is `cu_seqlens`: the
attention of cppo.model.attention attends within each sequence and needs no mask at all, so the same
model also serves padded batches and `generate` (where it is plain sdpa).
Rules that hold for every family, each one wrong when broken: `use_cache=False`, positions that
restart in each sequence, and for the families that have three rows of rotary positions those of the
image grid. That the model then computes what it computes by itself is not taken for granted:
`cppo.model.check` compares the two when a model is first met.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.fused.head import Head
from cppo.model.attention import (
    NAMES,
    Layers,
    choose_attention,
    head_sizes,
    no_mask,
    register,
)
from cppo.model.images import ImageBatch, image_arguments
from cppo.model.left_as_found import model_configs
from cppo.model.shared_prompts import SharedStream
from cppo.model.stream_sdpa import Runs
from cppo.model.wrappers import has_vision, unwrap
from cppo.ops.packed_batch import PackedBatch

__all__ = ["choose_attention", "set_attention"]


def set_attention(model: nn.Module, name: str, device: torch.device | None = None) -> None:
    """Gives a model the attention of packed sequences, in place.

    Specification: every token attends to its own sequence of a packed stream, up to itself, within
    the layer's sliding window if it has one. Padded batches and `generate` work as before, by
    PyTorch's scaled dot-product attention. Attention weights of a packed stream are never dropped
    out. A vision tower keeps sdpa (it has its own bounds), or flash-attn's kernel.
    Args:
        model: a transformers causal model, or a peft model around one.
        name: "flash_attention_2" (CUDA, flash-attn installed), "varlen" (CUDA, PyTorch's own),
            "sdpa" (anywhere), or "auto": the first of them that runs on the device.
        device: where the model will run. None: where it is.
    Returns: None.
    Raises: ValueError if the model does not let its attention be chosen, for another name, and for
        an attention that cannot run here.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(
            f"cppo.set_attention: name must be one of {['auto', *NAMES]}, got {name!r}"
        )
    base = unwrap(model)
    if not hasattr(base, "set_attn_implementation"):
        raise ValueError(
            f"cppo.set_attention: model must be a model of transformers, got {type(base).__name__}"
        )
    device = next(base.parameters()).device if device is None else device
    attention = choose_attention(name, device, "cppo.set_attention: name", layers_of(base))
    registered = register(attention)
    if has_vision(base):
        vision = attention if attention == "flash_attention_2" else "sdpa"
        base.set_attn_implementation({"text_config": registered, "vision_config": vision})
    else:
        base.set_attn_implementation(registered)
    if not is_packed(base):
        raise ValueError(
            "cppo.set_attention: model must let its attention be chosen (transformers' "
            f"AttentionInterface), got model_type {base.config.model_type!r}"
        )


class Attention(NamedTuple):
    """The attention of a model's configs, so that it can be put back."""

    configs: list[Any]
    names: list[Any]

    @classmethod
    def of(cls, base: Any) -> Attention:
        configs = model_configs(base)
        return cls(configs, [config._attn_implementation_internal for config in configs])

    def restore(self) -> None:
        for config, name in zip(self.configs, self.names, strict=True):
            config._attn_implementation_internal = name


def layers_of(model: nn.Module, dtype: torch.dtype | None = None) -> Layers:
    """What the choice of a kernel must know of a model that computes its attention in `dtype`."""
    return Layers(head_sizes(unwrap(model).config.get_text_config()), dtype)


def is_packed(base: Any) -> bool:
    """Whether the model has one of the attentions of `set_attention`."""
    config = getattr(base, "config", None)
    return config is not None and config.get_text_config()._attn_implementation in NAMES.values()


def check_supported(model: nn.Module) -> None:
    """Raises ValueError for a model that there is no way of calling on a packed stream.

    Whether the packed forward is right for it, `cppo.model.check` finds out.
    """
    base = unwrap(model)
    if _is_encoder_decoder(getattr(base, "config", None)):
        raise ValueError(
            "cppo: model must be a causal language model, got the encoder-decoder family of "
            f"{type(base).__name__} (model_type {base.config.model_type!r})"
        )
    if not (hasattr(base, "config") and hasattr(base, "model") and base.get_output_embeddings()):
        raise ValueError(
            "cppo: model must be a causal language model of transformers with its body in `model` "
            f"and an LM head, got {type(base).__name__}"
        )


def _is_encoder_decoder(config: Any) -> bool:
    """Whether a model's family is one of encoders with decoders; its decoder alone has the layers
    of both."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return getattr(config, "is_encoder_decoder", False) or (
        type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )


def cache_argument(base: Any, cache: Any) -> dict[str, Any]:
    """A cache, under the name that the body of the model has for it (it changed within 5.x)."""
    names = inspect.signature(base.model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


class Stream(NamedTuple):
    """What a model is run on: a packed stream and what belongs to it, as `cppo.packed_hidden`
    has them."""

    batch: PackedBatch
    positions: Tensor | None = None
    images: ImageBatch | None = None
    image_of: Sequence[int] = ()
    shared: SharedStream | None = None

    @property
    def has_images(self) -> bool:
        """Whether some completion has an image."""
        images = self.images
        return images is not None and any(images.per_question[one] for one in self.image_of)


def run_packed(model: nn.Module, stream: Stream) -> Tensor:
    """`cppo.packed_hidden` of a model that has been checked."""
    base = unwrap(model)
    image_of, shared = stream.image_of, stream.shared
    if shared is not None and len(image_of):
        image_of = [image_of[k] for k in shared.first]
    arguments, rows = stream_arguments(stream.batch, stream.positions, shared)
    output = base.model(**arguments, **image_arguments(base, stream.images, image_of))
    return output.last_hidden_state[0, rows]


def stream_arguments(
    batch: PackedBatch, positions: Tensor | None = None, shared: SharedStream | None = None
) -> tuple[dict[str, Any], Tensor]:
    """What a model is called with for a stream, but for its images.

    Returns: the arguments, and (T,) the places in the stream whose next token is a target.
    """
    position_ids = batch.position_ids[None] if positions is None else positions
    input_ids, rows = batch.input_ids, batch.rows
    if shared is not None:
        position_ids = position_ids[:, shared.token_index]
        input_ids, rows = input_ids[shared.token_index], shared.rows
    arguments = {
        "input_ids": input_ids[None],
        "attention_mask": no_mask(input_ids.device),
        "position_ids": position_ids if positions is None else position_ids[:, None],
        "use_cache": False,
        **_bounds(batch if shared is None else shared),
    }
    return arguments, rows


def _bounds(stream: PackedBatch | SharedStream) -> dict[str, Any]:
    """What the attention is told about a stream."""
    own = {"cu_seq_lens_q": stream.cu_seqlens, "max_length_q": stream.max_seqlen}
    if isinstance(stream, PackedBatch):
        keys = {"cu_seq_lens_k": stream.cu_seqlens, "max_length_k": stream.max_seqlen}
        return {**own, **keys, "runs": Runs(stream.cu_seqlens, stream.cu_seqlens)}
    keys = {"cu_seq_lens_k": stream.cu_key_seqlens, "max_length_k": stream.max_key_seqlen}
    runs = Runs(stream.cu_seqlens, stream.cu_key_seqlens)
    return {**own, **keys, "key_index": stream.key_index, "runs": runs}


class LMHead(NamedTuple):
    """A model's LM head, its fields named like the arguments of the ops on hidden states.

    weight: (V, D). bias: (V,) or None. suppressed: (K,) int64, the tokens that are never sampled,
    or None. logit_scale, softcap: of `cppo.linear_token_stats`.
    """

    weight: Tensor
    bias: Tensor | None
    suppressed: Tensor | None
    logit_scale: float
    softcap: float | None

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) logits of (..., D) hidden states, as the ops compute them: fp32, no gradient."""
        softcap = None if self.softcap is None else self.softcap / self.logit_scale
        head = Head(self.weight, self.bias, self.suppressed, softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head.logits(hidden.reshape(-1, hidden.shape[-1]))
        return logits.mul_(self.logit_scale).view(*hidden.shape[:-1], -1)


def lm_head(
    model: nn.Module, suppressed: Sequence[int] = (), dtype: torch.dtype | None = None
) -> LMHead:
    """The LM head, differentiable, adapters included.

    Tokens in `suppressed` are never sampled: their logits are -inf, so that log-probabilities are
    those of the distribution that was sampled from.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    weight, bias = _affine(base.get_output_embeddings(), config.hidden_size)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    never = _on_device(suppressed, weight.device) if len(suppressed) else None
    return LMHead(weight, bias, never, _logit_scale(config), _softcap(config))


def _on_device(ids: Sequence[int], device: torch.device) -> Tensor:
    """(K,) int64. A copy from pinned memory lets the host go on."""
    there = torch.tensor(list(ids), dtype=torch.int64, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


def _affine(head: Any, size: int) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of an LM head, whatever it is made of.

    Adapters, copies of the head and retrained tokens are read off what the head computes, not off
    their parts: it is applied to the D unit vectors. That costs as much as D tokens; a bare linear
    layer costs nothing.
    """
    while hasattr(head, "base_layer") and head.disable_adapters and not head.merged:
        head = head.base_layer
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        return head.weight, head.bias
    like = next((p for p in head.parameters() if p.is_floating_point()), torch.empty(0))
    # A power of two that keeps a bias from eating digits of the weight.
    size = getattr(head, "in_features", size)
    units = 256 * torch.eye(size, dtype=like.dtype, device=like.device)
    with torch.autocast(like.device.type, enabled=False):
        output = head(F.pad(units, (0, 0, 0, 1)))
    return (output[:-1] - output[-1]).T / 256, output[-1]


def _logit_scale(config: Any) -> float:
    """What a family multiplies its logits by."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if getattr(config, name, None):
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # Granite divides by it.
    return scaling if config.model_type.startswith("hyperclovax") else 1 / scaling


def _softcap(config: Any) -> float | None:
    """The c of c * tanh(logits / c), or None."""
    names = ("final_logit_softcapping", "logits_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)
