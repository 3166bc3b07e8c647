"""The accuracy law, and inputs for every op: shared by the tests and the benchmarks.

    max|ours - exact| <= 2 * max|eager - exact| + 1e-6 * max(1, max|exact|)

where `exact` is the reference in fp64 and `eager` the reference in the dtype of ours. NaN and
infinities must stand at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo import LossConfig, reference
from cppo.fused.batch import OF_ROWS
from cppo.ops.packed_batch import PackedBatch
from cppo.records import LossOutput, Views

Inputs = dict[str, Any]

REWARD_CASES = ("random", "equal", "one_question", "empty")
ROW_CASES = (
    "random",
    "large",
    "low",
    "minus_inf_columns",
    "lowest_columns",
    "one_finite",
    "all_masked",
    "one_row",
    "empty",
)
DIFFERENTIABLE = ("token_stats", "linear_token_stats", "cppo_loss", "linear_cppo_loss")


# The law


def assert_as_accurate(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Holds `ours` to the accuracy law.

    Args:
        name: what is compared; it opens the message.
        ours: any shape and dtype, the result under test.
        eager: the same shape, the reference in the dtype of the input.
        exact: the same shape, the reference in fp64.
    Raises: AssertionError naming the first place that breaks the law.
    """
    if ours.shape != exact.shape or eager.shape != exact.shape:
        raise AssertionError(
            f"{name}: shapes differ: ours {tuple(ours.shape)}, eager {tuple(eager.shape)}, "
            f"exact {tuple(exact.shape)}"
        )
    if ours.dtype.is_floating_point:
        # What is finite in fp64 may lie beyond the range of our dtype.
        representable = exact.detach().to(ours.dtype).double()
    else:
        representable = exact.detach().double()
    ours, eager, exact = (x.detach().to(exact.device).double() for x in (ours, eager, exact))
    for word, place in (
        ("NaN", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        wrong = (place(ours) != place(representable)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name}: {word} at other places than fp64: first at {at}, "
                f"got {ours[at].item()}, exact {exact[at].item()}"
            )
    finite = representable.isfinite()
    if not finite.any():
        return
    error = (ours - exact).abs().masked_fill(~finite, 0.0)
    eager_error = (eager - exact).abs()[finite & eager.isfinite()]
    allowed = 2 * float(eager_error.max() if eager_error.numel() else 0.0)
    allowed += 1e-6 * max(1.0, float(exact[finite].abs().max()))
    if float(error.max()) > allowed:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: error {float(error.max()):.3g} > {allowed:.3g} allowed at {at}: "
            f"got {ours[at].item()}, exact {exact[at].item()}"
        )


def assert_op_as_accurate(op: str, backend: str, inputs: Inputs) -> None:
    """Holds every output and every gradient of `op` on `backend` to the accuracy law.

    Args:
        op: a public op of cppo.
        backend: the implementation under test.
        inputs: its keyword arguments, from `make_inputs`.
    Raises: AssertionError naming the output; whatever the op itself raises.
    """
    ours = evaluate(op, inputs, backend)
    eager = evaluate(op, inputs, "reference")
    exact = evaluate(op, in_fp64(inputs), "reference")
    for name in exact:
        assert_as_accurate(f"{op}[{backend}].{name}", ours[name], eager[name], exact[name])


