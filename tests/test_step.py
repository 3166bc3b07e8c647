"""Invariants of the update: how a batch is cut, ordered or gated changes nothing it computes."""

import dataclasses

import pytest
import torch
from trainer_cases import (
    FAMILIES,
    VISION_FAMILIES,
    config,
    fixed_case,
    gradients,
    relative_difference,
)

from cppo.model.forward import lm_head
from cppo.ops.loss import linear_cppo_loss
from cppo.records import NumItems
from cppo.seeds import seed_from
from cppo.train.algorithm import microbatch_loss
from cppo.train.selection import cut_surplus
from cppo.train.views import forward_views, perturbed_images, token_logps

FP64 = 1e-6  # the families' RMSNorm runs in fp32 whatever the dtype of the model
CASES = ("text", "qwen2_5_vl", "qwen3_vl")


def case(family, **options):
    """An fp64 model, its processor, and a batch with old and reference log-probabilities."""
    model, processor, batch = fixed_case(family, dtype=torch.float64, group_size=4)
    logps = token_logps(model, batch, config()).double()
    noise = torch.randn(2, *logps.shape, dtype=torch.float64) * 0.3
    per_token = {"old_logps": logps + noise[0], "ref_logps": logps + noise[1]}
    return model, processor, dataclasses.replace(batch, per_token=per_token)


def in_parts(model, processor, batch, parts, options):
    """Loss, gradients and outputs of the batch when it runs in these parts."""
    num_items = NumItems(*batch.counts(batch.kept))
    outputs = []

    def run():
        for rows in parts:
            output = microbatch_loss(model, batch, rows, num_items, options, processor)
            output.loss.backward()
            outputs.append(output)

    got = gradients(model, run)
    return sum(output.loss.item() for output in outputs), got, outputs


def totals(outputs):
    """Sums of the metrics over the parts, without those that are no sums."""
    total = {}
    for output in outputs:
        for name, value in output.metrics.items():
            total[name] = total.get(name, 0.0) + value.item()
    return {name: value for name, value in total.items() if name != "perception_share"}


def all_terms(**loss):
    """Every term of the loss at a weight at which a mistake in it shows."""
    return config(**{"cpl_coef": 1.0, "kl_coef": 0.5, "entropy_coef": 0.1, "max_length": 9, **loss})


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("family", CASES)
def test_one_batch_is_its_halves_is_its_microbatches(family, reduction):
    model, processor, batch = case(family)
    options = all_terms(reduction=reduction, importance="sequence")
    whole = batch.microbatches(batch.kept, 10**6)
    assert len(whole) == (1 if family == "text" else 2)  # with images and without
    loss, expected, outputs = in_parts(model, processor, batch, whole, options)
    metrics = totals(outputs)
    assert family == "text" or metrics["num_selected"] >= 4
    longest = max(batch.lengths(batch.kept))
    cuts = [batch.microbatches(batch.kept, tokens) for tokens in (longest, 3 * longest)]
    assert len(cuts[0]) > len(cuts[1]) > len(whole)
    for first, second in ((slice(7), slice(7, None)), (slice(1, None, 2), slice(0, None, 2))):
        halves = [batch.microbatches(batch.kept[part], 10**6) for part in (first, second)]
        cuts.append([rows for half in halves for rows in half])
    for cut in cuts:
        part_loss, got, outputs = in_parts(model, processor, batch, cut, options)
        assert part_loss == pytest.approx(loss, rel=FP64)
        assert relative_difference(got, expected) < FP64
        assert totals(outputs) == pytest.approx(metrics, rel=FP64)


