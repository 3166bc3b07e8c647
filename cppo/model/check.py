"""Whether a model computes as it is run here what it computes on each sequence alone.

Nothing a model says about itself settles that: layers may drop the bounds of the sequences, carry
a state from one into the next, or add sinks to their attention; images may be attended to both
ways; a head may scale its logits; an adapter may act outside the model that it wraps. So when a
model is first met, a few short sequences go through everything that training calls, and the logits
are compared with the model's own, by its eager attention, one sequence at a time
(`cppo.model.comparison`): sequences of text, and answers to a question with an image.

The arithmetic is fp64 (`cppo.model.double_precision`), so that what differs is not rounding.
Windows are made shorter than the sequences, and adapters are moved away from their start, where
most are zero, so that neither is right by accident. The model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.model.comparison import Case, image_case, ordinary_tokens, pairs, text_case
from cppo.model.double_precision import PLAIN, DoublePrecision
from cppo.model.forward import check_supported, run_packed
from cppo.model.images import ImageBatch
from cppo.model.left_as_found import left_as_found, model_configs
from cppo.model.limits import PositionLimit, learned_positions, position_limit
from cppo.model.padded import run_padded
from cppo.model.wrappers import has_adapters, own_modules, unwrap

_T = TypeVar("_T")

WINDOW = 3
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
# Of the largest logit. In fp64 rounding stays below 1e-12 of it: all above is another computation.
# A model that cannot run in fp64 (its weights are quantised or sharded) is compared in its own
# arithmetic, where some hundred roundings of half a unit in the last place add up to ten units.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
TF32 = 0.02  # of fp32 where its products have the digits of fp16


class Shown(NamedTuple):
    """A question with images: what a model is compared on besides text.

    prompt: (P,) int64, its tokens. images: of this question.
    """

    prompt: Tensor
    images: ImageBatch


class _Facts(NamedTuple):
    """What is known of a model that passed.

    shares: whether prompts were shared as well.
    images: whether there was a question with images.
    limit: of its positions; None: there is none.
    """

    shares: bool
    images: bool
    limit: PositionLimit | None


# By model, and by what it is: its wrapper, its head, its active adapters; and how it is run.
_PASSED: WeakKeyDictionary[nn.Module, dict[Any, _Facts]] = WeakKeyDictionary()


def check_model(
    model: nn.Module,
    *,
    packed: bool = True,
    shares: bool = False,
    longest: int = 0,
    shown: Callable[[], Shown] | None = None,
) -> None:
    """Raises ValueError for a model that cppo would run wrongly.

    Runs the model four times on a dozen tokens when it is first met, or met with another adapter;
    after that it costs a look-up.

    Args:
        model: a transformers causal model, or a peft model around one, in any mode and precision,
            with the attention of `cppo.set_attention` if it is packed.
        packed: whether it will be run on streams; else on padded batches.
        shares: whether it will be run on prompts that several completions share (one run more).
        longest: tokens of the longest sequence it is about to be run on.
        shown: returns a question with images, if it will be run on such (six runs more).
    """
    base = unwrap(model)
    passed = _PASSED.setdefault(base, {})
    key = (type(model), id(base.get_output_embeddings()), _active(model), packed)
    facts = passed.get(key, _Facts(False, False, None))
    is_new = key not in passed or shares > facts.shares
    if is_new or (shown is not None and not facts.images):
        check_supported(model)
        _check_adapters(model)
        if not any(p.is_meta for p in base.parameters()):
            cases = [text_case(base)] if is_new else []
            cases += [] if shown is None else [image_case(base, *shown())]
            for case in cases:
                _compare(model, case, packed, shares)
        facts = _Facts(
            shares or facts.shares, shown is not None or facts.images, position_limit(model)
        )
        passed[key] = facts
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


# The comparison


def check_training_mode(
    model: nn.Module, *, packed: bool = True, shown: Callable[[], Shown] | None = None
) -> None:
    """Raises ValueError if a model, its adapters aside, computes something else in training mode.

    Completions are sampled in eval mode: the update would take dropout and other noise for a change
    of the policy. The arguments are those of `check_model`.
    """
    base = unwrap(model)
    if any(p.is_meta for p in base.parameters()):
        return
    case = text_case(base) if shown is None else image_case(base, *shown())
    run = run_packed if packed else run_padded

    def hidden() -> Tensor:
        return run(model, case.stream(base, case.prompts))

    def both_modes() -> tuple[Tensor, Tensor]:
        sampled = hidden()
        for module in own_modules(model):
            module.training = True
        return hidden(), sampled

    trained, sampled = _computed(model, packed, both_modes)
    scale = sampled.abs().max().item()
    off = (trained - sampled).abs().nan_to_num(torch.inf).max().item()
    if off > _tolerance(sampled) * scale:
        raise ValueError(
            f"cppo: model_type {base.config.model_type!r} cannot be trained here: in training mode "
            f"its hidden states are off by {off:.2g} of {scale:.2g} from those that it samples "
            "with (dropout or other noise that is not an attribute of its layers)"
        )


def counts_padding(model: nn.Module) -> bool:
    """Whether a token's position depends on the padding on its left, as GPT-2's does.

    Such a model says something else of a batch that is padded less. Only one with learned positions
    is looked at, by two runs on a few tokens; if its weights are in parts elsewhere, by none.
    """
    if not learned_positions(model):
        return False
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return True
    ids = ordinary_tokens(unwrap(model), 4)[None]
    mask = torch.ones_like(ids)

    def logits(padding: int) -> Tensor:
        rows, seen = (F.pad(x, (padding, 0)) for x in (ids, mask))
        found: Tensor = model(input_ids=rows, attention_mask=seen).logits
        return found[:, padding:]

    alone, behind = _computed(model, False, lambda: (logits(0), logits(3)))
    off = (behind - alone).abs().max().item()
    return off > _tolerance(alone) * alone.abs().max().item()


def _compare(model: nn.Module, case: Case, packed: bool, shares: bool) -> None:
    """Raises ValueError if the logits of any way of calling the model are not its own."""
    found = _computed(
        model, packed, lambda: dict(pairs(model, case, packed=packed, shares=shares and packed))
    )
    where = ", with images" if case.has_images else ""
    for way, (ours, own) in found.items():
        if own.isnan().any() or own.isposinf().any():
            raise ValueError(
                f"cppo: model_type {unwrap(model).config.model_type!r} must have finite logits, "
                "its own for a few ordinary tokens are not"
            )
        scale = own[own.isfinite()].abs().max().item()
        off = torch.where(ours == own, 0.0, (ours - own).abs()).nan_to_num(torch.inf).max().item()
        if off > _tolerance(own) * scale:
            _refuse(model, way + where, off, scale, own)


def _computed(model: nn.Module, packed: bool, compute: Callable[[], _T]) -> _T:
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
                f"cppo: model_type {unwrap(model).config.model_type!r} cannot be run on "
                f"{'packed' if packed else 'padded'} sequences: "
                f"{kind}{str(error).removeprefix('cppo: ')}"
            ) from error
    raise AssertionError("the last arithmetic returns or raises")


def _is_plain(model: nn.Module) -> bool:
    """Whether its parameters are its weights: neither quantised nor in parts elsewhere."""
    return getattr(unwrap(model), "hf_quantizer", None) is None and not any(
        type(p) not in PLAIN or hasattr(p, "ds_id") for p in model.parameters()
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
