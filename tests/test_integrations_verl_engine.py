"""The verl adapter on verl's FSDP2 engine: updates, gradients, processes, fused statistics."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")

from verl_cases import (  # noqa: E402
    LOSS,
    accumulated,
    engine_and_batch,
    engine_for,
    gradients,
    half,
    load_example,
    run_two,
    update,
    worst,
)

import cppo  # noqa: E402
from cppo.integrations.verl_loss import contrasts  # noqa: E402
from cppo.seeds import seed_from  # noqa: E402
from cppo.views import perturb_pixel_values, views_from_names  # noqa: E402

example = load_example()

from tensordict import TensorDict  # noqa: E402
from verl.trainer.distillation import distillation_ppo_loss  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.engine.base import BaseEngine  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def made(one_process):
    return engine_and_batch(example)


@pytest.fixture(scope="module")
def engine(made):
    return made[0]


@pytest.fixture(scope="module")
def batch(made):
    return made[1]


def test_two_optimizer_steps_with_the_loss_and_the_views(capsys):
    history = example.main(steps=2)
    assert [row["actor/gated_completions"] > 0 for row in history] == [True, True]
    for row in history:
        assert 0 < row["actor/perception_tokens"] and 0 < row["actor/cpl_loss"] < 5
        assert 0 < row["grad_norm"] < 100
    assert "step 1" in capsys.readouterr().out


def response_logits(engine, batch):
    """(B, T, V) logits of the responses, right-padded, from the engine's own model."""
    inputs, _ = engine.prepare_model_inputs(micro_batch=batch)
    logits = engine.module(**inputs, use_cache=False).logits
    prompts, responses = (batch[name].offsets().diff() for name in ("prompts", "responses"))
    rows = [
        row[start - 1 : start - 1 + int(responses.max())]
        for row, start in zip(logits, prompts.tolist(), strict=True)
    ]
    longest = max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]
    )


def seen_as(engine, batch, name, perturbations):
    """The batch with its images perturbed as documented: by step, view, question and number."""
    rows = []
    for inputs, prompt in zip(batch["multi_modal_inputs"], batch["prompts"].unbind(), strict=True):
        content = str(inputs["pixel_values"].sum(dtype=torch.float64).item())
        question = (engine.lr_scheduler.last_epoch, name, content)
        pixel_values = perturb_pixel_values(
            inputs["pixel_values"],
            inputs["image_grid_thw"],
            views_from_names(list(perturbations)),
            seeds=[seed_from(0, *question, *prompt.tolist())],
            image_processor=engine.model_config.processor,
        )
        rows.append({**inputs, "pixel_values": pixel_values})
    view = batch.copy()
    tu.assign_non_tensor_stack(view, "multi_modal_inputs", rows)
    return view


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(divergence="k1", tau=0.5, detach_anchor=True),
        dict(gating=False, fraction=0.25),
        dict(cpl_reduction="token"),
        dict(perception="cpl_all"),
    ],
    ids=str,
)
def test_gradients_are_those_of_cppo_loss_on_three_views(engine, batch, options):
    whole = batch.copy()
    tu.assign_non_tensor(whole, micro_batch_size_per_gpu=len(batch))
    actor = example.actor_config(**LOSS, **options)
    ours = gradients(engine, whole, actor)

    default = cppo.CPPOConfig()
    views = cppo.Views(
        response_logits(engine, batch),
        response_logits(engine, seen_as(engine, batch, "positive", default.positive_views)),
        response_logits(engine, seen_as(engine, batch, "negative", default.negative_views)),
    )
    padded = batch.select("responses", "response_mask", "old_log_probs").to_padded_tensor()
    advantages = torch.stack([row[0] for row in batch["advantages"].unbind()])
    options = dict(cpl_reduction="sequence") | options
    config = cppo.LossConfig(cpl_coef=0.5, dual_clip=3.0, clip_high=0.2, **options)
    output = cppo.cppo_loss(
        views,
        padded["responses"],
        advantages,
        old_logps=padded["old_log_probs"],
        mask=padded["response_mask"].bool(),
        config=config,
    )
    engine.optimizer_zero_grad()
    output.loss.backward()
    expected = accumulated(engine)
    assert output.perception_mask.any()
    assert worst(ours, expected) < 2e-4
    # The contrastive term is no rounding error of these gradients.
    assert worst(gradients(engine, whole, example.actor_config(**LOSS | dict(cpl_coef=0))),
                 expected) > 1e-2  # fmt: skip


