"""A backend is its primitives: the loss that is composed of plain ones is the specification's."""

from __future__ import annotations

import pytest
import torch

from cppo import LossConfig, NumItems, Views, reference
from cppo.fused.batch import OF_ROWS
from cppo.testing import in_fp64, make_inputs, with_weights


@pytest.fixture(scope="module")
def plain():
    from plain_backend import backend

    return backend()


CONFIGS = {
    "default": LossConfig(),
    "k1": LossConfig(divergence="k1", detach_anchor=True, cpl_coef=0.5, cpl_reduction="token"),
    "full": LossConfig(divergence="full", cpl_coef=0.5, reduction="dapo"),
    "full, detached": LossConfig(divergence="full", detach_anchor=True, cpl_reduction="token"),
    "gspo": LossConfig(importance="sequence", entropy_coef=0.01, gating=False),
    "dr_grpo": LossConfig(reduction="dr_grpo", max_length=9, kl_coef=0.1, cpl_coef=0.5),
    "token_mask": LossConfig(importance_correction="token_mask", correction_max=1.1),
    "gspo, sequence_truncate": LossConfig(
        importance="sequence", importance_correction="sequence_truncate", correction_max=1.1
    ),
    "bypass": LossConfig(importance_correction="bypass", kl_coef=0.1),
}
NUM_ITEMS = {"whole": None, "a number": 7.5, "counts": NumItems(11, 50), "all": NumItems(11, 50, 6)}


def _results(op, inputs, views, **changes):
    """Every output of the loss, and the gradients of the views and the head."""
    views = Views(*(view.detach().clone().requires_grad_() for view in views))
    head = [inputs[name].clone().requires_grad_() for name in ("weight",) if name in inputs]
    rows = ("targets", "advantages", *OF_ROWS, "mask", "cu_seqlens")
    given = {name: inputs[name] for name in rows if name in inputs}
    out = op(views, *head, **given, **changes)
    gradients = torch.autograd.grad(out.loss, [*views, *head], allow_unused=True)
    names = ("loss", "logps", "entropy", "perception_mask")
    found = dict(zip(names, out[:4], strict=True)) | dict(out.metrics)
    return found | dict(enumerate(gradients))


@pytest.mark.parametrize("num_items", NUM_ITEMS.values(), ids=NUM_ITEMS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("op", ["cppo_loss", "linear_cppo_loss"])
def test_composed_of_plain_primitives_it_is_the_specification(plain, op, layout, config, num_items):
    inputs = make_inputs(op, layout=layout) | {"config": config}
    if config.importance_correction != "none":
        inputs = with_weights(inputs)
    inputs = in_fp64(inputs)
    views = inputs["logits" if op == "cppo_loss" else "hidden"]
    changes = {"config": config, "num_items": num_items}
    ours = _results(getattr(plain, op), inputs, views, **changes)
    exact = _results(getattr(reference, op), inputs, views, **changes)
    for name, value in exact.items():
        if value is not None:
            assert ours[name] is not None, name
            torch.testing.assert_close(
                ours[name].to(value.dtype), value, msg=lambda m, n=name: f"{n}: {m}"
            )
