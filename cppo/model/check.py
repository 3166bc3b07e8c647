"""Whether a model computes on packed sequences what it computes on each of them alone.

Nothing a model says about itself settles that: layers may drop the bounds of the sequences, carry
a state from one into the next, or add sinks to their attention; a head may scale its logits; an
adapter may act outside the model that it wraps. So when a model is first met, two short sequences
go through everything that training calls, and the logits are compared with the model's own, by its
eager attention, one sequence at a time:

    packed     both in one stream, as in an update
    shared     their common prompt once in the stream, as with share_prompts
    decoded    padded on the left, token by token with a cache, as in a rollout

The arithmetic is fp64 (`cppo.model.double_precision`), so that what differs is not rounding.
Windows are made shorter than the sequences, and adapters are moved away from their start, where
most are zero, so that neither is right by accident. The model is left as it was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cppo.model.double_precision import DoublePrecision
from cppo.model.forward import (
    LMHead,
    cache_argument,
    check_supported,
    has_adapters,
    has_vision,
    lm_head,
    own_modules,
    run_packed,
    unwrap,
    vision_tower,
)
from cppo.model.left_as_found import left_as_found, model_configs
from cppo.model.shared_prompts import share_prompts
from cppo.ops.pack import pack_completions
from cppo.packed_batch import PackedBatch

_T = TypeVar("_T")

# Tokens of the two sequences, which begin alike, and tokens of that beginning.
LENGTHS, PROMPT = (8, 6), 4
WINDOW = 3
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
# Of the largest logit. In fp64 rounding stays below 1e-12 of it: all above is another computation.
# A model that cannot run in fp64 (its weights are quantised or sharded) is compared in its own
# arithmetic, where some hundred roundings of half a unit in the last place add up to ten units.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
TF32 = 0.02  # of fp32 where its products have the digits of fp16


class PositionLimit(NamedTuple):
    """How many tokens a sequence may have, and why no more."""

    tokens: int
    reason: str

    def check(self, longest: int) -> None:
        """Raises ValueError for a sequence of too many tokens."""
        if longest > self.tokens:
            raise ValueError(
                f"cppo: a sequence of {longest} tokens is longer than {self.tokens}: {self.reason}"
            )


class _Facts(NamedTuple):
    """What is known of a model that passed.

    shares: whether prompts were shared as well.
    limit: of its positions; None: there is none.
    """

    shares: bool
    limit: PositionLimit | None


# By model, and by what it is: its wrapper, its head, its active adapters.
_PASSED: WeakKeyDictionary[nn.Module, dict[Any, _Facts]] = WeakKeyDictionary()


def check_model(model: nn.Module, *, shares: bool = False, longest: int = 0) -> None:
    """Raises ValueError for a model that cppo would run wrongly.

    Runs the model four times on a dozen tokens when it is first met, or met with another adapter;
    after that it costs a look-up.

    Args:
        model: a transformers causal model, or a peft model around one, in any mode and precision,
            with the attention of `cppo.set_attention`.
        shares: whether it will be run on prompts that several completions share (one run more).
        longest: tokens of the longest sequence it is about to be run on.
    """
    base = unwrap(model)
    passed = _PASSED.setdefault(base, {})
    key = (type(model), id(base.get_output_embeddings()), _active(model))
    facts = passed.get(key)
    if facts is None or shares > facts.shares:
        check_supported(model)
        _check_adapters(model)
        if not any(p.is_meta for p in base.parameters()):
            _compare(model, shares)
        facts = passed[key] = _Facts(shares, position_limit(model))
    if facts.limit is not None:
        facts.limit.check(longest)


def _active(model: Any) -> Any:
    """The names of the active adapters."""
    active = getattr(model, "active_adapters", None)  # a method where peft wraps nothing
    return None if active is None or callable(active) else tuple(active)


def _check_adapters(model: Any) -> None:
    """Raises for what no comparison of short sequences in eval mode shows."""
    for config in getattr(model, "peft_config", {}).values():
        kind = config.peft_type.value
        if getattr(config, "alora_invocation_tokens", None):
            kind = "an activated LoRA"
        elif not config.is_prompt_learning:
            continue
        raise ValueError(
            "cppo: adapters must act inside the layers of the model, whatever its input is, "
            f"got {kind}"
        )
    head = unwrap(model).get_output_embeddings()
    for name, part in head.named_modules():
        rates = [getattr(part, "p", 0)] if "Dropout" in type(part).__name__ else []
        for attribute, value in vars(part).items():
            if attribute.endswith("dropout") and isinstance(value, dict):
                rates += [rate for rate in value.values() if isinstance(rate, float)]
        if any(rates):
            raise ValueError(
                "cppo: an adapter on the LM head must have no dropout, which the fused losses "
                f"cannot draw, got {max(rates)} ({name or 'head'})"
            )


def position_limit(model: nn.Module) -> PositionLimit | None:
    """The sequences for which a model has positions that do not depend on their neighbours.

    That ends where a table of learned positions ends, and where rotary positions begin to follow
    the longest sequence of the batch. None: it never ends.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    family = f"model_type {base.config.model_type!r}"
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else parameters.values()
    ends = []
    for kind in kinds:
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            ends.append(kind["original_max_position_embeddings"])
        elif isinstance(kind, dict) and "dynamic" in str(kind.get("rope_type")):
            ends.append(config.max_position_embeddings)
    follows = (
        f"beyond that the rotary positions of {family} depend on the longest sequence of a batch, "
        "so that packed sequences would change each other"
    )
    limits = [PositionLimit(end, follows) for end in ends]
    tower = set(vision_tower(model).modules()) if has_vision(base) else set()
    for name, part in base.named_modules():
        # Tables of relative positions hold distances, which are cut at their end.
        is_named = re.match(r"(?!.*rel).*(pos(ition|$|_)|wpe$)", name.rpartition(".")[2])
        if is_named and isinstance(part, nn.Embedding) and part not in tower:
            size = part.num_embeddings - getattr(part, "offset", 0)
            limits.append(PositionLimit(size, f"{family} has learned positions for no more"))
    return min(limits, default=None)


