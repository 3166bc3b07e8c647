"""`cppo.packed_hidden`: the forward of a packed stream, by a model that is checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cppo.model.check import Shown, check_model
from cppo.model.forward import Stream, is_packed, run_packed
from cppo.model.images import ImageBatch
from cppo.model.shared_prompts import SharedStream
from cppo.model.wrappers import unwrap
from cppo.ops.packed_batch import PackedBatch


def packed_hidden(
    model: nn.Module,
    batch: PackedBatch,
    positions: Tensor | None = None,
    images: ImageBatch | None = None,
    image_of: Sequence[int] = (),
    shared: SharedStream | None = None,
) -> Tensor:
    """Last hidden states at the rows of a packed stream that predict a response token.

    Specification: row for row those of the model on each sequence by itself, in its mode
    (`train`, `eval`), precision and with its adapters; gradients flow. The first call with a model
    compares the two on a dozen tokens, the first with images on one of their questions, too
    (`cppo.model.check`); later calls do not.
    Args:
        model: a transformers causal model, or a peft model around one, with the attention of
            `cppo.set_attention`.
        batch: the packed stream of `cppo.pack_completions`, on the model's device.
        positions: (3, S) rotary positions of a vision-language model; None: batch.position_ids.
        images: the images of some questions; None: the stream has none.
        image_of: for each completion of the stream its question, as an index into `images`.
        shared: `cppo.model.shared_prompts.share_prompts` of the batch; None: every completion
            has its prompt to itself.
    Returns: (T, D) in the dtype of the model's last norm; (0, D) for a batch of nothing, as pruning
        may leave where all rewards are equal.
    Raises: ValueError if the model lacks the attention of `cppo.set_attention`, or computes
        something else on packed sequences than on each of them alone; TypeError for another batch.
    """
    if not isinstance(batch, PackedBatch):
        raise TypeError(
            "cppo.packed_hidden: batch must be the PackedBatch of cppo.pack_completions, "
            f"got {type(batch).__name__}"
        )
    if not is_packed(unwrap(model)):
        raise ValueError(
            "cppo.packed_hidden: model must have the attention of packed sequences: call "
            'cppo.set_attention(model, "auto") once before the first packed forward'
        )
    stream = Stream(batch, positions, images, image_of, shared)
    if not torch.compiler.is_compiling():
        shown = shown_in(stream)
        check_model(model, shares=shared is not None, longest=batch.max_seqlen, shown=shown)
        if not len(batch.input_ids):
            # No layer takes a stream without tokens. Their loss is 0, and may be differentiated.
            like = unwrap(model).get_input_embeddings().weight
            size = unwrap(model).config.get_text_config().hidden_size
            return like.new_zeros(0, size, requires_grad=torch.is_grad_enabled())
    return run_packed(model, stream)


def shown_in(stream: Stream) -> Callable[[], Shown] | None:
    """The first question with images of a stream that has some, read off it when it is asked."""
    if stream.images is None or not stream.has_images:
        return None
    return partial(_first_shown, stream.batch, stream.images, stream.image_of)


def _first_shown(batch: PackedBatch, images: ImageBatch, image_of: Sequence[int]) -> Shown:
    answers = batch.row_cu_seqlens.diff().tolist()
    number = next(
        k for k, question in enumerate(image_of) if images.per_question[question] and answers[k]
    )
    start = int(batch.cu_seqlens[number])
    end = int(batch.rows[batch.row_cu_seqlens[number]]) + 1
    return Shown(batch.input_ids[start:end], images.of([image_of[number]]))
