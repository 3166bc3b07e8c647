"""The one list of cases: which op on which shape, and what it must at least move and compute.

Shape sets: `toy` shows that everything runs, `small` is a first look (two minutes), `paper` are
the README's tables, `full` adds the sweeps. Bytes and FLOPs are those of the best possible plan,
the same for every competitor: a slower plan shows as a smaller share of the machine's ceiling.

A view's read is T V itemsize bytes; f is the share of rows in completions with A > 0, r the
selected share of those. A GEMM unit is 2 T V D operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import cppo
from cppo import backends
from cppo.benchmarks import inputs as draw
from cppo.benchmarks.inputs import DTYPES, Inputs, Sizes
from cppo.options.trainer import PRUNES

SHAPES = ("toy", "small", "paper", "full")
QWEN = 151_936  # the vocabulary of Qwen2, Qwen2.5 and their vision-language models
GPT2 = 50_257
FLOPS_PER_LOGIT = 8  # of one pass: subtract, exp, three sums


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Args:
        op: a public op of cppo. shape: in words. dtype: "fp32", "bf16", or "" for integer ops.
        make: draws the keyword arguments on a device.
        modes: "forward" (without autograd) and "both" (with every gradient).
        sizes: of a row op; None for the others.
        call: the op on a backend, where it is not cppo.<op>(**inputs, backend=backend).
        moved: bytes read and written at least by an op without sizes; 0: not counted.
    """

    op: str
    shape: str
    dtype: str
    make: Callable[[torch.device], Inputs]
    modes: tuple[str, ...] = ("forward",)
    sizes: Sizes | None = None
    call: Callable[..., Any] | None = field(default=None, repr=False)
    moved: float = 0.0

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.op, self.shape, self.dtype) if word)

    def run(self, inputs: Inputs, backend: str) -> Any:
        """The op itself on one of its backends."""
        if self.call is not None:
            return self.call(inputs, backend)
        options = {}
        if self.sizes is not None and self.sizes.hidden:
            options["logits_dtype"] = self.sizes.logits_dtype
        return getattr(cppo, self.op)(**inputs, **options, backend=backend)

    @property
    def unit(self) -> str:
        """What the rate counts; '' where time alone says it."""
        if self.sizes is None:
            return "GB/s" if self.moved else ""
        return "TFLOP/s" if self.sizes.hidden else "GB/s"

    def bytes(self, mode: str) -> float:
        """Bytes that the best plan moves through memory."""
        sizes = self.sizes
        if sizes is None:
            return self.moved
        item = DTYPES[self.dtype].itemsize
        if sizes.hidden:
            weight = sizes.vocabulary * sizes.hidden * item
            return weight * (1 if mode == "forward" else 3)
        view = sizes.rows * sizes.vocabulary * item
        if self.op == "token_stats" or sizes.views == 1:
            return view * (1 if mode == "forward" else 3)
        # The sampled-token divergences need the positive view only at selected rows.
        positive = sizes.looking if sizes.divergence == "full" else sizes.selected
        forward = 1 + sizes.looking + positive
        return view * (forward if mode == "forward" else forward + 1 + 2 * sizes.selected + 3)

    def flops(self, mode: str) -> float:
        """Operations of the best plan: matrix products for a head, else those of each logit."""
        sizes = self.sizes
        if sizes is None:
            return 0.0
        if not sizes.hidden:
            item = DTYPES[self.dtype].itemsize
            return FLOPS_PER_LOGIT * self.bytes(mode) / item
        unit = 2.0 * sizes.rows * sizes.vocabulary * sizes.hidden
        if self.op == "linear_token_stats" or sizes.views == 1:
            return unit * (1 if mode == "forward" else 3)
        f, s = sizes.looking, sizes.selected
        return unit * (1 + f + s if mode == "forward" else min(3 + f + 9 * s, 9.0))


def cases(shapes: str, device: torch.device) -> Iterator[Case]:
    """Every case of a shape set on a device, the first ones those that matter most."""
    yield from _row_cases(shapes, device.type == "cuda")
    yield from _batch_cases(shapes)
    if device.type == "cpu":
        yield from _planner_cases(shapes)


