"""The trainer that prunes: verl's own, on verl's queue, with a fake worker group."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")
pytest.importorskip("transfer_queue", reason="verl's trainer needs TransferQueue")

import ray  # noqa: E402
import transfer_queue  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl_cases import composed  # noqa: E402


@pytest.fixture(scope="module")
def queue():
    """A TransferQueue: verl's store of everything that a step works on."""
    # Logical CPUs: its actors wait for as many.
    ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    storage = dict(total_storage_size=1000, num_data_storage_units=1)
    transfer_queue.init(OmegaConf.create(dict(backend=dict(SimpleStorage=storage))))
    yield transfer_queue
    transfer_queue.close()
    ray.shutdown()


class Workers:
    """A worker group of two ranks that notes what it is asked for and answers with noise."""

    _dispatch_info = {"actor": [0, 1]}

    def __init__(self, tq):
        self.tq, self.calls = tq, []

    def _note(self, name, batch, *fields):
        data = self.tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=list(fields))
        self.calls.append((name, list(batch.keys), dict(batch.extra_info), data))
        return data

    def _log_probs(self, name, batch):
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

    def save_model_to_cpu(self, number):
        self.saved = number

    restore_model_from_cpu = clear_cpu_model = save_model_to_cpu

    def compute_log_prob(self, batch):
        return self._log_probs("old_log_prob", batch)

    def compute_ref_log_prob(self, batch):
        return self._log_probs("ref_log_prob", batch)

    def update_actor(self, batch):
        fields = ("advantages", "returns", "old_log_probs", "ref_log_prob", "response_mask",
                  "rollout_is_weights")  # fmt: skip
        self._note("update_actor", batch, *fields)
        return {"metrics": {"mfu": 0.5, "pg_loss": 0.25}}


def rollouts(tq, rewards):
    """Completions as the agent loop leaves them in the queue; several scores: several outputs."""
    generator = torch.Generator().manual_seed(0)
    fields = {}
    keys, tags = [], []
    outputs = [
        (f"{question}_{number}_{output}", score)
        for question, scores in rewards.items()
        for number, of_completion in enumerate(scores)
        for output, score in enumerate(
            of_completion if isinstance(of_completion, list) else [of_completion]
        )
    ]
    for key, score in outputs:
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
        keys.append(key)
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
    # Of several outputs of an agent's completion the last one's reward counts, for all of them.
    "c": [2.0, 2.0, 2.0, 2.0, [9.0, 0.0], 2.0, 7.0],
}
PRUNE = "+trainer.v1.cppo.prune_rate=0.75"
KEPT = {"a_2_0", "a_5_0", "b_1_0", "b_7_0", "c_4_0", "c_4_1", "c_6_0"}


def real(keys):
    """Those of completions, without the rows that only fill up."""
    return [key for key in keys if not key.startswith("pad")]


def step(tq, mode, *overrides, rewards=None, ranks=2, sample=None):
    """One step of a trainer of verl on fake workers."""
    config = composed(f"trainer.v1.trainer_mode={mode}", *overrides)
    trainer = get_trainer_cls(mode)(config)
    workers = Workers(tq)
    workers._dispatch_info = {"actor": list(range(ranks))}
    batch = rollouts(tq, rewards or REWARDS)
    trainer.__dict__.update(
        actor_rollout_wg=workers,
        ref_policy_wg=workers,
        ref_in_actor=False,
        tokenizer=SimpleNamespace(eos_token_id=3),
        reward_loop_manager=SimpleNamespace(reward_loop_worker_handles=[]),
        checkpoint_manager=SimpleNamespace(
            sleep_replicas=lambda: None, abort_replicas=lambda: None
        ),
        curr_step_profile=False,
        _step_sample_wait_seconds=0.0,
        global_steps=1,
        distillation_config=None,
        _get_n_gpus_for_throughput=lambda: 2,
    )
    if sample is None:
        trainer.replay_buffer = SimpleNamespace(sample=lambda **_: (batch, {}))
    else:
        sample(trainer)
    metrics = {}
    torch.manual_seed(0)
    timing = {}
    result = trainer._step_once(metrics, timing, sample_batch_size=3)
    timing["step"] = timing.setdefault("gen", 1.0)
    trainer._compute_metrics(result, metrics, timing, global_steps=1, epoch=0)
    return trainer, workers, metrics, batch, result


