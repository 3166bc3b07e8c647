"""How a model family is called on a packed stream. The only file that knows.

A packed stream holds many sequences in one row. What keeps them apart is `cu_seqlens`: the
attention registered here under the name "cppo_varlen" attends within each sequence and needs no
mask at all, so the same model also serves padded batches and `generate` (where it is plain sdpa).
Rules that hold for every family, each one silently wrong when broken: `use_cache=False`,
`attention_mask=None`, positions that restart in each sequence, and for the Qwen-VL families three
rows of rotary positions computed from the image grid.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.records import PackedBatch

ATTENTION_NAME = "cppo_varlen"
VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class ImageBatch:
    """Processor-ready images of a list of questions, in their order.

    Args:
        pixel_values: (P, C) patches of all images, one image after the other.
        image_grid_thw: (I, 3) int64, patches of each image along time, height and width.
        per_question: number of images of each question; sums to I.
    """

    pixel_values: Tensor
    image_grid_thw: Tensor
    per_question: tuple[int, ...]

    def of(self, questions: Sequence[int]) -> ImageBatch:
        """The images of some questions, in the order given."""
        image_ids = [i for q in questions for i in self.image_ids(q)]
        sizes = self.image_grid_thw.prod(1).tolist()
        patches = self.pixel_values.split(sizes)
        pixel_values = (
            torch.cat([patches[i] for i in image_ids]) if image_ids else self.pixel_values[:0]
        )
        counts = tuple(self.per_question[q] for q in questions)
        return ImageBatch(pixel_values, self.image_grid_thw[image_ids], counts)

    def image_ids(self, question: int) -> range:
        """Indices of the images of one question."""
        first = sum(self.per_question[:question])
        return range(first, first + self.per_question[question])


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None, gqa: bool
) -> Tensor:
    """Causal attention per sequence; short sequences side by side, uneven ones one by one."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)

    total, longest = sum(lengths), max(lengths)
    if len(lengths) * longest > 2 * total:
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attend(*part) for part in parts], dim=2)
    # One call for all: right padding is harmless, a causal row never looks to its right.
    device = query.device
    size = torch.tensor(lengths, device=device)
    column = torch.arange(longest, device=device)
    valid = column < size[:, None]
    source = (size.cumsum(0) - size)[:, None] + column.minimum(size[:, None] - 1).clamp(min=0)

    def pad(x: Tensor) -> Tensor:
        return x[0][:, source].transpose(0, 1)

    out = attend(pad(query), pad(key), pad(value))
    return out.transpose(1, 2)[valid].transpose(0, 1)[None]


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """For transformers' `AttentionInterface`: (1, heads, S, d) each, split at cu_seqlens."""
    gqa = query.shape[1] != key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None and causal:
        lengths = [n for n in cu_seq_lens_q.diff().tolist() if n]
        window = kwargs.get("sliding_window")
        if window is not None and max(lengths) > window:
            raise ValueError(
                f"cppo: a sequence of {max(lengths)} tokens is longer than the model's sliding "
                f"window of {window}, which the packed attention does not have"
            )
        out = _padded_attention(query, key, value, lengths, scaling, gqa)
    else:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=scaling,
            dropout_p=dropout if module.training else 0.0,
            is_causal=causal and attention_mask is None and query.shape[2] > 1,
            enable_gqa=gqa,
        )
    return out.transpose(1, 2).contiguous(), None


def choose_attention(attention: str, device: torch.device | str) -> str:
    """The attention that the packed forward uses: "flash_attention_2" or "sdpa".

    Raises: RuntimeError if "flash_attention_2" is asked for and cannot run here.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    on_gpu = torch.device(device).type == "cuda"
    if attention == "auto":
        return "flash_attention_2" if has_flash and on_gpu else "sdpa"
    if attention == "flash_attention_2" and not (has_flash and on_gpu):
        reason = "flash-attn is not installed" if not has_flash else f"the model is on {device}"
        raise RuntimeError(f"cppo: attention 'flash_attention_2' cannot run here: {reason}")
    return attention


def set_attention(model: nn.Module, attention: str) -> None:
    """Gives `model` the packed attention, in place; `attention` as in `choose_attention`.

    The vision tower keeps sdpa (it has its own cu_seqlens).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _varlen_attention)
    # Without a mask function a padded batch would silently lose its mask.
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    name = "flash_attention_2" if attention == "flash_attention_2" else ATTENTION_NAME
    base = unwrap(model)
    vision_attention = "sdpa" if name == ATTENTION_NAME else name
    if has_vision(base):
        base.set_attn_implementation({"text_config": name, "vision_config": vision_attention})
    else:
        base.set_attn_implementation(name)


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_vision(model: nn.Module) -> bool:
    """Whether the model takes images."""
    return getattr(unwrap(model).config, "vision_config", None) is not None


