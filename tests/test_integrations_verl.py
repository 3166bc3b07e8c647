"""The verl adapter in verl: loading, policy loss, advantages, and the page about it."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

verl = pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")

from verl_cases import ROOT, composed, load_example  # noqa: E402

import cppo  # noqa: E402
from cppo.integrations import verl_loss  # noqa: E402
from cppo.integrations.verl_options import Pruning  # noqa: E402

example = load_example()

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass, validate_config  # noqa: E402


def test_verl_loads_the_plugin_and_the_plugin_loads_nothing():
    code = (
        "import sys, verl\n"
        "late = [m for m in sys.modules if m.startswith(('verl.trainer', 'verl.workers.engine'))]\n"
        "print('cppo.integrations.verl' in sys.modules, late)\n"
        "from verl.trainer.ppo import core_algos\n"
        "registries = core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY\n"
        "print(*('cppo' in registry for registry in registries))"
    )
    for policy, expected in (("auto", "True []\nTrue True"), ("none", "False []\nFalse False")):
        environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": policy}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected


def test_check_finds_that_everything_fits():
    from cppo.integrations.verl import HOOKS, check

    fits = check()
    assert all(fit.fits for fit in fits), "\n".join(map(str, fits))
    assert [fit.part for fit in fits[1:]] == [hook.part for hook in HOOKS]
    assert str(fits[0]) == f"verl {verl.__version__}: fits (loads this plugin)"


def test_images_of_which_verl_keeps_no_pictures_are_refused():
    assert verl_loss._images({}) is None
    with pytest.raises(
        ValueError, match=r"made \(image_sizes, pixel_values\), but not the pictures"
    ):
        verl_loss._images({"pixel_values": torch.zeros(1), "image_sizes": torch.zeros(1)})


# Policy loss and advantages


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
         "seq-mean-token-sum-norm")  # fmt: skip


def policy_inputs(seed=0, spread=0.8):
    """Six completions; by default half of the ratios are outside of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 5, 1, 0, 6])
    old = -torch.rand(6, 7, generator=generator)
    log_prob = old + spread * torch.randn(6, 7, generator=generator)
    advantages = torch.randn(6, 1, generator=generator).expand(6, 7)
    return dict(
        old_log_prob=old,
        log_prob=log_prob.requires_grad_(),
        advantages=advantages,
        response_mask=torch.arange(7) < lengths[:, None],
    )


