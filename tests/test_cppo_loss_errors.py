"""Every wrong call of the two losses says what is wrong."""

from __future__ import annotations

import math
import re

import pytest
import torch

import cppo
from cppo import LossConfig, NumItems
from cppo.testing import make_inputs

PADDED = make_inputs("cppo_loss")
PACKED = make_inputs("cppo_loss", layout="packed")
LINEAR = make_inputs("linear_cppo_loss")
Z, S = PADDED["logits"], PACKED["logits"]
Y, A, LOGPS = PADDED["targets"], PADDED["advantages"], PADDED["old_logps"]


CORRECTED = LossConfig(importance_correction="token_mask")


def W(weight):
    """Weights of 1, one of which is another; NaN where they are masked."""
    weights = torch.ones(6, 7).masked_fill(~PADDED["mask"], math.nan)
    weights[0, 3] = weight
    return weights


def views(**changes):
    return {"logits": Z._replace(**changes)}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Changes of good padded inputs; the error; what its message holds.
PADDED_ERRORS = [
    ({"logits": [1.0]}, TypeError, "logits must be a Tensor or cppo.Views, got list"),
    ({"logits": (Z.anchor,)}, TypeError, "logits must be a Tensor or cppo.Views, got tuple"),
    ({"logits": Z.anchor.long()}, TypeError, "logits must be of floating dtype, got torch.int64"),
    (
        {"logits": Z.anchor.to(torch.float8_e5m2)},
        TypeError,
        "logits must be of floating dtype of at least 16 bits, got torch.float8_e5m2",
    ),
    (views(anchor=None), TypeError, "logits.anchor must be a Tensor, got NoneType"),
    (views(negative=Z.negative.half()), TypeError, "torch.float32 like logits.anchor"),
    (views(positive=Z.positive.long()), TypeError, "logits.positive must be of floating dtype"),
    (views(positive=None), ValueError, "positive must be given with logits.negative when"),
    (views(negative=None), ValueError, "logits.negative must be given with logits.positive"),
    (views(positive=Z.positive[:2]), ValueError, "6 rows (all) or 3 (those of completions with A"),
    (views(negative=Z.negative[..., 1:]), ValueError, "(rows, 7, 37) like logits.anchor"),
    (views(negative=Z.negative[:, 1:]), ValueError, "got (6, 6, 37)"),
    (views(negative=Z.negative.to("meta")), ValueError, "negative must be on cpu"),
    (
        {**views(positive=Z.positive[:3]), "config": LossConfig(gating=False)},
        ValueError,
        "logits.positive must have all 6 rows when config.gating is off, got 3",
    ),
    ({"logits": Z.anchor[0]}, ValueError, "logits must be (B, L, V) = (6, 7, V >= 1)"),
    ({"targets": Y[:, 1:]}, ValueError, "like targets, got (6, 7, 37)"),
    ({"targets": Y.float()}, TypeError, "targets must be of integer dtype"),
    ({"targets": Y[..., None]}, ValueError, "targets must be (B, L) or (T,)"),
    ({"targets": Y.masked_fill(Y == Y[0, 3], 37)}, ValueError, "[0, 37) where not masked, got 37"),
    ({"mask": None}, ValueError, "where not masked, got -100 at (0, 5)"),
    ({"mask": PADDED["mask"][0]}, ValueError, "mask must be (B, L) = (6, 7) like targets"),
    ({"mask": PADDED["mask"].tolist()}, TypeError, "mask must be a Tensor, got list"),
    ({"advantages": A[:5]}, ValueError, "advantages must be (B,) = (6,) like targets, got (5,)"),
    ({"advantages": A[:, None]}, ValueError, "advantages must be (B,), got shape (6, 1)"),
    ({"advantages": A.long()}, TypeError, "advantages must be of floating dtype"),
    ({"advantages": A / 0 * 0}, ValueError, "advantages must be finite, got nan at index 0"),
    ({"advantages": A.to("meta")}, ValueError, "advantages must be on cpu like logits.anchor"),
    ({"old_logps": LOGPS[0]}, ValueError, "old_logps must be (B, L) = (6, 7) like targets"),
    ({"old_logps": Y}, TypeError, "old_logps must be of floating dtype"),
    (
        {"sampling_logps": LOGPS[0]},
        ValueError,
        "sampling_logps must be (B, L) = (6, 7) like targets",
    ),
    ({"sampling_logps": LOGPS.long()}, TypeError, "sampling_logps must be of floating dtype"),
    (
        {"config": CORRECTED},
        ValueError,
        "sampling_logps must be given with config.importance_correction = 'token_mask', got None",
    ),
    (
        {"config": LossConfig(importance_correction="bypass"), "sampling_logps": LOGPS},
        ValueError,
        "old_logps must be None with config.importance_correction = 'bypass', which puts",
    ),
    ({"token_weights": LOGPS.exp()[:5]}, ValueError, "token_weights must be (B, L) = (6, 7) like"),
    ({"token_weights": Y}, TypeError, "token_weights must be of floating dtype"),
    ({"token_weights": W(-0.5)}, ValueError, ">= 0 where not masked, got -0.5 at (0, 3)"),
    ({"token_weights": W(math.nan)}, ValueError, "token_weights must be finite and >= 0 where"),
    ({"token_weights": W(math.inf)}, ValueError, "got inf at (0, 3)"),
    ({"token_weights": W(1.0).to("meta")}, ValueError, "token_weights must be on cpu"),
    ({"ref_logps": LOGPS[:, 1:]}, ValueError, "ref_logps must be (B, L) = (6, 7)"),
    (
        {"ref_logps": None, "config": LossConfig(kl_coef=0.1)},
        ValueError,
        "ref_logps must be given when config.kl_coef > 0, got None with kl_coef = 0.1",
    ),
    (
        {"config": LossConfig(perception="vppo"), "logits": PADDED["logits"].anchor},
        ValueError,
        "token_weights must be given with config.perception = 'vppo', got None",
    ),
    (
        {"config": LossConfig(perception="papo"), "logits": PADDED["logits"].anchor},
        ValueError,
        "removed_logps must be given with config.perception = 'papo', got None",
    ),
    (
        {"config": LossConfig(perception="papo"), "removed_logps": LOGPS},
        ValueError,
        "logits must be the anchor alone with config.perception = 'papo', which has no",
    ),
    ({"removed_logps": LOGPS[:, 1:]}, ValueError, "removed_logps must be (B, L) = (6, 7)"),
    ({"removed_logps": Y}, TypeError, "removed_logps must be of floating dtype"),
    ({"cu_seqlens": ints(0, 42)}, ValueError, "cu_seqlens must be None for padded targets"),
    ({"num_items": 0}, ValueError, "num_items must be a number or 0-dim tensor > 0, got 0"),
    ({"num_items": -2.0}, ValueError, "got -2.0"),
    ({"num_items": math.inf}, ValueError, "got inf"),
    ({"num_items": torch.tensor(0)}, ValueError, "> 0, got 0"),
    ({"num_items": torch.tensor([6])}, ValueError, "0-dim tensor > 0, got (1,)"),
    ({"num_items": "6"}, TypeError, "got str"),
    ({"num_items": True}, TypeError, "got bool"),
    ({"num_items": NumItems(6, -1)}, ValueError, "num_items.tokens must be a number or 0-dim"),
    ({"config": {"cpl_coef": 0.1}}, TypeError, "config must be a cppo.LossConfig, got dict"),
    ({"backend": "fast"}, ValueError, "backend"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run here"),
]

PACKED_ERRORS = [
    ({"cu_seqlens": None}, ValueError, "cu_seqlens must be given for packed targets"),
    ({"cu_seqlens": ints(0, 21)}, ValueError, "(B + 1,) = (7,) for advantages of 6 completions"),
    ({"cu_seqlens": ints(1, 5, 7, 14, 14, 17, 21)}, ValueError, "must start at 0, got 1"),
    ({"cu_seqlens": ints(0, 5, 7, 14, 14, 17, 20)}, ValueError, "must end at T = 21, got 20"),
    (
        {"cu_seqlens": ints(0, 5, 4, 14, 14, 17, 21)},
        ValueError,
        "decrease, got 5 then 4 at index 2",
    ),
    ({"cu_seqlens": torch.rand(7)}, TypeError, "cu_seqlens must be of integer dtype"),
    (
        {"logits": S._replace(negative=S.negative[:13])},
        ValueError,
        "21 rows (all) or 12 (those of completions with A > 0), got 13",
    ),
    (
        {"num_items": NumItems(6, 21), "config": LossConfig(reduction="dr_grpo")},
        ValueError,
        "config.max_length must be given for reduction 'dr_grpo' with NumItems",
    ),
    ({"mask": PADDED["mask"]}, ValueError, "mask must be (T,) = (21,) like targets, got (6, 7)"),
]

LINEAR_ERRORS = [
    ({"weight": LINEAR["weight"].half()}, TypeError, "weight must be torch.float32 like hidden"),
    ({"weight": LINEAR["weight"][:, 1:]}, ValueError, "(V, D) = (V >= 1, 8) like hidden"),
    ({"weight": LINEAR["weight"].tolist()}, TypeError, "weight must be a Tensor, got list"),
    ({"bias": LINEAR["bias"][1:]}, ValueError, "bias must be (V,) = (37,) like weight, got (36,)"),
    ({"bias": LINEAR["bias"].double()}, TypeError, "bias must be torch.float32 like hidden"),
    ({"weight": LINEAR["weight"][:9], "bias": None}, ValueError, "[0, V) = [0, 9) where not"),
    ({"hidden": LINEAR["hidden"].anchor[..., :0]}, ValueError, "D >= 1"),
    (
        {"hidden": LINEAR["hidden"]._replace(negative=3)},
        TypeError,
        "hidden.negative must be a Tensor, got int",
    ),
]

TABLE = [
    *(("cppo_loss", PADDED, *row) for row in PADDED_ERRORS),
    *(("cppo_loss", PACKED, *row) for row in PACKED_ERRORS),
    *(("linear_cppo_loss", LINEAR, *row) for row in LINEAR_ERRORS),
]


@pytest.mark.parametrize(
    ("op", "good", "changes", "error", "message"), TABLE, ids=[row[-1] for row in TABLE]
)
def test_bad_input(op, good, changes, error, message):
    with pytest.raises(error, match=rf"^cppo\.{op}: .*{re.escape(message)}"):
        getattr(cppo, op)(**{**good, **changes})


@pytest.mark.parametrize(
    ("op", "good"), [("cppo_loss", PADDED), ("cppo_loss", PACKED), ("linear_cppo_loss", LINEAR)]
)
def test_the_good_inputs_are_good(op, good):
    assert getattr(cppo, op)(**good).loss.isfinite()