@pytest.mark.parametrize("entropy", [0.0, 0.5])
def test_gradients_of_papo_are_those_of_cppo_loss(engine, batch, entropy):
    """Completions with images all have a removing view; its entropy has a gradient of its own."""
    whole = batch.copy()
    tu.assign_non_tensor(whole, micro_batch_size_per_gpu=len(batch))
    options = dict(perception="papo", papo_coef=20.0)
    more = dict(papo_entropy_coef=entropy, negative_views=["masked_patches"])
    actor = example.actor_config(LOSS["loss_agg_mode"], **options, **more)
    ours = gradients(engine, whole, actor)
    negative = response_logits(engine, seen_as(engine, batch, "negative", ("masked_patches",)))
    padded = batch.select("responses", "response_mask", "old_log_probs").to_padded_tensor()
    mask = padded["response_mask"].bool()
    without = cppo.token_stats(negative, padded["responses"], mask=mask)
    output = cppo.cppo_loss(
        response_logits(engine, batch),
        padded["responses"],
        torch.stack([row[0] for row in batch["advantages"].unbind()]),
        old_logps=padded["old_log_probs"],
        removed_logps=without.logps.detach(),
        mask=mask,
        config=cppo.LossConfig(dual_clip=3.0, **options),
    )
    engine.optimizer_zero_grad()
    (output.loss + entropy * (without.entropy.sum(1) / mask.sum(1)).mean()).backward()
    expected = accumulated(engine)
    assert worst(ours, expected) < 2e-4
    plain = example.actor_config(LOSS["loss_agg_mode"], cpl_coef=0.0)
    assert worst(gradients(engine, whole, plain), expected) > 1e-2
    cut = batch.copy()
    tu.assign_non_tensor(cut, micro_batch_size_per_gpu=4)
    assert worst(gradients(engine, cut, actor), ours) < 2e-4


def test_micro_batches_do_not_change_the_gradient(engine, batch):
    actor, found = example.actor_config(**LOSS), []
    for size in (16, 4, 1):
        cut = batch.copy()
        tu.assign_non_tensor(cut, micro_batch_size_per_gpu=size)
        found.append(gradients(engine, cut, actor))
    assert max(worst(found[1], found[0]), worst(found[2], found[0])) < 2e-4


def test_a_mean_over_tokens_weighs_micro_batches_by_their_completions(engine, batch):
    actor = example.actor_config(**LOSS, cpl_reduction="token")
    whole = batch.copy()
    tu.assign_non_tensor(whole, micro_batch_size_per_gpu=8)
    parts = []
    for rows in (range(8), range(8, 16)):
        part = tu.index_select_tensor_dict(batch, list(rows))
        tu.assign_non_tensor(part, micro_batch_size_per_gpu=8, global_batch_size=8)
        parts.append(gradients(engine, part, actor))
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert worst(gradients(engine, whole, actor), mean) < 2e-4
    assert worst(parts[0], mean) > 1e-2


