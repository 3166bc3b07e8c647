"""Calls every op below the public ones with arguments that do not fit; what test_private_ops runs.

    python tests/private_ops.py NAMESPACE

Each argument of a valid call is replaced by others, one at a time: sizes that disagree, other
dtypes and devices, no entries, strides, numbers out of range. A call may raise, or return where the
replacement happens to fit; where a size is too small it must raise. A crash ends the process, and
an access outside a tensor is what a build with a sanitizer finds (tests/run_builds.sh).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo import LossConfig, backends
from cppo.fused.denominators import denominators
from cppo.testing import make_inputs

# A shorter tensor fits too: another batch, other units, other places.
MAY_BE_SHORTER = {
    ("pack_sizes", "kept"),
    ("unpack", "target_index"),
    ("gather_tokens", "target_index"),
    ("gather_tokens", "values"),
    # Read where a view is compact; the mask, where the divergence is on the sampled token.
    *product(
        ("cppo_loss_backward", "cppo_loss_backward_"),
        ("advantages", "cu_seqlens", "mask", "saved_negative"),
    ),
    ("linear_cppo_loss_backward", "advantages"),
    ("linear_cppo_loss_backward", "cu_seqlens"),
    *(
        (f"linear_{op}{ending}", "suppressed")
        for op, ending in product(("token_stats", "cppo_loss"), ("", "_backward"))
    ),
}
# Of Triton's kernels, whose interpreter takes a second for ten calls: what makes them raise, and
# the numbers that a kernel takes for an address.
OF_KERNELS = ("shorter", "longer", "empty", "one row less", "one column less", "without a column")
OF_KERNELS += ("of no dimension", "without memory", "torch.complex64", "all -1", "falling")


def calls(namespace: str) -> dict[str, tuple[Any, ...]]:
    """A valid call of every op: its name and arguments."""
    ops = getattr(torch.ops, namespace)
    inputs = make_inputs("cppo_loss", layout="packed", lengths=(3, 4))
    anchor, positive, negative = inputs["logits"]
    targets, advantages, bounds = (inputs[k] for k in ("targets", "advantages", "cu_seqlens"))
    count, vocabulary = anchor.shape
    mask = torch.ones(count, dtype=torch.bool)
    mask[1] = False
    found: dict[str, tuple[Any, ...]] = {}
    found["token_stats"] = (anchor, targets, mask, None, 0.7, False)
    logps, entropy, saved = ops.token_stats(*found["token_stats"])
    stats = (logps, entropy, anchor, targets, mask, None, saved, 0.7)
    found["token_stats_backward"] = found["token_stats_backward_"] = stats
    places = torch.arange(count).roll(1)
    found["token_stats placed"] = (anchor, targets, mask, places, 0.7, False)
    found["token_stats_backward placed"] = (*stats[:5], places, *stats[6:])
    found["perception_mask"] = (entropy, entropy + 0.5, 0.5, mask, bounds)
    views = (anchor, positive, negative)
    found["contrast"] = (*views, mask, places, places, 0.7)
    contrasts, coefficients = ops.contrast(*found["contrast"]), torch.ones(4, count)
    backward = (*views, targets, places, places, saved, contrasts, coefficients, 0.7, False)
    found["contrast_backward"] = found["contrast_backward_"] = backward
    weights = logps.exp()
    options = {"kl_coef": 0.1, "cpl_coef": 0.5, "importance_correction": "sequence_mask"}
    for divergence in ("k3", "full"):
        config = LossConfig(divergence=divergence, **options)
        by = denominators(targets, mask, bounds, None, config)
        of_rows = (targets, advantages, logps, logps, logps, weights, logps, mask, bounds)
        loss = (*views, *of_rows, by.values, True, config.temperature, config.text, False)
        found[f"cppo_loss {divergence}"] = loss
        kept = ops.cppo_loss(*loss)[-4:]
        backward = (
            torch.ones(()),
            *views,
            targets,
            advantages,
            mask,
            bounds,
            *kept,
            config.temperature,
            config.text,
        )
        found[f"cppo_loss_backward {divergence}"] = backward
        found[f"cppo_loss_backward_ {divergence}"] = backward
        margin = logps if divergence == "full" else None
        terms = (logps, entropy, logps - 0.1, logps - 0.2, margin, mask, advantages, logps, logps)
        terms = (*terms, weights, logps - 0.3, mask, bounds)
        found[f"loss_terms {divergence}"] = (*terms, by.values, config.text)
    if namespace == "cppo":
        found |= extension_calls(ops) | head_calls(ops)
    return found


def head_calls(ops: Any) -> dict[str, tuple[Any, ...]]:
    """The ops on hidden states: PyTorch around the others, for every backend the same."""
    inputs = make_inputs("linear_cppo_loss", layout="packed", lengths=(3, 4))
    views, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"]
    advantages, bounds = inputs["advantages"], inputs["cu_seqlens"]
    bias, mask = weight[:, 0].clone(), torch.ones(len(targets), dtype=torch.bool)
    suppressed = torch.tensor([0, len(weight) - 1])
    logps = torch.zeros(len(targets))
    config = LossConfig(kl_coef=0.1, cpl_coef=0.5, importance_correction="token_truncate")
    by = denominators(targets, mask, bounds, None, config)
    head, wants = (weight, bias, suppressed), [True] * 5
    options = (by.values, False, 1.0, config.text, 30.0, "fp32", wants)
    of_rows = (*[logps] * 3, logps.exp(), logps - 0.3)
    loss = (*views, *head, targets, advantages, *of_rows, mask, bounds, *options)
    coefficients = ops.linear_cppo_loss(*loss, False)[8]
    backward = (torch.ones(()), *views, *head, targets, advantages, bounds, coefficients)
    stats, logits = (views.anchor, *head, targets, mask), (None, "fp32", [True] * 3)
    kept = ops.linear_token_stats(*stats[:-1], None, 0.7, None, "fp32", True)[2:]
    return {
        "linear_token_stats": (*stats, 0.7, 30.0, "fp32", False),
        "linear_token_stats_backward": (logps, logps, *stats, *kept, 0.7, *logits),
        "linear_cppo_loss": (*loss, False),
        "linear_cppo_loss resident": (*loss, True),
        "linear_cppo_loss_backward": (*backward, 1.0, config.text, 30.0, "fp32", wants),
    }


def extension_calls(ops: Any) -> dict[str, tuple[Any, ...]]:
    rewards = torch.randn(8)
    ids = torch.arange(12).view(2, 6)
    attention = torch.ones(2, 6, dtype=torch.int64)
    completion = attention.clone()
    completion[:, :3] = 0
    kept = torch.tensor([1, 0])
    bounds, row_bounds, _ = ops.pack_sizes(attention, completion, kept)
    index = torch.tensor([3, 4, 5, 9, 10, 11])
    whole = torch.randn(2, 6)
    return {
        "group_advantages": (rewards, 4, "group", 1e-4),
        "prune_completions": (rewards, 4, 2, "score", torch.rand(8)),
        "advantages_and_prune": (rewards, 4, 4, 2, "group", 1e-4, "unbiased", torch.rand(8)),
        "pack_sizes": (attention, completion, kept),
        "pack_completions": (
            ids,
            attention,
            completion,
            kept,
            bounds,
            row_bounds,
            [whole, whole.double()],
            12,
            6,
        ),
        "unpack": ([torch.randn(6), torch.randn(6)], index, 2, 6),
        "gather_tokens": ([whole, whole.double()], index),
        "row_capability": (),
    }


def other_tensors(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    flat = tensor.flatten()
    yield "shorter", flat[:-1].clone()
    yield "longer", torch.cat([flat, flat])
    yield "empty", flat[:0].clone()
    yield "of no dimension", flat[0].clone()
    yield "of one dimension more", tensor[None].clone()
    yield "one row less", tensor[:-1].clone() if tensor.ndim else None
    yield "one column less", tensor[..., :-1].clone() if tensor.ndim else None
    yield "without a column", tensor[..., :0].clone() if tensor.ndim else None
    yield "strided", torch.stack([tensor, tensor], -1)[..., 0]
    yield "transposed", tensor.T.contiguous().T if tensor.ndim == 2 else None
    yield "expanded", flat[:1].expand(tensor.numel()).view(tensor.shape).detach()
    yield "without memory", tensor.to("meta")
    yield "nothing", None
    yield "sparse", tensor.to_sparse() if tensor.ndim else None
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16):
        yield str(dtype), tensor.to(dtype)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        yield str(dtype), tensor.to(dtype)
    for number in (-1, 2**40, -(2**62), 2**63 - 1):
        if tensor.dtype == torch.int64 or abs(number) < 2**31:
            whole = tensor.dtype in (torch.int32, torch.int64)
            yield f"all {number}", torch.full_like(tensor, number) if whole else None
    if tensor.dtype.is_floating_point:
        for value in (torch.nan, torch.inf, -torch.inf, 0.0):
            yield f"all {value}", torch.full_like(tensor, value)
    elif tensor.dtype != torch.bool:
        yield "falling", tensor.flatten().sort(descending=True)[0].view(tensor.shape)


def others(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in place of a valid argument, and how it differs."""
    if isinstance(value, Tensor):
        yield from other_tensors(value)
    elif isinstance(value, list):
        yield "nothing in it", []
        yield "one less", value[1:]
        for how, other in other_tensors(value[-1]) if isinstance(value[-1], Tensor) else ():
            if other is not None:
                yield f"the last {how}", [*value[:-1], other]
    elif isinstance(value, bool) or value is None:
        yield "the other", not value
    elif isinstance(value, int):
        for number in (-1, 0, 1, 5, 7, 2**40, 2**63 - 1, -(2**63)):
            yield str(number), number
    elif isinstance(value, float):
        for other in (-1.0, 0.0, 1.5, 1e300, float("nan"), float("inf")):
            yield str(other), other
    elif isinstance(value, str):
        yield "another word", "nope"
        yield "no word", ""


