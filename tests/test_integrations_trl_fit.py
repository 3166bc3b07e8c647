"""The TRL adapter and the installed TRL: what fits, what is refused, and the kernel."""

import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

import trl_cases
from trainer_cases import relative_difference, tiny, weights_of
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer
from trl.trainer import utils
from trl_cases import HALF, OFF, logged, trained, trainer_of

from cppo.integrations import trl as adapter
from cppo.integrations.trl import CPPO, check, patch_trl
from cppo.integrations.trl_fit import OPTIONAL
from cppo.integrations.trl_options import check_run
from cppo.options.trainer import LossConfig

TRL = tuple(int(part) for part in importlib.metadata.version("trl").split(".")[:2])
HAS_KERNEL = check()[-1].fits
with_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="trl before 1.15 has no fused LM head")


# What the installed TRL has


def test_check_says_what_fits():
    fits = check()
    assert [str(fit) for fit in fits if not fit.fits and fit.part not in OPTIONAL] == []
    assert fits[0].why.startswith(f"version {importlib.metadata.version('trl')}")
    assert fits[-1].part == "patch_trl" and fits[-1].fits == (TRL >= (1, 15))


def test_check_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None)
    monkeypatch.delattr(utils, "use_adapter")
    words = "\n".join(map(str, check()))
    found = "_compute_loss: does not fit (expected (self model inputs), found (self inputs))"
    assert found in words and "trl.trainer.utils: does not fit (missing: use_adapter)" in words
    with pytest.raises(RuntimeError, match="_compute_loss: does not fit"):
        trainer_of(cppo=HALF)

    def not_there(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    assert str(check()[0]) == "trl: does not fit (not installed: pip install 'trl>=1.7')"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.6.2")
    assert str(check()[0]) == "trl: does not fit (version 1.6.2; 1.7 to 1.x are known)"


def test_the_trainer_is_trls_with_the_mixin_before_it_and_is_imported_late():
    code = "import cppo, sys; assert cppo.integrations.trl.CPPO; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert adapter.CPPOGRPOTrainer.__mro__[1:3] == (adapter.CPPOMixin, GRPOTrainer)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = adapter.Trainer


# What is refused


def test_a_loss_that_is_computed_elsewhere_is_refused(monkeypatch):
    trainer = trainer_of("text", cppo=HALF)
    monkeypatch.setattr(trainer.args, "use_liger_kernel", True)
    # TRL before 1.14
    monkeypatch.setattr(trainer, "compute_liger_loss", print, raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel=True computes the loss elsewhere"):
        check_run(trainer)
    trainer.cppo = OFF  # nothing to refuse
    check_run(trainer)


@pytest.mark.parametrize("rows", [dict(gradient_accumulation_steps=4), dict(num_generations=16)])
def test_an_entropy_bonus_is_not_scaled_with_rows_that_fill_up(rows, monkeypatch):
    parts = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = trainer_of(cppo=CPPO(prune_rate=0.75), **parts)
    for name, value in rows.items():
        monkeypatch.setattr(trainer.args if name != "num_generations" else trainer, name, value)
    check_run(trainer)
    monkeypatch.setattr(trainer, "aux_loss_enabled", True)
    with pytest.raises(ValueError, match="would also scale the entropy bonus or the router's loss"):
        check_run(trainer)
    monkeypatch.setattr(trainer.args, "loss_type", "dapo")
    check_run(trainer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prune_rate=1.0), r"prune_rate must be a number in \[0, 1\), got 1.0"),
        (dict(prune_scope="rank"), "prune_scope must be one of 'group', 'batch', got 'rank'"),
        (dict(prune="best"), "prune must be one of"),
        (dict(loss=LossConfig(divergence="full")), "loss.divergence must be one of 'k3', 'k1'"),
        (dict(loss=LossConfig(kl_coef=0.1)), "loss.kl_coef = 0.1 would have no effect; TRL has"),
        (dict(negative_views=("blurr",)), "unknown perturbation 'blurr'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        CPPO(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(loss={"cpl_coef": 0.01}), "CPPO: loss must be a cppo.LossConfig, got dict"),
        (dict(drop_zero_variance="no"), "drop_zero_variance must be True or False, got 'no'"),
        (dict(share_prompts=1), "share_prompts must be True or False, got 1"),
    ],
)
def test_options_of_another_kind_are_refused(options, words):
    with pytest.raises(TypeError, match=words):
        CPPO(**options)


