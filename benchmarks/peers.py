"""Who is measured beside cppo: each only if it is installed, else with the reason.

A library that gives per-token log-probabilities and entropies is composed for three views by the
arithmetic of `eager.contrastive_loss`, which is the same for all of them: once over every row of
every view (the authors' scheme) and, where completions with A <= 0 need no perturbed view, once
with those rows left out beforehand ("gated"). A new peer is one entry of PEERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.benchmarks import eager
from cppo.benchmarks.calls import Call, Outputs, ours
from cppo.benchmarks.cases import Case
from cppo.benchmarks.environment import version
from cppo.benchmarks.inputs import Inputs

LINEAR_CHUNK = 32_768  # TRL's own chunk of the vocabulary
COMPILED_ROWS = 8192  # on a GPU


class Unavailable(Exception):
    """Why a peer cannot take part; the text is shown in its place."""


@dataclass(frozen=True)
class Competitor:
    """One way to compute a case.

    Args:
        peer: its name in tables and rows.
        call: inputs to the op's result, or to a part of its outputs by name; differentiable.
        note: what it leaves out or does differently.
        fixed_shape: compiled for one shape: it is checked on the timed call alone.
        views_held: how many (T, V) fp32 tensors it holds at its peak, about.
    """

    peer: str
    call: Call
    note: str = ""
    fixed_shape: bool = False
    views_held: float = 0.0


@dataclass(frozen=True)
class Peer:
    """A library: `distribution` to look its version up, and what it has for each kind of op.

    logits: (logits, targets, with_entropy) -> (logps, entropy) or None; linear: the same from
    (hidden, weight). `why_not(device)` is '' where it runs. no_entropy: log-probabilities alone.
    """

    name: str
    distribution: str
    logits: Callable[[], eager.Stats] | None = None
    linear: Callable[[], Callable[..., tuple[Tensor, Tensor | None]]] | None = None
    gpu_only: tuple[str, ...] = ()
    no_entropy: bool = False
    note: str = ""


# What the libraries have, with one signature


def _trl_logits() -> eager.Stats:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def stats(logits: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        if not with_entropy:
            return selective_log_softmax(logits, targets), None
        return selective_log_softmax_and_entropy(logits, targets)

    return stats


def _trl_linear() -> Callable[..., Any]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def stats(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        outputs = ("entropy",) if with_entropy else ()
        rows = hidden.flatten(0, -2)
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            rows, weight, None, targets.flatten(), 1.0, LINEAR_CHUNK, None, 1.0, outputs
        )
        entropy = None if entropy is None else entropy.view_as(targets)
        return logps.view_as(targets), entropy

    return stats


def _liger_linear() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def stats(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        rows, flat = hidden.flatten(0, -2), targets.flatten()
        result = Function.apply(rows, weight, flat, 1.0, -100, 1, with_entropy)
        if not with_entropy:
            nll = result[0] if isinstance(result, tuple) else result
            return -nll.view_as(targets), None
        return -result[0].view_as(targets), result[1].view_as(targets)

    return stats


def _verl_linear() -> Callable[..., Any]:
    if torch.cuda.is_available():
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        def fused(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Any:
            rows, flat = hidden.flatten(0, -2), targets.flatten()
            logps, entropy = linear_cross_entropy(rows, weight, flat, 1.0, "none", None)
            return logps.view_as(targets), entropy.view_as(targets)

        return fused
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module = FusedLinearForPPO()

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        logps, entropy = module(hidden.flatten(0, -2), weight, targets.flatten(), 1.0)
        return logps.view_as(targets), entropy.view_as(targets)

    return chunked


def _torch_linear() -> Callable[..., Any]:
    options = torch.nn.LinearCrossEntropyOptions()

    def stats(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        rows, flat = hidden.flatten(0, -2), targets.flatten()
        nll = F.linear_cross_entropy(rows, weight, flat, reduction="none", options=options)
        return -nll.view_as(targets), None

    return stats


def _flash_logits() -> eager.Stats:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def stats(logits: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        losses, _ = cross_entropy_loss(logits.flatten(0, -2), targets.flatten())
        return -losses.view_as(targets), None

    return stats


PEERS = (
    Peer("trl", "trl", _trl_logits, _trl_linear),
    Peer("liger", "liger-kernel", None, _liger_linear),
    Peer("verl", "verl", None, _verl_linear),
    Peer(
        "torch linear_cross_entropy",
        "torch",
        None,
        _torch_linear,
        no_entropy=True,
        note="log-probabilities alone",
    ),
    Peer(
        "flash-attn",
        "flash-attn",
        _flash_logits,
        None,
        gpu_only=("logits",),
        no_entropy=True,
        note="log-probabilities alone",
    ),
)
NAMES = ("eager", "compile", *(peer.name.split()[0] for peer in PEERS))


def competitors(
    case: Case, device: torch.device, against: tuple[str, ...] = NAMES
) -> tuple[list[Competitor], dict[str, str]]:
    """Those that can compute `case` here, and for each that cannot, why."""
    found: list[Competitor] = []
    absent: dict[str, str] = {}
    if "eager" in against:
        found += _eager(case)
    if "compile" in against and case.sizes is not None:
        if reason := _not_compiled(case, device):
            absent["compile"] = reason
        else:
            found += [_compiled(case)]
    for peer in PEERS:
        if peer.name.split()[0] not in against or case.sizes is None:
            continue
        try:
            found += _of_library(peer, case, device)
        except Unavailable as reason:
            absent[peer.name] = str(reason)
    return found, absent


def _eager(case: Case) -> list[Competitor]:
    if case.sizes is None:
        # Indices and entropies: the specification is the plain PyTorch (or Python) way.
        found = [Competitor("eager", ours(case, "reference"))]
        if case.op == "unpack":
            found.append(Competitor("eager, mask", _unpack_by_mask))
        return found
    if case.op.endswith("token_stats"):
        function = eager.linear_token_stats if case.sizes.hidden else eager.token_stats
        return [Competitor("eager", lambda inputs: function(**inputs), views_held=4)]
    if case.sizes.divergence == "full":
        return [
            Competitor("eager", lambda x: eager.full_divergence_loss(*_arguments(x)), views_held=9)
        ]
    stats = _linear_eager if case.sizes.hidden else lambda inputs: eager.view_stats
    return _compositions("eager", stats, case, views_held=9)


def _unpack_by_mask(inputs: Inputs) -> dict[str, Tensor]:
    """As one writes it without the flat positions that packing has found out."""
    placed = {}
    for name, value in inputs["values"].items():
        placed[name] = value.new_zeros(inputs["shape"])
        placed[name][inputs["mask"]] = value
    return placed


def _linear_eager(inputs: Inputs) -> eager.Stats:
    def stats(hidden: Tensor, targets: Tensor, with_entropy: bool) -> Any:
        return eager.view_stats(F.linear(hidden, inputs["weight"]), targets, with_entropy)

    return stats


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    views = inputs.get("logits", inputs.get("hidden"))
    return views, inputs["targets"], inputs["advantages"], inputs["config"]


def _compositions(
    name: str,
    stats: Callable[[Inputs], eager.Stats],
    case: Case,
    note: str = "",
    views_held: float = 0.0,
) -> list[Competitor]:
    """A loss from per-token statistics: all rows, and without the rows that never matter."""
    assert case.sizes is not None

    def all_rows(inputs: Inputs) -> Outputs:
        return eager.contrastive_loss(stats(inputs), *_arguments(inputs))

    def gated(inputs: Inputs) -> Outputs:
        views, targets, advantages, config = _arguments(inputs)
        views, looking = eager.looking_part(views, advantages)
        return eager.contrastive_loss(stats(inputs), views, targets, advantages, config, looking)

    found = [Competitor(name, all_rows, note, views_held=views_held)]
    if case.sizes.views == 3 and case.sizes.looking < 1:
        found.append(Competitor(f"{name}, gated", gated, note, views_held=views_held * 2 / 3))
    return found


def _not_compiled(case: Case, device: torch.device) -> str:
    """Why torch.compile is left out, or '': a graph takes up to a minute for each case and mode."""
    assert case.sizes is not None
    if case.sizes.hidden or case.sizes.divergence == "full":
        return "not run: compiled for logits and the sampled token alone"
    if device.type == "cuda":
        if case.sizes.rows > COMPILED_ROWS or case.dtype != "bf16" or case.sizes.inplace:
            return f"not run: compiled in bf16 for up to {COMPILED_ROWS} rows"
    return ""


def _compiled(case: Case) -> Competitor:
    """torch.compile of the best eager composition; the rows are chosen outside of the graph."""
    assert case.sizes is not None
    torch._dynamo.config.recompile_limit = (
        1000  # a graph for each case and mode, kept for each pass
    )
    compile_ = partial(torch.compile, dynamic=False)
    if case.op.endswith("token_stats"):
        function = compile_(eager.token_stats)
        return Competitor("compile", lambda x: function(**x), fixed_shape=True, views_held=3)

    def whole(inputs: Inputs, views: Any, looking: Tensor | None) -> Outputs:
        return eager.contrastive_loss(
            eager.view_stats,
            views,
            inputs["targets"],
            inputs["advantages"],
            inputs["config"],
            looking,
        )

    graph = compile_(whole)
    is_gated = case.sizes.views == 3 and case.sizes.looking < 1

    def run(inputs: Inputs) -> Outputs:
        views, _, advantages, _ = _arguments(inputs)
        looking = None
        if is_gated:
            views, looking = eager.looking_part(views, advantages)
        return dict(graph(inputs, views, looking))

    name = "compile, gated" if is_gated else "compile"
    return Competitor(name, run, fixed_shape=True, views_held=6)


def _of_library(peer: Peer, case: Case, device: torch.device) -> list[Competitor]:
    assert case.sizes is not None
    kind = "linear" if case.sizes.hidden else "logits"
    load = peer.linear if kind == "linear" else peer.logits
    if load is None or case.sizes.divergence == "full":
        return []
    is_loss = case.op.endswith("loss")
    if peer.no_entropy and is_loss:
        return []
    if not version(peer.distribution):
        raise Unavailable("not installed")
    if kind in peer.gpu_only and device.type != "cuda":
        raise Unavailable("needs a GPU")
    try:
        stats = load()
    except Exception as error:
        raise Unavailable(f"does not load: {str(error).splitlines()[0][:80]}") from error
    if kind == "linear":
        per_view = stats

        def bind(inputs: Inputs) -> eager.Stats:
            return lambda rows, targets, with_entropy: per_view(
                rows, inputs["weight"], targets, with_entropy
            )
    else:

        def bind(inputs: Inputs) -> eager.Stats:
            return stats

    if is_loss:
        return _compositions(peer.name, bind, case, peer.note)

    def both(inputs: Inputs) -> Outputs:
        rows = inputs.get("hidden", inputs.get("logits"))
        logps, entropy = bind(inputs)(rows, inputs["targets"], not peer.no_entropy)
        return {"logps": logps} if entropy is None else {"logps": logps, "entropy": entropy}

    return [Competitor(peer.name, both, peer.note)]


def installed() -> dict[str, str]:
    """{peer: its version, or '' where it is not installed}."""
    return {peer.name: version(peer.distribution) for peer in PEERS}