def test_the_trainer_prunes_before_old_and_reference_log_probabilities(queue):
    trainer, workers, metrics, batch, result = step(queue, "cppo", PRUNE)
    assert [name for name, *_ in workers.calls] == ["old_log_prob", "ref_log_prob", "update_actor"]
    for _, keys, _, _ in workers.calls:
        # An empty row fills the mini-batch, for two ranks; means are over the others.
        assert {*real(keys)} == KEPT and len(keys) == 8
    _, keys, extra_info, data = workers.calls[-1]
    assert extra_info["mini_batch_size"] == 8 and extra_info["global_batch_size"] == 7
    assert trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size == 4
    assert trainer.config.actor_rollout_ref.rollout.n == 8
    assert trainer.config.algorithm.rollout_correction is not None
    assert trainer.config.trainer.v1.trainer_mode == "sync"

    final = {q: [s[-1] if isinstance(s, list) else s for s in REWARDS[q]] for q in REWARDS}
    whole = {q: torch.tensor(scores) for q, scores in final.items()}
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
    assert sorted(real(result.keys)) == sorted(batch.keys)
    assert len(result.tags) == len(result.keys) == 25
    assert metrics["cppo/completions"] == 23 and metrics["cppo/kept_completions"] == 6
    assert metrics["critic/score/mean"] == pytest.approx((sum(map(sum, final.values())) + 9) / 24)
    assert metrics["actor/pg_loss"] == 0.25
    queue.kv_clear(result.keys, "train")
    assert not queue.kv_list("train").get("train")


def test_without_pruning_the_trainer_is_verls_own(queue):
    seen = []
    for mode in ("cppo", "sync"):
        _, workers, metrics, _, result = step(queue, mode)
        _, keys, _, data = workers.calls[-1]
        rows = dict(zip(keys, data["advantages"].unbind(), strict=True))
        advantages = {key: rows[key].tolist() for key in real(keys)}
        infos = [(name, len(keys), info) for name, keys, info, _ in workers.calls]
        kept_metrics = {k: v for k, v in metrics.items() if not k.startswith(("timing", "perf"))}
        seen.append((infos, advantages, len(result), kept_metrics))
        queue.kv_clear(result.keys, "train")
    assert seen[0] == seen[1]


def trained(workers):
    """Keys, mini-batch size and what sequence means are divided by, of the update."""
    name, keys, info, _ = workers.calls[-1]
    assert name == "update_actor"
    return real(keys), len(keys), info["mini_batch_size"], info["global_batch_size"]


PLAIN = {
    question: [float((3 * number + shift) % 8) for number in range(8)]
    for shift, question in enumerate("abcd")
}


@pytest.mark.parametrize(
    ("overrides", "ranks", "rows", "mini_batch", "mean"),
    [
        # 32 completions in mini-batches of 16, 6 of 8 of each question are kept.
        (["prune_rate=0.3"], 2, 24, 12, 12),
        # Of the whole batch 32 - 9 are kept: one row is empty, and no mean counts it.
        (["prune_rate=0.3", "prune_scope=batch"], 2, 23, 12, 11.5),
        # 8 ranks do not divide mini-batches of 12.
        (["prune_rate=0.3"], 8, 24, 16, 12),
        (["prune_rate=0.9"], 8, 4, 8, 4),
    ],
)
def test_mini_batches_of_what_is_kept(queue, overrides, ranks, rows, mini_batch, mean):
    _, workers, metrics, _, result = step(
        queue,
        "cppo",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "data.train_batch_size=4",
        *(f"+trainer.v1.cppo.{override}" for override in overrides),
        rewards=PLAIN,
        ranks=ranks,
    )
    kept, padded, size, divisor = trained(workers)
    assert len(kept) == metrics["cppo/kept_completions"] == rows
    assert (size, divisor) == (mini_batch, mean) and padded % size == 0 and size % ranks == 0
    assert divisor * (padded // size) == rows
    assert padded - rows < size  # no mini-batch is empty
    queue.kv_clear(result.keys, "train")
    assert not queue.kv_list("train").get("train")


@pytest.mark.parametrize(
    ("prune_rate", "micro", "of_update", "of_log_probs"),
    # Two mini-batches on two ranks. 6 rows are cut into 3 and 3, 5 filled up to 6, 1 is one.
    [(0.25, 4, 3, 6), (0.25, 8, 6, 6), (0.4, 4, 3, 6), (0.9, 4, 1, 2)],
)
def test_micro_batches_of_what_is_kept_are_equal(queue, prune_rate, micro, of_update, of_log_probs):
    """verl stops where a rank's rows are no multiple of its micro-batches."""
    actor, rollout, ref = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "ref"))
    _, workers, _, _, result = step(
        queue,
        "cppo",
        f"{actor}.ppo_mini_batch_size=2",
        "data.train_batch_size=4",
        f"+trainer.v1.cppo.prune_rate={prune_rate}",
        f"{actor}.ppo_micro_batch_size_per_gpu={micro}",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"{ref}.log_prob_micro_batch_size_per_gpu=8",
        rewards=PLAIN,
    )
    names = ("old_log_prob", "ref_log_prob", "update_actor")
    for name, (called, keys, info, _) in zip(names, workers.calls, strict=True):
        size = info["micro_batch_size_per_gpu"]
        rows = info["mini_batch_size"] if name == "update_actor" else len(keys)
        assert called == name and rows // 2 % size == 0 and len(keys) % rows == 0
        assert size == (of_update if name == "update_actor" else of_log_probs)
    queue.kv_clear(result.keys, "train")


