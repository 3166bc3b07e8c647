"""How a model family is called on a packed stream. The only file that knows.

A packed stream holds many sequences in one row. What keeps them apart is `cu_seqlens`: the
attention of cppo.attention attends within each sequence and needs no mask at all, so the same model
also serves padded batches and `generate` (where it is plain sdpa).
Rules that hold for every family, each one silently wrong when broken: `use_cache=False`,
positions that restart in each sequence, and for the Qwen-VL families three rows of rotary positions
computed from the image grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cppo.attention import choose_attention, register
from cppo.records import PackedBatch
from cppo.shared_prompts import SharedStream

__all__ = ["choose_attention", "packed_hidden", "set_attention"]

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


def set_attention(model: nn.Module, attention: str) -> None:
    """Gives `model` the packed attention, in place; `attention` as in `choose_attention`.

    The vision tower keeps sdpa (it has its own cu_seqlens), or flash-attn's kernel by transformers.
    """
    name = register(attention)
    base = unwrap(model)
    if has_vision(base):
        vision = attention if attention == "flash_attention_2" else "sdpa"
        base.set_attn_implementation({"text_config": name, "vision_config": vision})
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
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            "cppo: model must have no attn_logit_softcapping, which packed attention does not "
            f"compute, got {config.model_type!r} with {softcap}"
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
    shared: SharedStream | None = None,
) -> Tensor:
    """Last hidden states at the rows that predict a response token: (T, D), gradients flow.

    Args:
        model: a transformers model (or peft model) with the attention of `set_attention`.
        batch: the packed stream.
        positions: (3, S) rotary positions of a vision-language model; None: batch.position_ids.
        images: the images of some questions; None: the stream has none.
        image_of: for each completion of the stream its question, as an index into `images`.
        shared: `cppo.shared_prompts.share_prompts` of the batch; None: every completion has its
            prompt to itself.
    """
    base = unwrap(model)
    position_ids = batch.position_ids[None] if positions is None else positions
    input_ids, rows, options = batch.input_ids, batch.rows, _bounds(batch)
    if shared is not None:
        position_ids = position_ids[:, shared.token_index]
        input_ids, rows, options = input_ids[shared.token_index], shared.rows, _bounds(shared)
        image_of = [image_of[k] for k in shared.first] if len(image_of) else image_of
    output = base.model(
        input_ids=input_ids[None],
        # Never read, and four-dimensional: otherwise transformers builds an S x S mask.
        attention_mask=input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=position_ids if positions is None else position_ids[:, None],
        use_cache=False,
        **options,
        **image_arguments(base, images, image_of),
    )
    return output.last_hidden_state[0, rows]


def _bounds(stream: PackedBatch | SharedStream) -> dict[str, Any]:
    """What the attention is told about a stream."""
    own = {"cu_seq_lens_q": stream.cu_seqlens, "max_length_q": stream.max_seqlen}
    if isinstance(stream, PackedBatch):
        return {**own, "cu_seq_lens_k": stream.cu_seqlens, "max_length_k": stream.max_seqlen}
    keys = {"cu_seq_lens_k": stream.cu_key_seqlens, "max_length_k": stream.max_key_seqlen}
    return {**own, **keys, "key_index": stream.key_index}


class LMHead(NamedTuple):
    """A model's LM head, its fields named like the arguments of the ops on hidden states.

    weight: (V, D). bias: (V,) or None. logit_scale, softcap: of `cppo.linear_token_stats`.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def lm_head(
    model: nn.Module, suppressed: Sequence[int] = (), dtype: torch.dtype | None = None
) -> LMHead:
    """The LM head, differentiable, adapters included.

    Tokens in `suppressed` are never sampled: their bias is -inf, so that log-probabilities are
    those of the distribution that was sampled from.
    """
    base = unwrap(model)
    head = base.get_output_embeddings()
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
    config = base.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
    return LMHead(weight, bias, scale, getattr(config, "final_logit_softcapping", None))