# The comparison


def check_training_mode(model: nn.Module) -> None:
    """Raises ValueError if a model, its adapters aside, computes something else in training mode.

    Completions are sampled in eval mode: the update would take dropout and other noise for a change
    of the policy.
    """
    base = unwrap(model)
    if any(p.is_meta for p in base.parameters()):
        return

    def both_modes() -> tuple[Tensor, Tensor]:
        batch = _stream(_tokens(base), 1)
        sampled = run_packed(model, batch, _positions(base, batch))
        for module in own_modules(model):
            module.training = True
        return run_packed(model, batch, _positions(base, batch)), sampled

    trained, sampled = _computed(model, both_modes)
    scale = sampled.abs().max().item()
    off = (trained - sampled).abs().nan_to_num(torch.inf).max().item()
    if off > _tolerance(sampled) * scale:
        raise ValueError(
            f"cppo: model_type {base.config.model_type!r} cannot be trained here: in training mode "
            f"its hidden states are off by {off:.2g} of {scale:.2g} from those that it samples "
            "with (dropout or other noise that is not an attribute of its layers)"
        )


def _compare(model: nn.Module, shares: bool) -> None:
    """Raises ValueError if the logits of any way of calling the model are not its own."""
    pairs = _computed(model, lambda: dict(_logits(model, shares)))
    for way, (ours, own) in pairs.items():
        if own.isnan().any() or own.isposinf().any():
            raise ValueError(
                f"cppo: model_type {unwrap(model).config.model_type!r} must have finite logits, "
                "its own for a few ordinary tokens are not"
            )
        scale = own[own.isfinite()].abs().max().item()
        off = torch.where(ours == own, 0.0, (ours - own).abs()).nan_to_num(torch.inf).max().item()
        if off > _tolerance(own) * scale:
            _refuse(model, way, off, scale, own)


def _computed(model: nn.Module, compute: Callable[[], _T]) -> _T:
    """What is computed with a model, in fp64 where it can; the model is left as it was found."""
    exact: list[Any] = [DoublePrecision()] if _is_plain(model) else []
    for arithmetic in [*exact, nullcontext()]:
        try:
            with left_as_found(model), _settings(model), _moved_adapters(model), arithmetic:
                return compute()
        except Exception as error:
            if arithmetic in exact:
                continue  # an op that does not know fp64
            # What is not said in words, such as an index out of range, needs its kind beside it.
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"cppo: model_type {unwrap(model).config.model_type!r} cannot be run on packed "
                f"sequences: {kind}{str(error).removeprefix('cppo: ')}"
            ) from error
    raise AssertionError("the last arithmetic returns or raises")


def _is_plain(model: nn.Module) -> bool:
    """Whether its parameters are its weights: neither quantised nor in parts elsewhere."""
    return getattr(unwrap(model), "hf_quantizer", None) is None and not any(
        type(p) is not nn.Parameter or hasattr(p, "ds_id") for p in model.parameters()
    )


def _tolerance(logits: Tensor) -> float:
    products = torch.backends.cuda.matmul.fp32_precision
    is_tf32 = logits.is_cuda and "tf32" in (products, getattr(torch.backends, "fp32_precision", ""))
    return TF32 if is_tf32 and logits.dtype == torch.float32 else TOLERANCES[logits.dtype]


def _refuse(model: nn.Module, way: str, off: float, scale: float, own: Tensor) -> None:
    config = unwrap(model).config
    layers = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()))
    name = str(own.dtype).removeprefix("torch.")
    reason = (
        f"compared in {name}, where rounding is below 1e-12"
        if own.dtype == torch.float64
        else f"what its roundings in {name} may add up to"
    )
    raise ValueError(
        f"cppo: model_type {config.model_type!r} "
        + (f"with layers {layers} " if layers else "")
        + f"cannot be trained here: {way}, its logits are off by {off:.2g} of {scale:.2g} from "
        "those that it gives for each sequence alone by its eager attention; "
        f"{_tolerance(own):g} of the largest is allowed ({reason})"
    )


