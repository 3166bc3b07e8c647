"""`inplace=True`: which logits share memory, and what is refused for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import cppo
from cppo import LossConfig, Views, backends
from cppo.ops.memory import share_memory, shares_own_memory

every_backend = pytest.mark.parametrize("backend", backends.available("cppo_loss"))
V = 37


def batch(num_completions: int = 2, length: int = 5, **advantages: Any) -> dict[str, Any]:
    return {
        "targets": torch.randint(0, V, (num_completions, length)),
        "advantages": torch.ones(num_completions),
        **advantages,
    }


def gradients(views: Views, inplace: bool, backend: str, **given: Any) -> list[Tensor]:
    leaf = [view.requires_grad_() for view in views]
    out = cppo.cppo_loss(Views(*leaf), inplace=inplace, backend=backend, **given)
    return list(torch.autograd.grad(out.loss, leaf, allow_unused=True))


@every_backend
@pytest.mark.parametrize("divergence", ["k3", "full"])
def test_a_batch_without_a_positive_advantage(backend: str, divergence: str) -> None:
    """Its compact views are empty, and all empty tensors have one address."""
    given = batch(advantages=-torch.ones(2))
    given["config"] = LossConfig(divergence=divergence)
    anchor = torch.randn(2, 5, V)

    def views() -> Views:
        return Views(anchor.clone(), torch.empty(0, 5, V), torch.empty(0, 5, V))

    new, in_place = (gradients(views(), inplace, backend, **given) for inplace in (False, True))
    assert new[0].abs().max() > 0
    for one, other in zip(new, in_place, strict=True):
        assert torch.equal(one, other)


@every_backend
def test_a_batch_of_no_completions(backend: str) -> None:
    empty = Views(*(torch.empty(0, 5, V) for _ in range(3)))
    found = gradients(empty, True, backend, **batch(0))
    assert [gradient.numel() for gradient in found] == [0, 0, 0]


@every_backend
@pytest.mark.parametrize("stacked", [0, 1, 2])
def test_interleaved_views_of_one_tensor_are_apart(backend: str, stacked: int) -> None:
    """Slices of one tensor: their ranges of addresses cross, no entry is shared."""
    given = batch(config=LossConfig(cpl_coef=0.5))
    data = torch.randn(3, 2, 5, V)

    def views() -> Views:
        return Views(*torch.stack(data.unbind(), stacked).unbind(stacked))

    new, in_place = (gradients(views(), inplace, backend, **given) for inplace in (False, True))
    for one, other in zip(new, in_place, strict=True):
        assert torch.equal(one, other)


def shifted(by: int) -> Views:
    memory = torch.randn(3 * 2 * 5 * V)
    anchor, positive, negative = (memory[k * by :][: 2 * 5 * V].view(2, 5, V) for k in range(3))
    return Views(anchor, positive, negative)


OVERLAPS = {
    "one entry": shifted(2 * 5 * V - 1),
    "a row": shifted(9 * V),
    "all but an entry": shifted(1),
    "all": shifted(0),
    "transposed": (lambda x: Views(x, x.transpose(0, 1).contiguous(), x.transpose(0, 1)))(
        torch.randn(5, 5, V)
    ),
}


@every_backend
@pytest.mark.parametrize("case", OVERLAPS)
def test_views_that_overlap_are_refused(backend: str, case: str) -> None:
    views = OVERLAPS[case]
    given = batch(*views.anchor.shape[:2])
    with pytest.raises(
        ValueError,
        match=r"cppo.cppo_loss: logits.\w+ and logits.\w+ must not share memory with inplace=True",
    ):
        cppo.cppo_loss(views, inplace=True, backend=backend, **given)
    cppo.cppo_loss(views, backend=backend, **given)  # otherwise they are welcome


@every_backend
def test_what_the_backward_still_reads_is_not_overwritten(backend: str) -> None:
    memory = torch.randn(2, 5, V + 1)
    logits, values = memory[..., :V], memory[..., V]
    given = {**batch(), "advantages": values[:, 0]}
    cppo.cppo_loss(logits, inplace=True, backend=backend, **given)  # side by side
    given["advantages"] = logits[:, 0, 3]
    with pytest.raises(ValueError, match="logits and advantages must not share memory"):
        cppo.cppo_loss(logits, inplace=True, backend=backend, **given)
    targets = memory.double()
    same = targets.view(torch.int64)[..., 0].clamp_(0, V - 1)
    with pytest.raises(ValueError, match="cppo.token_stats: logits and targets must not share"):
        cppo.token_stats(targets, same, inplace=True, backend=backend)


@every_backend
@pytest.mark.parametrize("op", ["token_stats", "cppo_loss"])
def test_entries_that_are_one_place_are_refused(backend: str, op: str) -> None:
    windows = torch.randn(2 * 5 * V).as_strided((2, 5, V), (V, 1, 1))
    expanded = torch.randn(2, 1, V).expand(2, 5, V)
    extra = {} if op == "token_stats" else {"advantages": torch.ones(2)}
    for logits in (windows, expanded):
        given = {"targets": torch.zeros(2, 5, dtype=torch.int64), **extra}
        with pytest.raises(ValueError, match=rf"cppo.{op}: logits must have its own memory"):
            getattr(cppo, op)(logits, inplace=True, backend=backend, **given)


def random_strided(rng: random.Random, memory: Tensor) -> Tensor:
    dims = rng.randint(1, 3)
    sizes = [rng.choice([0, 1, 2, 3, 4, 5, 6, 7]) for _ in range(dims)]
    strides = [rng.choice([0, 1, 2, 3, 5, 7, 12]) for _ in range(dims)]
    reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n)
    return memory.as_strided(
        sizes, strides, rng.randint(0, min(40, len(memory) - 1 - max(reach, 0)))
    )


def test_shared_memory_is_found_exactly() -> None:
    """Against the places that two tensors really have, byte by byte."""
    rng, memory = random.Random(0), torch.zeros(1024, dtype=torch.uint8)
    found = []
    for _ in range(3000):
        one = random_strided(rng, memory.view(torch.float32))
        other = random_strided(rng, memory.view(torch.float16))
        places = []
        for tensor in (one, other):
            item = tensor.element_size()
            numbers = torch.arange(len(memory) // item)
            layout = tensor.shape, tensor.stride(), tensor.storage_offset()
            own = numbers.as_strided(*layout).flatten().tolist()
            places.append([item * place + k for place in own for k in range(item)])
        expected = bool(set(places[0]) & set(places[1]))
        assert share_memory(one, other) is share_memory(other, one) is expected
        assert shares_own_memory(one) is (len(places[0]) > len(set(places[0])))
        found.append(expected)
    assert 300 < sum(found) < 2700, sum(found)