def _leaves(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves in place of what gradients flow to, and these leaves."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor | None) -> Any:
        if value is None:
            return None
        # Not a clone: strides are part of what is tested.
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    fresh = dict(inputs)
    for name in ("logits", "hidden", "weight", "bias"):
        value = inputs.get(name)
        if isinstance(value, Views):
            fresh[name] = Views(
                *(leaf(f"{name}.{v}", x) for v, x in zip(value._fields, value, strict=True))
            )
        elif value is not None:
            fresh[name] = leaf(name, value)
    return fresh, leaves


def evaluate(op: str, inputs: Inputs, backend: str = "reference") -> dict[str, Tensor]:
    """Every output of one call by name, and "grad.<argument>" of a fixed sum of them.

    Args:
        op: a public op of cppo.
        inputs: its keyword arguments; left as they are.
        backend: the implementation.
    Returns: {name: detached tensor}; metrics are "metrics.<name>".
    """
    fresh, leaves = _leaves(inputs) if op in DIFFERENTIABLE else (inputs, {})
    result = getattr(cppo, op)(**fresh, backend=backend)
    if isinstance(result, Tensor):
        outputs = {op: result}
    elif isinstance(result, PackedBatch):
        outputs = {k: v for k, v in vars(result).items() if isinstance(v, Tensor)}
    elif hasattr(result, "_asdict"):
        outputs = {k: v for k, v in result._asdict().items() if isinstance(v, Tensor)}
    else:
        outputs = {f"{op}[{i}]": value for i, value in enumerate(result)}
    if isinstance(result, LossOutput):
        outputs.update({f"metrics.{k}": v for k, v in result.metrics.items()})
    if leaves:
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros((), dtype=torch.float64)
        for value in outputs.values():
            if value.requires_grad:
                upstream = torch.randn(value.shape, generator=generator).to(value)
                total = total + (value * upstream).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
            outputs[f"grad.{name}"] = torch.zeros_like(value) if gradient is None else gradient
    return {name: value.detach() for name, value in outputs.items()}


# Inputs


def in_fp64(inputs: Inputs) -> Inputs:
    """The same inputs with every floating tensor in fp64."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            return value.double()
        if isinstance(value, Views):
            return Views(*map(cast, value))
        return value

    return {name: cast(value) for name, value in inputs.items()}


def to_packed(inputs: Inputs) -> Inputs:
    """Padded inputs of a row op in the packed layout: the masked rows are gone."""
    mask = inputs["mask"].bool()
    per_row = {"logits", "hidden", "targets", "anchor_entropy", "negative_entropy", *OF_ROWS}

    def pack(value: Any) -> Any:
        return Views(*map(pack, value)) if isinstance(value, Views) else value[mask]

    packed = {k: pack(v) if k in per_row else v for k, v in inputs.items() if k != "mask"}
    if "advantages" in inputs or "anchor_entropy" in inputs:
        ends = mask.sum(1).cumsum(0)
        packed["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends]).int()
    return packed


def compact_views(views: Views, advantages: Tensor, cu_seqlens: Tensor | None = None) -> Views:
    """The perturbed views with only the rows of the completions with A > 0."""
    keep = advantages > 0
    if cu_seqlens is not None:
        keep = keep.repeat_interleave(cu_seqlens.diff())
    return Views(views.anchor, *(None if view is None else view[keep] for view in views[1:]))


def with_weights(inputs: Inputs, seed: int = 0) -> Inputs:
    """Inputs of a loss with what its `config` takes from the engine, and token_weights.

    Args:
        inputs: of `make_inputs`, with or without a config.
        seed: of both. A tenth of the tokens has no sampling_logp, a quarter a weight of 0; where
            they are masked both are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    old, mask = inputs["old_logps"], inputs.get("mask", torch.tensor(True))
    noise, share, weights = (torch.rand(old.shape, generator=generator) for _ in range(3))
    sampling = (old + 0.6 * (noise - 0.5)).masked_fill(share < 0.1, torch.nan)
    more = {"sampling_logps": sampling, "token_weights": weights.masked_fill(share > 0.75, 0.0)}
    more = {name: values.masked_fill(~mask, torch.nan) for name, values in more.items()}
    bypass = inputs.get("config", LossConfig()).importance_correction == "bypass"
    return {k: v for k, v in {**inputs, **more}.items() if k != "old_logps" or not bypass}


def make_inputs(
    op: str,
    case: str = "random",
    *,
    layout: str = "padded",
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] = (5, 2, 7, 0, 3, 4),
    vocabulary: int = 37,
    hidden_size: int = 8,
    seed: int = 0,
) -> Inputs:
    """Keyword arguments of one call of `cppo.<op>`, on the CPU.

    Args:
        op: a public op of cppo that takes tensors.
        case: one of REWARD_CASES (advantages and pruning) or ROW_CASES (the others).
        layout: "padded" or "packed".
        dtype: of logits, hidden, weight and bias.
        lengths: response tokens of each completion; V and D: `vocabulary`, `hidden_size`.
        seed: of everything.
    Returns: {argument: value}. The losses get three views, the negative ones with an entropy
        that rises by a different amount at every row, so that rounding changes no selection.
    """
    generator = torch.Generator().manual_seed(seed)
    if op in ("group_advantages", "prune_completions", "advantages_and_prune"):
        return _reward_inputs(op, case, generator)
    if case == "empty":
        lengths = ()
    elif case == "one_row":
        lengths = (1,)
    if op == "pack_completions":
        return _token_inputs(lengths, generator)
    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    if case == "all_masked":
        mask = torch.zeros_like(mask)
    if op == "perception_mask":
        entropies = torch.rand(2, *mask.shape, generator=generator) * 3
        inputs: Inputs = {"anchor_entropy": entropies[0], "negative_entropy": entropies[1]}
    else:
        sizes = (vocabulary, hidden_size)
        inputs = _row_inputs(op, case, mask, sizes, dtype, generator)
    inputs["mask"] = mask
    return to_packed(inputs) if layout == "packed" else inputs


