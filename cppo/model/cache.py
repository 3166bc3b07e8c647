"""The keys and values of a decoding loop: allocated once, written in place.

transformers' own cache copies itself for every token. Here each layer gets room for all tokens to
come once the prompts have been run, in the dtype that the attention computes in; completions have
the keys and values of their prompt by repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def prompt_cache(base: Any) -> DynamicCache:
    """An empty cache, to run prompts with."""
    return DynamicCache(config=base.config.get_text_config())


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether `completion_cache` takes the cache of prompts in parts."""
    # A layer that shares another's keys has a placeholder (transformers 5.24).
    return all(
        type(layer) in _IN_PLACE or type(layer).__name__ == "DummyLayer" for layer in cache.layers
    )


def completion_cache(parts: Sequence[DynamicCache], repeats: int, room: int) -> DynamicCache:
    """The cache of `repeats` completions of each prompt, with room for `room` tokens.

    Args:
        parts: prompts of one padded batch, run in parts; more than one only if they can be joined.
            They are used up.
    """
    whole = parts[0]
    layer: Any
    for number, layer in enumerate(whole.layers):
        if type(layer) not in _IN_PLACE:
            if repeats > 1:
                _repeat(layer, repeats)
        elif layer.is_initialized:  # one that shares another's keys is not
            ours = _IN_PLACE[type(layer)](**_window(layer))
            ours.hold([part.layers[number] for part in parts], repeats, room)
            for part in parts:
                part.layers[number] = ours
    return whole


def select_rows(cache: DynamicCache, indices: Tensor) -> None:
    """Keeps some rows of a cache, in place."""
    for layer in cache.layers:
        _selects(layer)(indices)


def _repeat(layer: Any, repeats: int) -> None:
    if hasattr(layer, "batch_repeat_interleave"):
        layer.batch_repeat_interleave(repeats)
    elif (state := _state(layer)) is not None:
        index = torch.arange(len(state), device=state.device).repeat_interleave(repeats)
        layer.reorder_cache(index)


def _selects(layer: Any) -> Any:
    """What selects rows of a layer; one with the state of a recurrence has another name for it."""
    return getattr(layer, "batch_select_indices", layer.reorder_cache)


def _state(layer: Any) -> Tensor | None:
    """A state of a layer that has no keys and values; None before the first token."""
    stored = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return next((state for state in stored if state is not None), None)


class _InPlace:
    """A layer's keys and values: what is seen of them is a view of the room that they have."""

    keys: Tensor
    values: Tensor
    sliding_window: int | None = None

    def hold(self, parts: Sequence[Any], repeats: int, room: int) -> None:
        """Takes over what the layers of the prompts' caches know."""
        self._keys = _with_room([part.keys for part in parts], repeats, room)
        self._values = _with_room([part.values for part in parts], repeats, room)
        self._rows, self._end = len(self._keys), parts[0].keys.shape[-2]
        self.cumulative_length: int = parts[0].get_seq_length()
        self.is_initialized = True
        self._show(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns the keys and values that they may see, their own included."""
        count = key_states.shape[-2]
        place = slice(self._end, self._end + count)
        self._keys[: self._rows, :, place] = key_states
        self._values[: self._rows, :, place] = value_states
        self._end += count
        self.cumulative_length += count
        self._show(count)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._rows = len(indices)
        for room in (self._keys, self._values):
            kept = room[..., : self._end, :].index_select(0, indices)
            room[: self._rows, :, : self._end] = kept
        self._show(1)

    def _show(self, count: int) -> None:
        # A window moves on; what is before it stays where it is.
        first = max(0, self._end - count - self.sliding_window + 1) if self.sliding_window else 0
        self.keys = self._keys[: self._rows, :, first : self._end]
        self.values = self._values[: self._rows, :, first : self._end]


class _Full(_InPlace, DynamicLayer):  # type: ignore[misc]
    pass


class _Sliding(_InPlace, DynamicSlidingWindowLayer):  # type: ignore[misc]
    pass


_IN_PLACE: dict[type, Any] = {DynamicLayer: _Full, DynamicSlidingWindowLayer: _Sliding}


def _window(layer: Any) -> dict[str, int]:
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    return {"sliding_window": layer.sliding_window} if sliding else {}


def _with_room(parts: Sequence[Tensor], repeats: int, room: int) -> Tensor:
    """(sum of rows x repeats, heads, L + room, d) of (rows, heads, L, d) each."""
    kind, dtype = parts[0].device.type, parts[0].dtype
    # Under autocast keys are fp32 after their rotation, and the attention casts them.
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    counts = [len(part) * repeats for part in parts]
    _, heads, length, size = parts[0].shape
    whole = parts[0].new_empty(sum(counts), heads, length + room, size, dtype=dtype)
    for rows, part in zip(whole.split(counts), parts, strict=True):
        rows[:, :, :length].unflatten(0, (len(part), repeats)).copy_(part[:, None])
    return whole