def test_options_of_images_that_have_no_effect_are_told():
    idle = CPPO(loss=LossConfig(cpl_coef=0.0, tau=0.5), positive_views=("rotation",))
    words = r"CPPO: loss.tau, positive_views have no effect with .*loss.cpl_coef = 0.01 turns"
    with pytest.warns(match=words):
        trainer_of("qwen2_5_vl", cppo=idle)
    with warnings.catch_warnings(action="error", category=UserWarning):
        check_run(trainer_of("text", cppo=idle))


def test_a_model_whose_positions_count_the_padding_is_not_trimmed(tmp_path, monkeypatch):
    """Trimmed, it would be elsewhere than the reference is that it begins as."""
    _, tokenizer = tiny("text")
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    model.transformer.wpe.weight.data.mul_(50)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(trl_cases, "folder_of", lambda family: str(tmp_path))
    monkeypatch.setattr(trl_cases, "load_model", GPT2LMHeadModel.from_pretrained)
    options = dict(num_iterations=1, max_steps=1, learning_rate=0.0)
    options |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    with pytest.warns(UserWarning, match="not trimmed .CPPO.trim.: positions of GPT2LMHeadModel"):
        trainer = trainer_of(cppo=CPPO(), **options)
    assert not trainer.cppo.trim
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="max_refills (joins draws|needs trl 1.15)"):
        trainer_of(cppo=CPPO(drop_zero_variance=True))
    trainer_of(cppo=CPPO(drop_zero_variance=True, max_refills=0))


# The kernel


@pytest.mark.skipif(HAS_KERNEL, reason="this TRL has the kernel that patch_trl swaps")
def test_patch_trl_leaves_an_older_trl_alone():
    with pytest.raises(RuntimeError, match="cppo.patch_trl: patch_trl: does not fit"):
        patch_trl()


@with_kernel
def test_patch_trl_trains_the_same_and_can_be_undone(stats_calls):
    theirs, options = utils._ChunkedLogProbFunction, dict(temperature=0.7, top_entropy_quantile=0.5)
    undo = patch_trl("reference")
    try:
        patch_trl("reference")  # twice is once
        ours = weights_of(trained(**options).model)
    finally:
        undo()
    assert utils._ChunkedLogProbFunction is theirs
    assert stats_calls and stats_calls[0]["temperature"] == 0.7
    assert stats_calls[0]["backend"] == "reference"
    stats_calls.clear()
    assert relative_difference(ours, weights_of(trained(**options).model)) < 1e-6
    assert not stats_calls


@with_kernel
@pytest.mark.parametrize(
    ("softcap", "scale", "outputs", "is_ours"),
    [
        (None, 1.0, ("log_probs", "entropy"), True),
        (None, 2.0, ("log_probs",), True),
        (3.0, 1.0, ("log_probs", "entropy"), True),
        (3.0, 0.25, ("log_probs", "entropy"), True),
        (None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1"), False),
    ],
)
def test_patch_trl_computes_what_trl_computes(softcap, scale, outputs, is_ours, stats_calls):
    generator = torch.Generator().manual_seed(0)
    head = [torch.randn(n, 4, generator=generator, requires_grad=True) for n in (5, 9)]
    bias = torch.randn(9, generator=generator, requires_grad=True)
    usual = (*head, bias, torch.tensor([0, 8, 3, 3, 1]), 0.5, 4, softcap, scale, outputs)
    expected = utils._ChunkedLogProbFunction.apply(*usual)
    undo = patch_trl("reference")
    try:
        found = utils._ChunkedLogProbFunction.apply(*usual)
    finally:
        undo()
    assert len(stats_calls) == is_ours
    assert len(found) == len(expected) == 5
    for ours, exact in zip(found, expected, strict=True):
        assert (ours is None) == (exact is None)
        assert exact is None or torch.allclose(ours.float(), exact.float(), atol=1e-5)
    both = [torch.autograd.grad(each[0].sum(), [*head, bias]) for each in (found, expected)]
    for ours, exact in zip(*both, strict=True):
        assert torch.allclose(ours, exact, atol=1e-5)