def test_an_estimator_that_takes_no_group_of_one_prunes_to_one(queue):
    passk = "algorithm.adv_estimator=grpo_passk"
    prune = "+trainer.v1.cppo.prune_rate=0.875"
    _, workers, _, _, result = step(queue, "cppo", prune, passk, rewards=PLAIN)
    kept, data = trained(workers)[0], workers.calls[-1][3]
    assert sorted(key.split("_")[0] for key in kept) == ["a", "b", "c", "d"]
    best = dict(zip(workers.calls[-1][1], data["advantages"].unbind(), strict=True))
    # Of the largest reward, 7, and the next one, 6, over the std of all eight.
    expected = 1 / torch.arange(8.0).std()
    for key in kept:
        torch.testing.assert_close(best[key], expected.expand(len(best[key])))
    queue.kv_clear(result.keys, "train")


SEPARATE = """
trainer.v1.separate_async.parameter_sync_step=1 data.train_batch_size=4
actor_rollout_ref.rollout.nnodes=1 actor_rollout_ref.rollout.n_gpus_per_node=1
actor_rollout_ref.rollout.checkpoint_engine.backend=nccl
""".split()


@pytest.mark.parametrize(
    ("mode", "overrides"), [("colocate_async", []), ("separate_async", SEPARATE)]
)
def test_asynchronous_trainers_prune(queue, mode, overrides):
    trainer, workers, metrics, batch, result = step(queue, f"cppo_{mode}", PRUNE, *overrides)
    assert trainer.config.trainer.v1.trainer_mode == trainer.trainer_mode == mode
    assert type(trainer.replay_buffer).__name__ != "ReplayBuffer"
    assert set(trained(workers)[0]) == KEPT and metrics["cppo/kept_completions"] == 6
    assert {*real(result.keys)} == {*batch.keys}
    queue.kv_clear(result.keys, "train")


def test_each_update_between_two_weight_syncs_prunes_its_own_batch(queue):
    trainer, workers, *_, first = step(
        queue, "cppo_separate_async", *SEPARATE, PRUNE, rewards=PLAIN
    )
    queue.kv_clear(first.keys, "train")
    workers.calls.clear()
    batches = [rollouts(queue, {question: PLAIN[question]}) for question in "ab"]
    trainer.parameter_sync_step = 2
    trainer.replay_buffer.sample = lambda **_: (batches[trainer.local_trigger_step], {})
    trainer.prepare_step = dict
    metrics = {}
    result = trainer.step(metrics, {})
    updates = [keys for name, keys, *_ in workers.calls if name == "update_actor"]
    assert [[key.split("_")[0] for key in real(keys)] for keys in updates] == [["a"] * 2, ["b"] * 2]
    assert metrics["cppo/kept_completions"] == 2  # the mean over the updates
    assert len(real(result.keys)) == 16
    queue.kv_clear(result.keys, "train")


def test_in_bypass_mode_old_log_probabilities_are_those_of_the_rollout(queue):
    bypass = "algorithm.rollout_correction.bypass_mode=True"
    _, workers, _, _, result = step(queue, "cppo", PRUNE, bypass)
    assert [name for name, *_ in workers.calls] == ["ref_log_prob", "update_actor"]
    assert set(trained(workers)[0]) == KEPT
    queue.kv_clear(result.keys, "train")


def test_with_rollout_correction_weights_are_of_the_kept_completions(queue):
    weighted = (
        "algorithm.rollout_correction.rollout_is=token",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
    )
    _, workers, metrics, _, result = step(queue, "cppo", PRUNE, *weighted)
    keys, data = workers.calls[-1][1], workers.calls[-1][3]
    assert set(trained(workers)[0]) == KEPT
    for key, weights, mask in zip(
        keys, data["rollout_is_weights"].unbind(), data["response_mask"].unbind(), strict=True
    ):
        assert len(weights) == len(mask)
        assert key.startswith("pad") or weights.gt(0).all()
    assert "rollout_corr/rollout_is_mean" in metrics
    queue.kv_clear(result.keys, "train")


def test_with_filter_groups_the_groups_that_verl_keeps_are_pruned(queue):
    rewards = {**PLAIN, "e": [1.0] * 8}

    def sample(trainer):
        uids = sorted(rewards)
        tag = dict(is_prompt=True, status="finished", global_steps=1)
        queue.kv_batch_put(uids, "train", tags=[dict(tag) for _ in uids])

    trainer, workers, metrics, _, result = step(
        queue,
        "cppo",
        PRUNE,
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=reward",
        rewards=rewards,
        sample=sample,
    )
    assert type(trainer.replay_buffer).__name__ == "ReplayBuffer"
    assert metrics["training/filter_groups/evicted_samples"] == 1
    assert metrics["cppo/completions"] == 24 and metrics["cppo/kept_completions"] == 6
    assert {key.split("_")[0] for key in trained(workers)[0]} < set("abcd")
    queue.kv_clear(result.keys, "train")
    assert not queue.kv_list("train").get("train")


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