def _reward_inputs(op: str, case: str, generator: torch.Generator) -> Inputs:
    num_questions = {"one_question": 1, "empty": 0}.get(case, 5)
    rewards = torch.randint(0, 4, (num_questions * 8,), generator=generator) / 4
    if case == "equal":
        rewards = torch.full_like(rewards, 0.1)
    inputs: Inputs = {"rewards": rewards, "group_size": 8}
    if op == "prune_completions":
        inputs = {"advantages": reference.group_advantages(rewards, 8), "group_size": 8}
    if op != "group_advantages":
        inputs["prune_rate"] = 0.7
    return inputs


def _token_inputs(lengths: Sequence[int], generator: torch.Generator) -> Inputs:
    """Prompts of 1 to 4 tokens before each response, padded on both sides."""
    prompts = torch.randint(1, 5, (len(lengths),), generator=generator).tolist()
    width = max((p + n for p, n in zip(prompts, lengths, strict=True)), default=0) + 2
    input_ids = torch.randint(0, 100, (len(lengths), width), generator=generator)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        start = int(torch.randint(0, width - prompt - length + 1, (), generator=generator))
        attention_mask[row, start : start + prompt + length] = 1
        completion_mask[row, start + prompt : start + prompt + length] = 1
    kept = torch.arange(0, len(lengths), 2)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "kept": kept,
    }


def _anchor(
    case: str, shape: tuple[int, ...], sizes: tuple[int, int], generator: torch.Generator
) -> Tensor:
    anchor = torch.randn(*shape, sizes[0], generator=generator) * 2
    if case == "large":
        anchor = anchor * 5e3
    elif case == "low":
        anchor = anchor - 150
    elif case == "minus_inf_columns":
        anchor[..., -3:] = -torch.inf
    elif case == "one_finite":
        anchor[..., 1:] = -torch.inf
    return anchor


def _row_inputs(
    op: str,
    case: str,
    mask: Tensor,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Inputs:
    vocabulary, hidden_size = sizes
    linear = op.startswith("linear")
    if linear:
        shape = (*mask.shape, hidden_size)
        anchor = torch.randn(shape, generator=generator) * (50 if case == "large" else 1)
    else:
        anchor = _anchor(case, tuple(mask.shape), sizes, generator)
    high = {"one_finite": 1}.get(case, vocabulary - 3 if case.endswith("_columns") else vocabulary)
    targets = torch.randint(0, vocabulary if linear else high, mask.shape, generator=generator)
    inputs: Inputs = {"targets": targets.masked_fill(~mask, -100)}
    if linear:
        inputs["weight"] = torch.randn(vocabulary, hidden_size, generator=generator).to(dtype)
        inputs["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    name = "hidden" if linear else "logits"

    def view_of(values: Tensor) -> Tensor:
        view = values.to(dtype)
        if case == "lowest_columns" and not linear:
            view[..., -3:] = torch.finfo(dtype).min
        return view

    if op.endswith("token_stats"):
        return {name: view_of(anchor), **inputs}

    noise = torch.randn(anchor.shape, generator=generator)
    order = torch.randperm(mask.numel(), generator=generator).view(mask.shape)
    flatter = 1.1 - 0.9 * order[..., None] / max(1, mask.numel())
    views = Views(anchor, anchor + 0.1 * noise, anchor * flatter)
    views = Views(*(view_of(view) for view in views if view is not None))
    inputs[name] = views
    advantages = torch.tensor([1.0, -0.5, 0.7, 0.3, 0.0, -1.2]).repeat(len(mask) // 6 + 1)
    inputs["advantages"] = advantages[: len(mask)]
    head = (inputs["weight"].double(), inputs["bias"].double()) if linear else None
    exact = views.anchor.double() if head is None else views.anchor.double() @ head[0].T + head[1]
    logps = reference.token_stats(exact, inputs["targets"], mask=mask).logps.float()
    for field in ("old_logps", "ref_logps"):
        inputs[field] = logps + 0.3 * torch.randn(mask.shape, generator=generator)
    return inputs