def test_the_contrastive_mean_over_tokens_is_weighted_by_each_parts_share():
    model, processor, batch = case("qwen2_5_vl")
    options = config(cpl_coef=1.0, cpl_reduction="token")
    rows = batch.microbatches(batch.kept, 10**6)[0]  # those with images
    batch = dataclasses.replace(batch, kept=rows)
    parts = [rows[:5], rows[5:]]
    _, _, outputs = in_parts(model, processor, batch, parts, options)
    for part, output in zip(parts, outputs, strict=True):
        own = NumItems(len(part), 1)
        alone = microbatch_loss(model, batch, part, own, options, processor)
        share = len(part) / len(batch.kept)
        ratio = output.metrics["cpl_loss"] / alone.metrics["cpl_loss"]
        assert ratio.item() == pytest.approx(share, rel=FP64)
    # Given the number of selected tokens of the whole, the parts do add up to it.
    counts = [int(output.metrics["num_selected"]) for output in outputs]
    whole = microbatch_loss(model, batch, rows, NumItems(12, 1), options, processor)
    assert sum(counts) == whole.metrics["num_selected"]
    num_items = NumItems(12, 1, sum(counts))
    known = [microbatch_loss(model, batch, p, num_items, options, processor) for p in parts]
    total = sum(output.metrics["cpl_loss"].item() for output in known)
    assert total == pytest.approx(whole.metrics["cpl_loss"].item(), rel=FP64)


@pytest.mark.parametrize("divergence", ["k3", "full"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_gated_forward_is_the_full_one(family, divergence):
    model, processor, batch = case(family)
    options = all_terms(divergence=divergence)
    every = dataclasses.replace(options, loss=dataclasses.replace(options.loss, gating=False))
    rows = batch.microbatches(batch.kept, 10**6)[0]  # those with images
    advantages = batch.advantages[rows]
    num_items = NumItems(*batch.counts(rows))

    def full():
        hidden, stream = forward_views(model, batch, rows, every, processor)
        assert len(hidden.positive) == len(hidden.negative) == len(hidden.anchor)
        return linear_cppo_loss(
            hidden,
            lm_head(model)[0],
            stream.targets,
            advantages,
            **stream.per_token,
            cu_seqlens=stream.row_cu_seqlens,
            num_items=num_items,
            config=options.loss,
        )

    expected = full()
    expected_gradients = gradients(model, expected.loss)
    ours = microbatch_loss(model, batch, rows, num_items, options, processor)
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=FP64)
    assert relative_difference(gradients(model, ours.loss), expected_gradients) < FP64
    assert torch.equal(ours.perception_mask, expected.perception_mask)
    assert ours.perception_mask.any()
    hidden, _ = forward_views(model, batch, rows, options, processor)
    gated = int(batch.rollouts.completion_mask[rows][advantages > 0].sum())
    assert len(hidden.positive) == len(hidden.negative) == gated < len(hidden.anchor)


def test_completions_without_positive_advantage_run_no_view():
    model, processor, batch = case("qwen2_5_vl")
    rows = batch.kept[batch.advantages < 0]
    hidden, _ = forward_views(model, batch, rows, config(), processor)
    assert hidden.positive is None and hidden.negative is None
    output = microbatch_loss(
        model, batch, rows, NumItems(*batch.counts(rows)), all_terms(), processor
    )
    assert output.loss.isfinite() and not output.perception_mask.any()
    # Nor does a question without an image, nor a coefficient of zero.
    rows = torch.tensor([8, 9, 10, 11])
    assert forward_views(model, batch, rows, config(), processor)[0].positive is None
    hidden, _ = forward_views(model, batch, batch.kept, config(cpl_coef=0.0), processor)
    assert hidden.positive is None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_questions_views_do_not_depend_on_its_microbatch(family):
    _, processor, batch = fixed_case(family)
    images = batch.rollouts.prompts.images

    def views(questions, seed=7):
        moved = dataclasses.replace(batch, seed=seed)
        result = []
        for view in perturbed_images(moved, questions, config(), processor):
            assert view.per_question == tuple(images.per_question[q] for q in questions)
            split = {}
            for question, own in zip(questions, view.prepared, strict=True):
                sizes = own["image_grid_thw"].prod(1).tolist() if own else []
                split[question] = own["pixel_values"].split(sizes) if own else ()
            result.append(split)
        return result

    together, alone, other = views([0, 1, 2, 3]), views([1]), views([1], seed=8)
    for which in (0, 1):
        assert len(alone[which][1]) == 2
        for ours, expected in zip(alone[which][1], together[which][1], strict=True):
            assert torch.equal(ours, expected)
        assert any(
            not torch.equal(a, b) for a, b in zip(alone[which][1], other[which][1], strict=True)
        )
    original = images.of([1])
    assert not torch.equal(torch.cat(alone[0][1]), original.joined("pixel_values"))
    assert not torch.equal(torch.cat(alone[0][1]), torch.cat(alone[1][1]))


@pytest.mark.parametrize("budget", [10**6, 260])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_are_encoded_once_per_question_and_view(family, budget, monkeypatch):
    model, processor, batch = case(family)
    encoded = []
    stock = model.model.get_image_features

    def encode(*, image_grid_thw, **options):
        encoded.append(len(image_grid_thw))
        return stock(image_grid_thw=image_grid_thw, **options)

    monkeypatch.setattr(model.model, "get_image_features", encode)
    parts = batch.microbatches(batch.kept, budget)
    assert len(parts) == (2 if budget == 10**6 else 3)  # with images, and without
    for rows in parts:
        microbatch_loss(model, batch, rows, NumItems(16, 99), config(cpl_coef=0.5), processor)
    # Four images, twelve completions that look at them, three views.
    assert sum(encoded) == 3 * 4


def test_seeds_depend_on_every_part():
    parts = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), ("0", "a", 1), (0, "a1"), (0, "a")]
    seeds = [seed_from(*values) for values in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(0, "a", 1) == seeds[0]


@pytest.mark.parametrize(
    ("kept", "advantages", "size", "left"),
    [
        ([0, 1, 2, 3], [1.0, -2.0, 3.0, -0.5], 4, [0, 1, 2, 3]),  # nothing to cut
        ([0, 1, 2, 3], [1.0, -2.0, 3.0, -0.5], 3, [0, 1, 2]),  # the last question's smaller one
        ([0, 1, 2, 3], [1.0, -2.0, 3.0, -0.5], 2, [1, 2]),  # then the first's
        ([0, 1, 2, 3], [1.0, -2.0, 3.0, -0.5], 1, [1]),  # one each: the last question's goes
        ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0], 3, [0, 1, 2]),  # of equal ones the last
        ([0, 1, 2], [0.1, 0.2, 9.0, 9.0], 2, [1, 2]),  # the question with the most gives
        ([0, 1, 3], [1.0, 2.0, 3.0, 0.0], 9, [0, 1, 3]),  # fewer than may stay
        ([], [1.0, 1.0, 1.0, 1.0], 2, []),
    ],
)
def test_cutting_the_surplus(kept, advantages, size, left):
    rows = torch.tensor(kept, dtype=torch.int64)
    result = cut_surplus(rows, torch.tensor(advantages), 2, size)
    assert result.tolist() == left and result.dtype == torch.int64