def weights_of(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = 2 * torch.rand(6, 7, generator=generator)
    return dict(
        none=None, tokens=tokens, sequences=tokens[:, :1].expand(6, 7), mask=tokens.gt(1).float()
    )[kind]


@pytest.mark.parametrize("weights", ["none", "tokens", "sequences", "mask"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_is_verls_own_in_value_gradient_and_metrics(mode, importance, weights):
    theirs = core_algos.get_policy_loss_fn("vanilla" if importance == "token" else "gspo")
    for seed, spread in enumerate([1e-3, 0.3, 0.8, 2.0, 12.0, 40.0]):
        # verl clamps what the two largest ones overflow; a dual clip that far lets them through.
        actor = example.actor_config(mode, importance=importance)
        object.__setattr__(actor, "clip_ratio_c", 1e12 if spread > 10 else 3.0)
        if seed % 2:
            actor.global_batch_info.update(dp_size=2, batch_num_tokens=50, global_batch_size=11.5)
            actor.global_batch_info.update(loss_scale_factor=9)
        inputs = policy_inputs(seed, spread)
        if seed % 3 == 0:
            inputs["advantages"] = inputs["advantages"] * torch.linspace(-1, 1, 7)
        results = []
        for loss_function in (core_algos.get_policy_loss_fn("cppo"), theirs):
            loss, metrics = loss_function(
                **inputs,
                loss_agg_mode=mode,
                config=actor,
                rollout_is_weights=weights_of(weights, seed),
            )
            (gradient,) = torch.autograd.grad(loss, inputs["log_prob"])
            results.append((loss, gradient, metrics))
        (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = results
        assert loss.isfinite() and gradient.abs().max() > 0
        torch.testing.assert_close(loss, their_loss)
        torch.testing.assert_close(gradient, their_gradient)
        assert metrics == pytest.approx(their_metrics, rel=1e-5, abs=1e-6)


def test_clip_fractions_are_counted_apart():
    inputs = policy_inputs(spread=2.0)
    _, metrics = verl_loss.policy_loss(**inputs, config=example.actor_config())
    assert metrics["actor/pg_clipfrac"] > 0 and metrics["actor/pg_clipfrac_lower"] > 0


def test_policy_loss_ignores_what_is_masked():
    actor, inputs = example.actor_config(), policy_inputs()
    expected, _ = verl_loss.policy_loss(**inputs, config=actor)
    hidden = ~inputs["response_mask"]
    spoiled = {
        name: value.detach().masked_fill(hidden, torch.nan)
        for name, value in inputs.items()
        if name != "response_mask"
    }
    log_prob = spoiled["log_prob"].requires_grad_()
    mask = inputs["response_mask"]
    loss, _ = verl_loss.policy_loss(**spoiled, response_mask=mask, config=actor)
    loss.backward()
    assert torch.equal(loss, expected) and log_prob.grad[hidden].eq(0).all()
    assert log_prob.grad.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "reduction"), [("seq-mean-token-mean", "grpo"), ("token-mean", "dapo")]
)
def test_policy_loss_is_cppo_loss(mode, reduction):
    logits = torch.randn(4, 6, 11, requires_grad=True)
    targets = torch.randint(11, (4, 6))
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 3])[:, None]
    log_prob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old = (log_prob + 0.5 * torch.randn(4, 6)).detach()
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0])
    actor = example.actor_config(mode)
    spread = advantages[:, None].expand(4, 6)
    loss, _ = verl_loss.policy_loss(old, log_prob, spread, mask, mode, actor)
    config = cppo.LossConfig(reduction=reduction, dual_clip=3.0, clip_high=0.2)
    expected = cppo.cppo_loss(logits, targets, advantages, old_logps=old, mask=mask, config=config)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected.loss))
    )


def test_with_verls_own_class_the_policy_loss_has_our_defaults():
    actor = example.actor_config(_target_="verl.workers.config.PolicyLossConfig")
    assert verl_loss.loss_config(actor) == cppo.LossConfig(
        clip_high=0.2, dual_clip=3.0, cpl_reduction="sequence", cpl_coef=0.0
    )


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_are_those_of_verls_grpo(by_std):
    index = ["a", "b", "a", "b", "a", "b"]
    rewards, mask = torch.zeros(6, 4), torch.ones(6, 4, dtype=torch.int64)
    rewards[:, -1] = torch.tensor([1.0, 0, 0.5, 0, 0, 1])
    config = dict(norm_adv_by_std_in_grpo=by_std)
    ours, _ = core_algos.get_adv_estimator_fn("cppo")(rewards, mask, index=index, config=config)
    theirs, _ = core_algos.get_adv_estimator_fn("grpo")(
        rewards, mask, index=index, norm_adv_by_std_in_grpo=by_std
    )
    # verl adds 1e-6 to the std, we the paper's 1e-4.
    torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=1e-7)


# The page about it


def test_the_page_runs(capsys):
    page = (ROOT / "docs" / "verl.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python", "bash", "python"]
    for language, code in blocks:
        if language == "python":
            exec(code, {"__name__": "page"})
    assert "pruning trainer, sync: fits" in capsys.readouterr().out
    assert get_trainer_cls("mine").__name__ == "MyTrainer"

    command = shlex.split(blocks[1][1].replace("\\\n", " "))
    assert command[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    config = composed(*command[3:])
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert type(actor.policy_loss).__name__ == "PolicyLossConfig"
    assert verl_loss.loss_config(actor) == cppo.LossConfig(
        clip_high=0.2, dual_clip=3.0, cpl_reduction="sequence", cpl_coef=0.01
    )
    assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "cppo"
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert trainer.pruning == Pruning(prune_rate=0.875)