def _row_case(op: str, words: str, sizes: Sizes, dtype: str) -> Case:
    shape = f"T={sizes.rows} V={sizes.vocabulary}"
    shape += f" D={sizes.hidden}" if sizes.hidden else ""
    modes: tuple[str, ...] = ("forward", "both")
    if op == "perception_mask":
        modes = ("forward",)
    elif sizes.inplace:
        modes = ("both",)
    return Case(
        op,
        f"{shape} {words}".strip(),
        dtype,
        lambda device: draw.row_inputs(op, sizes, dtype, device),
        modes,
        None if op == "perception_mask" else sizes,
    )


def _row_cases(shapes: str, on_gpu: bool) -> Iterator[Case]:
    for dtype in reversed(DTYPES) if on_gpu else DTYPES:
        for op, words, sizes in _row_sizes(shapes, on_gpu):
            # On a GPU bf16 is what counts: fp32 only where it is cheap to show.
            is_shown = dtype == "bf16" or not (sizes.hidden or sizes.rows > 8192)
            if dtype == "fp32" and sizes.logits_dtype == "fp32":
                continue  # the same as its neighbour
            if shapes == "small" and not on_gpu:
                # A first look: bf16 on a CPU for the loss alone.
                is_shown = dtype == "fp32" or (op == "cppo_loss" and sizes.gating)
            if is_shown or not (on_gpu or shapes == "small"):
                yield _row_case(op, words, sizes, dtype)
    length = {"toy": 16, "small": 1024}.get(shapes, 4096)
    sizes = Sizes(4 if shapes == "toy" else 64, length, 0)
    words = f"B={sizes.completions} L={length}"
    case = _row_case("perception_mask", words, sizes, "fp32")
    yield Case(case.op, words, "fp32", case.make)


