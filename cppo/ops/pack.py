"""From a padded batch to a padding-free stream, and how to cut and share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cppo import backends
from cppo.fused.pack import Lengths
from cppo.ops.checks import (
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    may_read,
)
from cppo.ops.packed_batch import PackedBatch


def _check_kept(op: str, kept: Tensor, num_completions: int) -> None:
    check_tensor(op, "kept", kept, "integer")
    if kept.dtype != torch.int64 or kept.ndim != 1:
        raise ValueError(
            f"cppo.{op}: kept must be (K,) int64, got {tuple(kept.shape)} {kept.dtype}"
        )
    if not may_read(kept):
        return
    seen: set[int] = set()
    for index, row in enumerate(kept.tolist()):
        if not 0 <= row < num_completions:
            raise ValueError(
                f"cppo.{op}: kept must be in [0, B) = [0, {num_completions}), got {row} "
                f"at index {index}"
            )
        if row in seen:
            raise ValueError(f"cppo.{op}: kept must be unique, got {row} more than once")
        seen.add(row)


def _check_lengths(op: str, lengths: Lengths, packed: PackedBatch) -> None:
    names = ("tokens", "response tokens")
    bounds = (packed.cu_seqlens, packed.row_cu_seqlens)
    for name, own, cumulative in zip(names, lengths, bounds, strict=True):
        actual = cumulative.diff().tolist()
        if list(own) != actual:
            raise ValueError(
                f"cppo.{op}: lengths must be those of the masks, {name} of the kept completions "
                f"{actual[:8]}, got {list(own)[:8]}"
            )


def pack_completions(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    kept: Tensor | None = None,
    *,
    per_token: Mapping[str, Tensor] | None = None,
    lengths: Lengths | None = None,
    backend: str = "auto",
) -> PackedBatch:
    """The kept completions with their prompts as one stream without padding.

    Specification: `cppo.reference.pack_completions`; the stream has the form of flash-attn's
    varlen functions.

    Args:
        input_ids: (B, L) int32 or int64, prompt and response; padded left, right or both.
        attention_mask: (B, L) 1 or True where a token is attended.
        completion_mask: (B, L) 1 or True at response tokens. A token outside `attention_mask` is
            not a response, whatever stands here.
        kept: (K,) int64 rows that stay, unique, in the order wanted. None: all.
        per_token: {name: (B, L)} tensors aligned with input_ids that are taken along at the
            response tokens; gradients flow.
        lengths: (tokens, response tokens) of every kept completion, two lists of K integers, where
            the host knows them: then nothing waits for the GPU. None: found out from the masks.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: a `PackedBatch` on the device of input_ids.
    Raises:
        ValueError: shapes or devices that disagree; kept not int64, out of range or repeated; a
            response without a token before it, naming the completion; lengths that are not those
            of the masks (kept and lengths on a GPU are checked only with CPPO_DEBUG=1).
        TypeError: a tensor of the wrong dtype, per_token that is no mapping.
        RuntimeError: `backend` cannot run here.
    """
    op = "pack_completions"
    check_tensor(op, "input_ids", input_ids, "integer")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cppo.{op}: input_ids must be int32 or int64, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"cppo.{op}: input_ids must be (B, L), got {tuple(input_ids.shape)}")
    if per_token is not None and not isinstance(per_token, Mapping):
        kind = type(per_token).__name__
        raise TypeError(f"cppo.{op}: per_token must be a mapping of names to tensors, got {kind}")
    aligned = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    aligned.update({f"per_token[{name!r}]": value for name, value in (per_token or {}).items()})
    for name, tensor in aligned.items():
        check_tensor(op, name, tensor, "real")
        check_shape(op, name, tensor, "(B, L)", input_ids.shape, "input_ids")
    check_same_device(op, input_ids=input_ids, **aligned, kept=kept)
    num_completions, length = input_ids.shape
    if kept is None:
        kept = torch.arange(num_completions, device=input_ids.device)
    _check_kept(op, kept, num_completions)
    if lengths is not None and [len(own) for own in lengths] != [len(kept)] * 2:
        raise ValueError(
            f"cppo.{op}: lengths must be two lists of K = {len(kept)} integers, got lists of "
            f"{[len(own) for own in lengths]}"
        )

    known = None if may_read(attention_mask, completion_mask, kept) else lengths
    names, tensors = list(per_token or {}), list((per_token or {}).values())
    packed = backends.pick(op, input_ids, backend).pack_completions(
        input_ids, attention_mask, completion_mask, kept, tensors, known
    )
    ids, position_ids, cu_seqlens, rows, targets, row_cu_seqlens, tokens, at_targets = packed[:8]
    gathered, longest, orphan = packed[8:]
    # While torch.compile traces, the number is a symbol that no branch may look at.
    if not torch.compiler.is_compiling() and orphan >= 0:
        raise ValueError(
            f"cppo.{op}: completion_mask marks the first attended token of completion "
            f"{int(kept[orphan])}; a response needs at least one prompt token before it"
        )
    batch = PackedBatch(
        input_ids=ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        kept=kept,
        rows=rows,
        targets=targets,
        row_cu_seqlens=row_cu_seqlens,
        token_index=tokens,
        target_index=at_targets,
        shape=(num_completions, length),
        per_token=dict(zip(names, gathered, strict=True)),
    )
    if lengths is not None and known is None:
        _check_lengths(op, lengths, batch)
    return batch


def _checked_lengths(op: str, lengths: Sequence[int] | Tensor) -> list[int]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    for index, value in enumerate(values):
        check_integer(op, f"lengths[{index}]", value, at_least=0)
    return [int(value) for value in values]


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups completions into micro-batches of at most `max_tokens` tokens.

    Specification: `cppo.reference.plan_microbatches` (first-fit decreasing).

    Args:
        lengths: tokens of each completion, integers >= 0 (a list or a 1-D tensor).
        max_tokens: tokens that fit into one micro-batch, >= 1.
    Returns: lists of indices, each ascending; every index is in exactly one of them, and they
        are ordered by their first index.
    Raises:
        ValueError: a length that is negative or alone longer than max_tokens; max_tokens < 1.
        TypeError: lengths or max_tokens that are not integers.
    """
    op = "plan_microbatches"
    values = _checked_lengths(op, lengths)
    check_integer(op, "max_tokens", max_tokens, at_least=1)
    for index, value in enumerate(values):
        if value > max_tokens:
            raise ValueError(
                f"cppo.{op}: lengths[{index}] must be <= max_tokens = {max_tokens}, got {value}"
            )
    return backends.pick(op, None, "auto").plan_microbatches(values, int(max_tokens))


def balance_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Shares completions among ranks: equal counts (+-1), token totals close to each other.

    Specification: `cppo.reference.balance_ranks` (longest first, to the rank with the fewest
    tokens that may still take one).

    Args:
        lengths: tokens of each completion, integers >= 0 (a list or a 1-D tensor).
        world_size: number of ranks, >= 1.
    Returns: world_size lists of indices, each ascending; every index is in exactly one.
    Raises:
        ValueError: a negative length, world_size < 1.
        TypeError: lengths or world_size that are not integers.
    """
    op = "balance_ranks"
    values = _checked_lengths(op, lengths)
    check_integer(op, "world_size", world_size, at_least=1)
    return backends.pick(op, None, "auto").balance_ranks(values, int(world_size))