def copied(value: Any) -> Any:
    """With memory of its own: some ops write into what they are given."""
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) and value.layout == torch.strided else value


def main(namespace: str) -> None:
    torch.manual_seed(0)
    backends.pick("token_stats", torch.zeros(1), {"cppo": "cpp"}.get(namespace, "triton"))
    counts = {"raised": 0, "returned": 0}
    for call, arguments in calls(namespace).items():
        name = call.split()[0]
        op = getattr(getattr(torch.ops, namespace), name).default
        names = [argument.name for argument in op._schema.arguments]
        op(*copied(list(arguments)))
        for place, argument in enumerate(names):
            for how, other in others(arguments[place]):
                if namespace == "cppo_triton" and how not in OF_KERNELS:
                    continue
                given = copied(list(arguments))
                expanded = how in ("expanded", "strided", "transposed")
                given[place] = other if expanded else copied(other)
                what = f"{namespace}.{call}: {argument} {how}"
                # Read where a crash would leave nothing else.
                print(what, file=sys.stderr)
                try:
                    op(*given)
                except Exception:
                    counts["raised"] += 1
                    continue
                counts["returned"] += 1
                must = how in ("shorter", "the last shorter") and isinstance(other, Tensor | list)
                if must and (name, argument) not in MAY_BE_SHORTER:
                    raise AssertionError(f"{what}: no error")
    print(f"{counts['raised']} raised, {counts['returned']} returned")


if __name__ == "__main__":
    assert cppo.__version__
    main(sys.argv[1])