def _row_sizes(shapes: str, on_gpu: bool) -> Iterator[tuple[str, str, Sizes]]:
    """(op, words, sizes) of the ops on rows."""
    vocabulary = 193 if shapes == "toy" else QWEN
    first, *more = _logit_rows(shapes, on_gpu)
    yield from _logit_sizes(shapes, on_gpu, first)
    for number, (rows, hidden) in enumerate(_linear_sizes(shapes, on_gpu)):
        completions = 4 if shapes == "toy" else max(8, rows // 32)
        sizes = Sizes(completions, rows // completions, vocabulary, hidden)
        yield "linear_cppo_loss", "three views, f=0.5 r=0.2", sizes
        if number == 0:  # as the trainer runs it
            wide = replace(sizes, logits_dtype="fp32")
            yield "linear_cppo_loss", "three views, f=0.5 r=0.2, fp32 logits", wide
        if shapes == "toy" or (shapes == "paper" and (number == 0 if on_gpu else hidden == 1024)):
            one = Sizes(sizes.completions, sizes.length, vocabulary, hidden, views=1)
            yield "linear_cppo_loss", "anchor only", one
            yield "linear_token_stats", "", sizes
    for rows in more:
        yield from _logit_sizes(shapes, on_gpu, rows, brief=shapes == "paper")
    if shapes == "full":
        yield "token_stats", "", Sizes(8, 64, GPT2)
        for f in (0.25, 0.5, 1.0):
            for r in (0.05, 0.2, 0.5):
                if (f, r) == (0.5, 0.2):
                    continue  # above
                rows = 8192 if on_gpu else 256
                sizes = Sizes(8, rows // 8, QWEN, positive_share=f, selected_share=r)
                yield "cppo_loss", f"three views, f={f:g} r={r:g}", sizes


def _logit_sizes(
    shapes: str, on_gpu: bool, rows: int, brief: bool = False
) -> Iterator[tuple[str, str, Sizes]]:
    """Those of the ops on logits at so many rows; `brief`: the three that matter most."""
    vocabulary = 193 if shapes == "toy" else QWEN
    # As many completions as a GPU gets at once; fp64 is computed on two of them.
    count = rows // 128 if on_gpu and shapes != "toy" else 8
    sizes = Sizes(count, rows // count, vocabulary)
    dense = replace(sizes, selected_share=1.0, gating=False)
    yield "cppo_loss", "three views, all rows", dense
    yield "cppo_loss", "three views, f=0.5 r=0.2", sizes
    if shapes in ("toy", "paper") and not brief:
        yield "cppo_loss", "three views, all rows, in place", replace(dense, inplace=True)
    if shapes != "small" and not brief:
        full = replace(sizes, divergence="full")
        yield "cppo_loss", "three views, f=0.5 r=0.2, full divergence", full
        yield "cppo_loss", "anchor only", replace(sizes, views=1)
    yield "token_stats", "", sizes


def _logit_rows(shapes: str, on_gpu: bool) -> tuple[int, ...]:
    if on_gpu:
        return {"toy": (48,), "small": (2048,), "paper": (8192, 16384)}.get(
            shapes, (1024, 4096, 8192, 16384, 32768)
        )
    return {"toy": (48,), "small": (32,), "paper": (256,)}.get(shapes, (64, 256, 1024))


def _linear_sizes(shapes: str, on_gpu: bool) -> tuple[tuple[int, int], ...]:
    """(T, D) of the ops on hidden states."""
    if shapes == "toy":
        return ((32, 32),)
    if on_gpu:
        paper = ((8192, 2048), (8192, 3584), (16384, 2048))
        return {"small": ((2048, 2048),), "paper": paper}.get(
            shapes, (*paper, (1024, 3584), (4096, 3584), (16384, 3584), (32768, 2048))
        )
    return {"small": ((32, 128),), "paper": ((32, 256), (512, 1024), (4096, 512))}.get(
        shapes, ((1024, 512), (2048, 512), (4096, 512), (8192, 512))
    )


def _batch_cases(shapes: str) -> Iterator[Case]:
    """The ops that prepare a training batch, on inputs as a trainer has them: G = 16."""
    toy = shapes == "toy"
    for count in (32,) if toy else (512,) if shapes == "small" else (512, 8192):
        for scope in ("group", "batch"):
            yield _pruning(count, f"scope={scope}", scope=scope)
        for rule in PRUNES[3:]:
            yield _pruning(count, f"prune={rule}", prune=rule)
    sizes = ((8, 32),) if toy else ((64, 1024),) if shapes == "small" else ((64, 1024), (512, 2048))
    for count, length in sizes:
        yield Case(
            "pack_completions",
            f"B={count} L={length} K={count // 4}, 6 per-token tensors",
            "",
            partial(draw.rollout, count, length),
            moved=_packing_bytes(count, length),
        )
        yield Case(
            "unpack",
            f"B={count} L={length} K={count // 4}, 6 tensors",
            "",
            partial(draw.packed_values, count, length),
            call=_unpack,
            moved=_packing_bytes(count, length, unpack=True),
        )


def _pruning(count: int, name: str, **options: Any) -> Case:
    def inputs(device: torch.device) -> Inputs:
        given = {"rewards": draw.rewards(count, device), **options}
        if options.get("prune") in ("shortest", "efficiency"):
            given["lengths"] = torch.arange(count, device=device) % 97
        return {**given, "group_size": 16, "prune_rate": 0.75}

    def seeded(inputs: Inputs, backend: str) -> Any:
        # Every backend draws the same.
        generator = torch.Generator().manual_seed(0)
        return cppo.advantages_and_prune(**inputs, generator=generator, backend=backend)

    call = seeded if options.get("prune") == "unbiased" else None
    return Case("advantages_and_prune", f"B={count} G=16 {name}", "", inputs, call=call)


def _unpack(inputs: Inputs, backend: str) -> Any:
    index = inputs["target_index"]
    placed = backends.pick("unpack", index, backend).unpack(
        list(inputs["values"].values()), index, *inputs["shape"]
    )
    return dict(zip(inputs["values"], placed, strict=True))


def _packing_bytes(count: int, length: int, unpack: bool = False) -> float:
    """Of six fp32 tensors per token, int64 indices and byte masks."""
    packed = cppo.pack_completions(**draw.rollout(count, length, torch.device("cpu")))
    kept, stream, targets = len(packed.kept), len(packed.input_ids), len(packed.targets)
    if unpack:
        return targets * (6 * 4 + 8) + count * length * 6 * 4
    read = kept * length * (8 + 1 + 1) + targets * 6 * 4
    return read + stream * 3 * 8 + targets * (3 * 8 + 6 * 4)


def _planner_cases(shapes: str) -> Iterator[Case]:
    sizes = {"toy": (64,), "small": (512,)}.get(shapes, (512, 8192))
    for count in sizes:
        for op, word, size in (
            ("plan_microbatches", "max_tokens", 8192),
            ("balance_ranks", "world_size", 8),
        ):
            yield Case(
                op,
                f"n={count} {word}={size}",
                "",
                lambda device, n=count, size=size: {  # type: ignore[misc]
                    "arguments": (draw.lengths(n), size)
                },
                call=lambda inputs, backend, op=op: getattr(backends.pick(op, None, backend), op)(
                    *inputs["arguments"]
                ),
            )