def check_supported(model: nn.Module) -> None:
    """Raises ValueError for a model that the packed forward would run wrongly."""
    base = unwrap(model)
    if not (hasattr(base, "config") and hasattr(base, "model") and base.get_output_embeddings()):
        raise ValueError(
            "cppo: model must be a causal language model with an LM head, "
            f"got {type(base).__name__}"
        )
    config = base.config
    text_config = config.get_text_config()
    if has_vision(base) and config.model_type not in VISION_FAMILIES:
        raise ValueError(
            "cppo: vision-language model must be of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family, "
            f"got model_type {config.model_type!r}"
        )
    layers = set(getattr(text_config, "layer_types", None) or ())
    # Recurrent layers carry their state from one packed sequence into the next.
    if not base._supports_attention_backend or layers - {"full_attention", "sliding_attention"}:
        raise ValueError(
            "cppo: model must have nothing but attention that can be packed, "
            f"got {config.model_type!r}" + (f" with layers {sorted(layers)}" if layers else "")
        )
    for name in (
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "logit_scale",
        "logits_scaling",
    ):
        if getattr(text_config, name, None) not in (None, 1):
            raise ValueError(
                f"cppo: models with {name} are not supported yet, "
                f"got {config.model_type!r} with {name} = {getattr(text_config, name)}"
            )


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision encoder of a Qwen-VL model."""
    return unwrap(model).model.visual


def rotary_positions(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None
) -> Tensor | None:
    """(3, B, L) rotary positions of padded prompts with images; None for a text model."""
    if not has_vision(model):
        return None
    base = unwrap(model)
    positions, _ = base.model.get_rope_index(
        input_ids,
        mm_token_type_ids=image_token_mask(model, input_ids).int(),
        image_grid_thw=image_grid_thw,
        attention_mask=attention_mask,
    )
    return positions


def image_token_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Where the placeholders of image patches stand: bool like `input_ids`."""
    return input_ids == unwrap(model).config.image_token_id


def image_arguments(base: Any, images: ImageBatch | None, shown: Sequence[int]) -> dict[str, Any]:
    """What the model is called with for its images; sequence k sees those of question `shown[k]`.

    Each image is encoded once, however many sequences look at it.
    """
    if images is None or len(images.image_grid_thw) == 0:
        return {}
    order = [i for question in shown for i in images.image_ids(question)]
    features = base.model.get_image_features(
        images.pixel_values, images.image_grid_thw, return_dict=True
    )
    fields = {"pooler_output": [features.pooler_output[i] for i in order]}
    if getattr(features, "deepstack_features", None) is not None:
        fields["deepstack_features"] = [
            [layer[i] for i in order] for layer in features.deepstack_features
        ]
    return {"mm_encoder_outputs": {"image": type(features)(**fields)}}


def packed_hidden(
    model: nn.Module,
    batch: PackedBatch,
    positions: Tensor | None = None,
    images: ImageBatch | None = None,
    image_of: Sequence[int] = (),
) -> Tensor:
    """Last hidden states at the rows that predict a response token: (T, D), gradients flow.

    Args:
        model: a transformers model (or peft model) with the attention of `set_attention`.
        batch: the packed stream.
        positions: (3, S) rotary positions of a vision-language model; None: batch.position_ids.
        images: the images of some questions; None: the stream has none.
        image_of: for each completion of the stream its question, as an index into `images`.
    """
    base = unwrap(model)
    is_flash = base.config.get_text_config()._attn_implementation == "flash_attention_2"
    position_ids = batch.position_ids[None]
    if positions is not None:
        # transformers' flash attention reads the sequence boundaries off a leading text row.
        rows = [batch.position_ids[None], positions] if is_flash else [positions]
        position_ids = torch.cat(rows)[:, None]
    output = base.model(
        input_ids=batch.input_ids[None],
        attention_mask=None,
        position_ids=position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        **image_arguments(base, images, image_of),
    )
    return output.last_hidden_state[0, batch.rows]


def lm_head(
    model: nn.Module, suppressed: Sequence[int] = (), dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the LM head, differentiable, adapters included.

    Tokens in `suppressed` are never sampled: their bias is -inf, so that log-probabilities are
    those of the distribution that was sampled from.
    """
    head = unwrap(model).get_output_embeddings()
    if hasattr(head, "get_delta_weight"):
        weight, bias = head.base_layer.weight, head.base_layer.bias
        if not head.disable_adapters:
            for adapter in head.active_adapters:
                weight = weight + head.get_delta_weight(adapter)
    else:
        weight, bias = head.weight, head.bias
    if len(suppressed):
        offset = weight.new_zeros(weight.shape[0])
        offset[list(suppressed)] = -torch.inf
        bias = offset if bias is None else bias + offset
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias
