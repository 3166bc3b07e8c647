"""The verl adapter in verl itself: tests/run_verl.sh makes an environment for it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

verl = pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")

from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl_cases import (  # noqa: E402
    LOSS,
    ROOT,
    engine_for,
    gradients,
    half,
    load_example,
    update,
    worst,
)

import cppo  # noqa: E402
from cppo.integrations import verl_loss  # noqa: E402
from cppo.integrations.verl_options import Pruning  # noqa: E402
from cppo.seeds import seed_from  # noqa: E402
from cppo.views import perturb_pixel_values, views_from_names  # noqa: E402

example = load_example()

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engine():
    return engine_for(example)


@pytest.fixture(scope="module")
def batch(engine):
    batch = example.made_up_batch(engine.model_config.processor, num_questions=4, seed=2)
    example.add_old_log_probs(engine, batch)
    return batch


# Loading


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


# Policy loss and advantages


def policy_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 5, 1, 0, 6])
    old = -torch.rand(6, 7, generator=generator)
    # Half of the ratios outside of the clip range, a few beyond the dual clip.
    log_prob = old + 0.8 * torch.randn(6, 7, generator=generator)
    advantages = torch.randn(6, 1, generator=generator).expand(6, 7)
    return dict(
        old_log_prob=old,
        log_prob=log_prob.requires_grad_(),
        advantages=advantages,
        response_mask=torch.arange(7) < lengths[:, None],
    )


@pytest.mark.parametrize("is_weights", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
             "seq-mean-token-sum-norm"],
)  # fmt: skip
def test_policy_loss_is_verls_own_where_they_mean_the_same(mode, importance, is_weights):
    actor = example.actor_config(mode, importance=importance)
    actor.global_batch_info.update(dp_size=2, batch_num_tokens=50, global_batch_size=12)
    actor.global_batch_info.update(loss_scale_factor=9)
    inputs = policy_inputs()
    # Per sequence, for ours has gradients across the tokens of a sequence, verl's gspo has not.
    weights = torch.rand(6, 1).expand(6, 7) if is_weights else None
    results = []
    for name in ("cppo", "vanilla" if importance == "token" else "gspo"):
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            **inputs, loss_agg_mode=mode, config=actor, rollout_is_weights=weights
        )
        (gradient,) = torch.autograd.grad(loss, inputs["log_prob"])
        results.append((loss, gradient, metrics))
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = results
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(gradient, their_gradient)
    assert metrics["actor/ppo_kl"] == pytest.approx(their_metrics["actor/ppo_kl"], abs=1e-6)
    assert gradient.abs().max() > 0


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


# The engine


def test_two_optimizer_steps_with_the_loss_and_the_views(capsys):
    history = example.main(steps=2)
    assert [row["actor/looking_completions"] > 0 for row in history] == [True, True]
    for row in history:
        assert 0 < row["actor/perception_tokens"] and 0 < row["actor/cpl_loss"] < 5
        assert 0 < row["grad_norm"] < 100
    assert "step 1" in capsys.readouterr().out


def response_logits(engine, batch) -> torch.Tensor:
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


def seen_as(engine, batch, name: str, perturbations: tuple[str, ...]) -> Any:
    """The batch with its images perturbed as documented: by step, view, prompt and number."""
    rows = []
    for inputs, prompt in zip(batch["multi_modal_inputs"], batch["prompts"].unbind(), strict=True):
        pixel_values = perturb_pixel_values(
            inputs["pixel_values"],
            inputs["image_grid_thw"],
            views_from_names(list(perturbations)),
            seeds=[seed_from(0, engine.lr_scheduler.last_epoch, name, *prompt.tolist())],
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
    expected = {
        name: parameter.grad.full_tensor().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is not None
    }
    engine.optimizer_zero_grad()
    assert output.perception_mask.any()
    assert worst(ours, expected) < 2e-4
    # The contrastive term is no rounding error of these gradients.
    assert worst(gradients(engine, whole, example.actor_config(**LOSS | dict(cpl_coef=0))),
                 expected) > 1e-2  # fmt: skip


def test_micro_batches_do_not_change_the_gradient(engine, batch):
    actor, found = example.actor_config(**LOSS), []
    for size in (16, 4, 1):
        cut = batch.copy()
        tu.assign_non_tensor(cut, micro_batch_size_per_gpu=size)
        found.append(gradients(engine, cut, actor))
    assert max(worst(found[1], found[0]), worst(found[2], found[0])) < 2e-4


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
    expected, metrics = update(example, lambda batch: batch)
    command = [sys.executable, str(ROOT / "tests" / "verl_cases.py")]
    where = (str(tmp_path / "store"), str(tmp_path / "out"))
    ranks = [
        subprocess.Popen([*command, str(rank), *where], stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"out{rank}.pt", weights_only=False) for rank in range(2)]
    assert all(worst(own, expected) < 2e-4 for own, _ in found)
    assert [own["looking_completions"] > 0 for _, own in found] == [True, False]
    for name, value in metrics.items():
        # verl reports the mean over the ranks.
        assert (found[0][1][name] + found[1][1][name]) / 2 == pytest.approx(value, rel=1e-4)


# Fused statistics


@pytest.mark.parametrize("backend", ["cppo", "torch"])
def test_fused_statistics_behind_verls_switch(engine, batch, backend, monkeypatch):
    calls, plain = [], cppo.linear_token_stats
    monkeypatch.setattr(
        cppo, "linear_token_stats", lambda *a, **k: (calls.append(k), plain(*a, **k))[1]
    )
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
    assert bool(calls) == (backend == "cppo") and torch_functional.FusedLinearForPPO


# The trainer


OVERRIDES = """
data.train_batch_size=3 actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.rollout.n=8
actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.model.path=none critic.enable=False
algorithm.adv_estimator=grpo trainer.val_before_train=False
""".split()


def composed(*overrides: str) -> Any:
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", [*OVERRIDES, *overrides])


@pytest.fixture(scope="module")
def queue():
    """A TransferQueue: verl's store of everything that a step works on."""
    ray = pytest.importorskip("ray")
    tq = pytest.importorskip("transfer_queue")
    # Logical CPUs: its actors wait for as many.
    ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    storage = dict(total_storage_size=1000, num_data_storage_units=1)
    tq.init(OmegaConf.create(dict(backend=dict(SimpleStorage=storage))))
    yield tq
    tq.close()
    ray.shutdown()


class Workers:
    """A worker group of two ranks that notes what it is asked for and answers with noise."""

    _dispatch_info = {"actor": [0, 1]}

    def __init__(self, tq: Any) -> None:
        self.tq, self.calls = tq, []

    def _note(self, name: str, batch: Any, *fields: str) -> Any:
        data = self.tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=list(fields))
        self.calls.append((name, list(batch.keys), dict(batch.extra_info), data))
        return data

    def _log_probs(self, name: str, batch: Any) -> Any:
        data = self._note(name, batch, "input_ids")
        values = {
            field: torch.nested.nested_tensor_from_jagged(
                -torch.rand(len(data["input_ids"].values())), data["input_ids"].offsets()
            )
            for field in ("log_probs", "entropy")
        }
        return self.tq.kv_batch_put(
            batch.keys, batch.partition_id, TensorDict(values, batch_size=len(batch))
        )

    def compute_log_prob(self, batch: Any) -> Any:
        return self._log_probs("old_log_prob", batch)

    def compute_ref_log_prob(self, batch: Any) -> Any:
        return self._log_probs("ref_log_prob", batch)

    def update_actor(self, batch: Any) -> Any:
        fields = ("advantages", "returns", "old_log_probs", "ref_log_prob", "response_mask")
        self._note("update_actor", batch, *fields)
        return {"metrics": {"mfu": 0.5, "pg_loss": 0.25}}


def rollouts(tq: Any, rewards: dict[str, list[float]]) -> Any:
    """Completions as the agent loop leaves them in the queue; a question's number is its key."""
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, list[Any]] = {}
    keys, tags = [], []
    for question, scores in rewards.items():
        for number, score in enumerate(scores):
            length = int(torch.randint(2, 9, (), generator=generator))
            prompt, response = torch.full((4,), 7), torch.arange(length)
            reward = torch.zeros(length)
            reward[-1] = score
            mask = torch.ones(length, dtype=torch.int64)
            for name, value in dict(
                prompts=prompt, responses=response, input_ids=torch.cat([prompt, response]),
                position_ids=torch.arange(4 + length), response_mask=mask, loss_mask=mask,
                rm_scores=reward, rollout_log_probs=-torch.rand(length, generator=generator),
            ).items():  # fmt: skip
                fields.setdefault(name, []).append(value)
            keys.append(f"{question}_{number}_0")
            tags.append(dict(seq_len=4 + length, min_global_steps=0, max_global_steps=0))
    data = TensorDict(
        {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in fields.items()},
        batch_size=len(keys),
    )
    tu.assign_non_tensor_stack(data, "uid", [key.split("_")[0] for key in keys])
    tu.assign_non_tensor_stack(data, "num_turns", [1] * len(keys))
    return tq.kv_batch_put(keys, "train", data, tags)


REWARDS = {
    # The advantages of each question are largest at two known completions.
    "a": [0.5, 0.5, 9.0, 0.5, 0.5, -8.0, 0.5, 0.5],
    "b": [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, -3.0],
    "c": [2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 7.0],
}
KEPT = {"a_2_0", "a_5_0", "b_1_0", "b_7_0", "c_4_0", "c_6_0"}


def step(tq: Any, mode: str, *overrides: str) -> tuple[Any, Any, dict, Any, Any]:
    """One step of a trainer of verl on fake workers."""
    config = composed(f"trainer.v1.trainer_mode={mode}", *overrides)
    trainer = get_trainer_cls(mode)(config)
    workers = Workers(tq)
    batch = rollouts(tq, REWARDS)
    trainer.__dict__.update(
        actor_rollout_wg=workers,
        ref_policy_wg=workers,
        ref_in_actor=False,
        tokenizer=SimpleNamespace(eos_token_id=3),
        reward_loop_manager=SimpleNamespace(reward_loop_worker_handles=[]),
        checkpoint_manager=SimpleNamespace(sleep_replicas=lambda: None),
        replay_buffer=SimpleNamespace(sample=lambda **_: (batch, {})),
        curr_step_profile=False,
        global_steps=1,
        distillation_config=None,
        _get_n_gpus_for_throughput=lambda: 2,
    )
    metrics: dict[str, Any] = {}
    torch.manual_seed(0)
    timing: dict[str, float] = {}
    result = trainer._step_once(metrics, timing, sample_batch_size=3)
    timing["step"] = timing.setdefault("gen", 1.0)
    trainer._compute_metrics(result, metrics, timing, global_steps=1, epoch=0)
    return trainer, workers, metrics, batch, result


def test_the_trainer_prunes_before_old_and_reference_log_probabilities(queue):
    trainer, workers, metrics, batch, result = step(
        queue, "cppo", "+trainer.v1.cppo.prune_rate=0.75"
    )
    assert [name for name, *_ in workers.calls] == ["old_log_prob", "ref_log_prob", "update_actor"]
    for _, keys, _, _ in workers.calls:
        # Two no-op rows fill the mini-batch: 4 questions x 2 kept.
        assert {key for key in keys if not key.startswith("pad")} == KEPT and len(keys) == 8
    _, keys, extra_info, data = workers.calls[-1]
    assert extra_info["mini_batch_size"] == extra_info["global_batch_size"] == 4 * 2
    assert trainer.config.actor_rollout_ref.rollout.n == 8
    assert trainer.config.algorithm.rollout_correction is not None
    assert trainer.replay_buffer is not None and trainer.config.trainer.v1.trainer_mode == "sync"

    whole = {q: torch.tensor(scores) for q, scores in REWARDS.items()}
    for key, advantages, returns, mask in zip(
        keys, *(data[x].unbind() for x in ("advantages", "returns", "response_mask")), strict=True
    ):
        if key.startswith("pad"):
            assert advantages.tolist() == [0.0] and mask.sum() == 0
            continue
        question, number, _ = key.split("_")
        scores = whole[question]
        expected = (scores[int(number)] - scores.mean()) / (scores.std() + 1e-6)
        assert torch.equal(advantages, returns) and len(advantages) == len(mask)
        torch.testing.assert_close(advantages, expected.expand(len(mask)))

    # Metrics and the clearing of the queue are of everything that was sampled.
    assert sorted(k for k in result.keys if not k.startswith("pad")) == sorted(batch.keys)
    assert len(result.tags) == len(result.keys) == 25
    assert metrics["cppo/completions"] == 23 and metrics["cppo/kept_completions"] == 6
    assert metrics["critic/score/mean"] == pytest.approx(sum(map(sum, REWARDS.values())) / 23)
    assert metrics["actor/pg_loss"] == 0.25
    queue.kv_clear(result.keys, "train")
    assert not queue.kv_list("train").get("train")


def test_without_pruning_the_trainer_is_verls_own(queue):
    seen = []
    for mode in ("cppo", "sync"):
        _, workers, metrics, _, result = step(queue, mode)
        _, keys, _, data = workers.calls[-1]
        rows = dict(zip(keys, data["advantages"].unbind(), strict=True))
        real = {key: row.tolist() for key, row in rows.items() if not key.startswith("pad")}
        infos = [(name, len(keys), info) for name, keys, info, _ in workers.calls]
        kept_metrics = {k: v for k, v in metrics.items() if not k.startswith(("timing", "perf"))}
        seen.append((infos, real, len(result), kept_metrics))
        queue.kv_clear(result.keys, "train")
    assert seen[0] == seen[1]


def test_the_trainer_says_what_it_cannot_do():
    for override, words in (
        ("algorithm.use_kl_in_reward=True", "use_kl_loss"),
        ("+trainer.v1.cppo.prune_scope=local", "prune_scope must be one of"),
    ):
        config = composed(
            "trainer.v1.trainer_mode=cppo", "+trainer.v1.cppo.prune_rate=0.5", override
        )
        with pytest.raises(ValueError, match=words):
            get_trainer_cls("cppo")(config)


# The page about it


def test_the_page_runs(capsys):
    page = (ROOT / "docs" / "verl.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python", "python"]
    for language, code in blocks:
        if language == "python":
            exec(code, {"__name__": "page"})
    assert "pruning trainer: fits" in capsys.readouterr().out
    assert get_trainer_cls("mine").__name__ == "MyTrainer"

    command = shlex.split(blocks[1][1].replace("\\\n", " "))
    assert command[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    config = composed(*command[3:])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert type(actor.policy_loss).__name__ == "PolicyLossConfig"
    assert verl_loss.loss_config(actor) == cppo.LossConfig(
        clip_high=0.2, dual_clip=3.0, cpl_reduction="sequence", cpl_coef=0.01
    )
    assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "cppo"
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert trainer.pruning == Pruning(prune_rate=0.875)
    trainer.global_steps = 1
    with trainer._kept_per_question():
        assert trainer._get_required_batch_multiple(dp_size=8) == 512 * 2