def _logits(model: Any, shares: bool) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Logits by each way of calling the model, and the model's own for the same tokens."""
    base = unwrap(model)
    ids = _tokens(base)
    own, hidden = _by_itself(model, ids)
    head = lm_head(model)
    if hidden is not None:
        yield "by its LM head", (head.logits(hidden), own)

    def packed(prompt: int, is_shared: bool) -> tuple[Tensor, Tensor]:
        batch = _stream(ids, prompt)
        positions = _positions(base, batch)
        shared = share_prompts(batch, [0, 0]) if is_shared else None
        rows = [row[prompt - 1 : end - 1] for row, end in zip(own, LENGTHS, strict=True)]
        return head.logits(run_packed(model, batch, positions, shared=shared)), torch.cat(rows)

    yield "on packed sequences", packed(1, False)
    if shares:
        yield "on packed sequences that share a prompt", packed(PROMPT, True)
    ends = torch.stack([row[end - 2 : end] for row, end in zip(own, LENGTHS, strict=True)])
    yield "on prompts padded to one length, with a cache", (_decoded(base, head, ids), ends)


def _by_itself(model: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The model's own logits, and the hidden states that its head was given.

    One batch without padding: every sequence is alone in its row.
    """
    base = unwrap(model)
    configs = model_configs(base)
    attentions = [config._attn_implementation_internal for config in configs]
    seen: list[Tensor] = []
    # A model that goes around its own body shows none.
    hook = base.model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    with hook:
        base.set_attn_implementation("eager")
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for config, attention in zip(configs, attentions, strict=True):
        config._attn_implementation_internal = attention
    return output.logits, seen[0] if seen else None


def _tokens(base: Any) -> Tensor:
    """Two rows of ordinary tokens that all differ, but for the common beginning."""
    table = base.get_input_embeddings().weight
    named = {**vars(base.config.get_text_config()), **vars(base.config)}
    special = {value for name, value in named.items() if "token" in name and type(value) is int}
    ordinary = [token for token in range(table.shape[0]) if token not in special]
    total = 2 * max(LENGTHS) - PROMPT
    chosen = [ordinary[i * len(ordinary) // total] for i in range(total)]
    first, rest = chosen[: max(LENGTHS)], chosen[max(LENGTHS) :]
    return torch.tensor([first, first[:PROMPT] + rest], device=table.device)


def _stream(ids: Tensor, prompt: int) -> PackedBatch:
    place = torch.arange(ids.shape[1], device=ids.device)
    mask = place < torch.tensor(LENGTHS, device=ids.device)[:, None]
    return pack_completions(ids, mask, mask & (place >= prompt))


def _positions(base: Any, batch: PackedBatch) -> Tensor | None:
    return batch.position_ids.expand(3, -1) if has_vision(base) else None


def _decoded(base: Any, head: LMHead, ids: Tensor) -> Tensor:
    """(2, 2, V) logits of the last two tokens, the last one with a cache, as the sampler does."""
    from cppo.model.cache import completion_cache, prompt_cache

    cache = prompt_cache(base)
    longest = max(LENGTHS)
    padding = torch.tensor([longest - length for length in LENGTHS], device=ids.device)
    place = torch.arange(longest, device=ids.device) - padding[:, None]
    ids, mask, place = ids.gather(1, place.clamp(min=0)), (place >= 0).long(), place.clamp(min=0)
    positions = place.expand(3, -1, -1) if has_vision(base) else place
    logits = []
    for start, stop in ((0, longest - 1), (longest - 1, longest)):
        output = base.model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[..., start:stop],
            use_cache=True,
            **cache_argument(base, cache),
        )
        logits.append(head.logits(output.last_hidden_state[:, -1]))
        if not start:
            cache = completion_cache([cache], 1, 1)
    return torch.stack(logits, dim=1)


# What the model is while it is compared


@contextmanager
def _settings(model: nn.Module) -> Iterator[None]:
    """Windows and chunks of WINDOW tokens, experts one by one (their fused kernels lack fp64).

    What it changes, `left_as_found` puts back.
    """
    config = vars(unwrap(model).config.get_text_config())
    stated = {name: config[name] for name in _WINDOWS if isinstance(config.get(name), int)}
    for holder in [*model_configs(model), *model.modules()]:
        for name in _WINDOWS:
            if isinstance(size := vars(holder).get(name), int) and size > WINDOW:
                # A layer whose window is not quite the config's keeps the difference.
                more = size - stated.get(name, size)
                vars(holder)[name] = WINDOW + (more if abs(more) <= 2 else 0)
        if "_experts_implementation_internal" in vars(holder):
            holder._experts_implementation_internal = "eager"
    yield


@contextmanager
def _moved_adapters(model: Any) -> Iterator[None]:
    """What a peft model trains is a little different, so that what ignores it shows."""
    is_moved = has_adapters(model) and _is_plain(model)
    trained = [p for p in model.parameters() if p.requires_grad and is_moved]
    before = [p.data for p in trained]
    try:
        for p in trained:
            wave = torch.arange(p.numel(), device=p.device).sin().view(p.shape)
            p.data = p.data + 0.02 * wave.to(p.dtype)
        yield
    finally:
        for p, data in zip(trained, before, strict=True):
            p.data = data