def test_microbatches_hold_every_row_once_within_the_budget():
    # A budget below the longest completion counts as that completion's length.
    _, _, batch = fixed_case("text", group_size=4)
    lengths = batch.lengths(batch.kept)
    for budget in (1, 30, 100, 10**6):
        parts = batch.microbatches(batch.kept, budget)
        assert sorted(torch.cat(parts).tolist()) == batch.kept.tolist()
        for part in parts:
            assert sum(batch.lengths(part)) <= max(budget, *lengths)
    assert len(batch.microbatches(batch.kept, sum(lengths))) == 1
    assert batch.microbatches(batch.kept[:0], 100) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_passs_ratio_is_exactly_one(family, precision):
    model, processor, batch = fixed_case(family, group_size=4)
    options = config(max_tokens_per_microbatch=150)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        old = token_logps(model.eval(), batch, options)
        on_policy = dataclasses.replace(batch, per_token={"old_logps": old})
        model.train()
        parts = batch.microbatches(batch.kept, 150)
        assert len(parts) > 1
        for rows in parts:
            num_items = NumItems(*batch.counts(batch.kept))
            output = microbatch_loss(model, on_policy, rows, num_items, options, processor)
            assert torch.equal(output.logps.detach(), on_policy.pack(rows).per_token["old_logps"])
            without = microbatch_loss(model, batch, rows, num_items, options, processor)
            assert torch.equal(output.loss, without.loss)