def test_a_mean_over_tokens_does_not_weigh_by_empty_rows(engine, batch):
    """A pruned mini-batch that does not divide is filled up with them."""
    actor = example.actor_config(**LOSS, cpl_reduction="token")
    kept = tu.index_select_tensor_dict(batch, list(range(12)))
    filled = batch.copy()
    for name in ("response_mask", "loss_mask"):
        rows = [row * (number < 12) for number, row in enumerate(batch[name].unbind())]
        filled[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    found = []
    for part in (kept, filled):
        tu.assign_non_tensor(part, micro_batch_size_per_gpu=len(part), global_batch_size=12)
        found.append(gradients(engine, part, actor))
    assert worst(*found) < 2e-4


def test_the_views_run_only_where_they_count(engine, batch, monkeypatch):
    forwards, forward = [], engine.module.forward
    monkeypatch.setattr(
        engine.module,
        "forward",
        lambda **k: (forwards.append(len(k["input_ids"])), forward(**k))[1],
    )
    actor = example.actor_config(**LOSS)
    looking = len(half(batch, positive=True))
    whole = batch.copy()
    tu.assign_non_tensor(whole, micro_batch_size_per_gpu=len(batch))
    gradients(engine, whole, actor)
    assert forwards == [16, looking, looking]

    forwards.clear()
    none = half(batch, positive=False)
    tu.assign_non_tensor(none, micro_batch_size_per_gpu=len(none))
    gradients(engine, none, actor)
    assert forwards == [len(none)]

    forwards.clear()
    text = half(batch, positive=True)
    tu.assign_non_tensor_stack(text, "multi_modal_inputs", [{}] * (looking - 1) + [
        text["multi_modal_inputs"][looking - 1]])  # fmt: skip
    images = engine.model_config.hf_config.image_token_id
    for name in ("input_ids", "prompts"):
        rows = list(text[name].unbind())
        rows[:-1] = [row.masked_fill(row == images, 3) for row in rows[:-1]]
        text[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    tu.assign_non_tensor(text, micro_batch_size_per_gpu=looking)
    gradients(engine, text, actor)
    assert forwards == [looking, 1, 1]


@pytest.mark.parametrize("policy_loss", [dict(cpl_coef=0), dict(cpl_coef=0.5, loss_mode="vanilla")])
def test_without_contrast_the_forward_step_is_verls(engine, batch, policy_loss, monkeypatch):
    actor = example.actor_config(LOSS["loss_agg_mode"], **policy_loss)
    ours = gradients(engine, batch, actor)
    plain = type(engine).forward_step.__wrapped__
    monkeypatch.setattr(type(engine), "forward_step", plain)
    expected = gradients(engine, batch, example.actor_config(**LOSS))
    assert worst(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("policy_loss", "sees_images", "refused"),
    [
        (dict(cpl_coef=0.5), True, True),
        (dict(cpl_coef=0.5), False, False),
        (dict(), True, False),
        (dict(cpl_coef=0.5, loss_mode="vanilla"), True, False),
    ],
    ids=str,
)
def test_an_engine_without_the_views_refuses_them_in_words(policy_loss, sees_images, refused):
    class MegatronEngine(BaseEngine):
        def __init__(self):
            vision = dict(vision_config={}) if sees_images else {}
            self.model_config = SimpleNamespace(hf_config=SimpleNamespace(**vision))

        def forward_step(self, batch_iter, model, *functions):
            raise AssertionError

        def optimizer_zero_grad(self):
            raise KeyError("the update begins")

    loss = partial(example.ppo_loss, config=example.actor_config(**policy_loss))
    expected = (
        (ValueError, "cpl_coef > 0: the perturbed views run in verl's FSDP engines only, got Mega")
        if refused
        else (KeyError, "the update begins")
    )
    with pytest.raises(expected[0], match=expected[1]):
        MegatronEngine().train_batch(TensorDict({}, batch_size=0), loss)


def test_distillation_does_not_drop_the_views_in_silence(engine, batch):
    keywords = dict(config=example.actor_config(**LOSS), distillation_config=None)
    with pytest.raises(ValueError, match="verl's ppo_loss only, got distillation_ppo_loss; turn"):
        engine.train_batch(batch.copy(), partial(distillation_ppo_loss, **keywords))
    plain = example.actor_config(**LOSS | dict(cpl_coef=0))
    assert not contrasts(engine, partial(distillation_ppo_loss, **keywords | {"config": plain}))


def test_entropy_reaches_the_loss_only_if_asked_for(engine, batch):
    seen = []
    actor = example.actor_config(**LOSS)

    def ppo_loss(config, model_output, data, dp_group=None):
        seen.append("entropy" in model_output)
        return example.ppo_loss(config, model_output, data, dp_group)

    for asked in (False, True):
        cut = half(batch, positive=True)
        tu.assign_non_tensor(cut, calculate_entropy=asked, micro_batch_size_per_gpu=len(cut))
        with engine.train_mode():
            engine.forward_backward_batch(cut, partial(ppo_loss, config=actor))
            engine.optimizer_zero_grad()
    assert seen == [False, True]


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """One of them has only completions with A <= 0, and must run the views all the same."""
    expected, metrics = update(example)
    found = run_two("halves", tmp_path)
    assert all(worst(own, expected) < 2e-4 for own, _ in found)
    assert [own["gated_completions"] > 0 for _, own in found] == [True, False]
    for name, value in metrics.items():
        # verl reports the mean over the ranks.
        assert (found[0][1][name] + found[1][1][name]) / 2 == pytest.approx(value, rel=1e-4)


# Fused statistics


@pytest.mark.parametrize("backend", ["cppo", "torch"])
def test_fused_statistics_behind_verls_switch(engine, batch, backend, stats_calls):
    options = dict(use_fused_kernels=True, fused_kernel_options=dict(impl_backend=backend))
    model_class = type(example.build_tiny_vlm(size="test")[0])
    forward = model_class.forward
    try:
        fused = engine_for(example, **options)
        on = batch.copy()
        tu.assign_non_tensor(on, use_fused_kernels=True)
        actor = example.actor_config(**LOSS)
        ours = gradients(fused, on, actor)
    finally:
        model_class.forward = forward
    assert worst(ours, gradients(engine, batch, actor)) < 2e-4
    assert bool(stats_calls) == (backend == "cppo")
