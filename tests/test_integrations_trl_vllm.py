"""The TRL adapter with vLLM: importance weights of the rows that are left; weights and images.

A stand-in takes vLLM's place: it returns token ids and log-probabilities as TRL's `vllm_generation`
does.
"""

import importlib.metadata
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import same, weights_of
from trl import GRPOTrainer
from trl_cases import HALF, HALF_LOOK, CPPOMixin, late, logged, trainer_of, watched

from cppo.integrations import trl_vllm_mend

TRL = tuple(int(part) for part in importlib.metadata.version("trl").split(".")[:2])
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
RATIOS = [f"sampling/importance_sampling_ratio/{x}" for x in ("min", "mean", "max")]
DIFFERENCES = [f"sampling/sampling_logp_difference/{x}" for x in ("mean", "max")]


class Mine(CPPOMixin, GRPOTrainer):
    """TRL's own trainer: nothing in between reads the importance weights."""


class Sampler:
    """In the place of TRL's `vllm_generation`: what it returns follows from the prompts."""

    def __init__(self, trainer):
        self.trainer, self.syncs = trainer, 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", None)
        tokenizer = tokenizer or self.trainer.processing_class
        letters = tokenizer("abcdefghij0123456789", add_special_tokens=False)["input_ids"]
        completions, logprobs = [], []
        for row, prompt in enumerate(prompts):
            rng = random.Random(repr((list(map(int, prompt)), row, self.trainer.state.global_step)))
            length = rng.choice([2, 3, 3, 4, self.trainer.max_completion_length])
            ids = [rng.choice(letters) for _ in range(length - 1)] + [tokenizer.eos_token_id]
            completions.append(ids)
            # About those of the models here; one in seven is NaN, which TRL gets as None.
            nan = (rng.random() < 1 / 7 and TRL >= (1, 16) for _ in ids)
            each = [None if missing else rng.uniform(-5, -3) for missing in nan]
            logprobs.append([[value] for value in each])
        return prompts, completions, logprobs, None


def vllm_run(family, cppo, *, mode="token_truncate", clip=(None, 3.0), base=Mine, **options):
    trainer = trainer_of(family, cppo, base=base, **options)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = clip
    trainer.vllm_generation = Sampler(trainer)
    seen = watched(trainer)
    trainer.train()
    assert trainer.vllm_generation.syncs and trainer.vllm_importance_sampling_correction
    return trainer, seen


def check_early_is_late(family, chosen, **options):
    runs = [vllm_run(family, each, **options) for each in (chosen, late(chosen))]
    (early, early_seen), (after, after_seen) = runs
    assert same(weights_of(early.model), weights_of(after.model))
    assert len(early_seen["rollouts"]) == len(after_seen["rollouts"]) > 0
    for ours, theirs in zip(early_seen["rollouts"], after_seen["rollouts"], strict=True):
        assert {*ours} == {*theirs}
        mask = ours["completion_mask"].bool()
        ratio = ours["importance_sampling_ratio"]
        assert torch.equal(ratio, theirs["importance_sampling_ratio"])
        for name in ("old_per_token_logps", "sampling_per_token_logps"):
            equal = (ours[name] == theirs[name]) | ours[name].isnan() & theirs[name].isnan()
            assert equal[mask].all(), name
        # The correction does something, and NaN does nothing.
        assert not torch.allclose(ratio, torch.ones_like(ratio)) and ratio.isfinite().all()
    return runs


@pytest.mark.parametrize("clip", [(None, 3.0), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_importance_weights_of_the_kept_rows_are_those_of_late_pruning(mode, clip):
    (trainer, seen), (_, after) = check_early_is_late("text", HALF, mode=mode, clip=clip)
    # No forward of the pruned completions: half of the old and reference ones.
    assert 0 < 2 * sum(seen["tokens"]) == sum(after["tokens"])
    (rollout,) = seen["rollouts"]
    mask = rollout["completion_mask"].bool()
    ratio = rollout["importance_sampling_ratio"]
    ratio = ratio if mode.startswith("sequence") else ratio[mask]
    difference = (rollout["old_per_token_logps"] - rollout["sampling_per_token_logps"]).abs()
    difference = difference[mask & ~difference.isnan()]
    expected = [ratio.min(), ratio.mean(), ratio.max(), difference.mean(), difference.max()]
    for name, value in zip([*RATIOS, *DIFFERENCES], expected, strict=True):
        assert logged(trainer, name) == pytest.approx([value.item()], rel=1e-6), name


@pytest.mark.parametrize(
    "options",
    [
        # No old log-probabilities but those of the correction.
        dict(num_iterations=1, beta=0.0),
        dict(num_iterations=3, max_steps=3, loss_type="dapo"),
        dict(num_iterations=1, loss_type="vespo", gradient_accumulation_steps=2, max_steps=1),
        dict(family="qwen2_5_vl", cppo=HALF_LOOK, num_iterations=2),
        dict(family="qwen2_5_vl", cppo=HALF, num_iterations=1),
    ],
    ids=str,
)
def test_early_is_late_bit_for_bit_with_a_correction(options):
    options = {"family": "text", "chosen": options.pop("cppo", HALF), **options}
    check_early_is_late(**options)


def test_early_is_late_with_lora():
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    check_early_is_late("text", HALF, more={"peft_config": adapters}, max_steps=3)


def test_a_trainer_that_reads_the_importance_weights_gets_them():
    read = []

    class Reader(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            read.append(rollout["importance_sampling_ratio"].clone())
            return rollout

    class Both(CPPOMixin, Reader):
        pass

    with pytest.warns(UserWarning, match="rollout of Both is pruned: they are computed for every"):
        check_early_is_late("text", HALF, base=Both)
    assert len(read) == 2 and len(read[0]) == 8 and torch.equal(*read)


# Image tokens


class Expanding:
    """In the place of vLLM: an image token becomes three, whatever stands beside it."""

    def __init__(self, token):
        self.token, self.given = token, []

    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        self.given.append([list(prompt["prompt_token_ids"]) for prompt in prompts])
        outputs = []
        for prompt in prompts:
            ids = [[x] * 3 if x == self.token else [x] for x in prompt["prompt_token_ids"]]
            outputs.append(SimpleNamespace(prompt_token_ids=sum(ids, [])))
        return outputs


def mended(token=7):
    llm = Expanding(token)
    trl_vllm_mend.mend_tokens(llm, token)
    return llm


def prompt_of(ids, images):
    return {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {})


def test_an_expanded_image_is_handed_to_vllm_as_one_token():
    llm = mended()
    prompts = [
        prompt_of([1, 7, 7, 7, 2], "one"),
        prompt_of([7, 7, 7, 2, 7, 7, 7], ["two", "images"]),
        prompt_of([1, 2], None),
    ]
    outputs = llm.generate(prompts, sampling_params=None)
    assert llm.given == [[[1, 7, 2], [7, 2, 7], [1, 2]]]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt["prompt_token_ids"]
    # A TRL that hands over one token per image is left alone.
    llm.generate([prompt_of([1, 7, 2], ["one"])])
    assert llm.given[-1] == [[1, 7, 2]]


def test_a_prompt_that_vllm_reads_otherwise_is_refused_in_words():
    with pytest.raises(RuntimeError, match="image prompt of 4 tokens it made 5 .*trl#6294"):
        mended().generate([prompt_of([1, 7, 7, 2], "one")])


def test_the_trl_here_expands_image_tokens_before_it_calls_vllm():
    """If this fails, TRL has mended trl#6294: `mend_tokens` may go."""
    trainer, _ = vllm_run("qwen2_5_vl", HALF, max_steps=1)
    token = trainer.processing_class.image_token_id
    seen = []
    generate = trainer.vllm_generation.generate

    def watch(prompts, images, **more):
        seen.extend(zip(prompts, images, strict=True))
        return generate(prompts, images, **more)

    trainer.vllm_generation.generate = watch
    trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    assert len(seen) == 8
    assert all(list(ids).count(token) > len(images) for ids, images in seen)


# Weights


def test_a_colocated_vllm_forgets_images_after_every_sync():
    done = []
    engine = SimpleNamespace(reset_encoder_cache=lambda: done.append("reset"))
    generation = SimpleNamespace(sync_weights=lambda: done.append("sync"))
    generation.llm = SimpleNamespace(llm_engine=engine)
    trl_vllm_mend.mend_features(generation)
    generation.sync_weights()
    generation.sync_weights()
    assert done == ["sync", "reset"] * 2


@pytest.mark.parametrize("knows", [True, False])
def test_a_server_forgets_images_after_a_sync_or_it_is_said_once(knows):
    done = []

    def post(url):
        done.append(url)
        return SimpleNamespace(ok=knows)

    generation = SimpleNamespace(sync_weights=lambda: done.append("sync"))
    session = SimpleNamespace(post=post)
    generation.vllm_client = SimpleNamespace(base_url="http://here:8000", session=session)
    trl_vllm_mend.mend_features(generation)
    reset = ["sync", "http://here:8000/reset_encoder_cache"]
    if knows:
        generation.sync_weights()
    else:
        with pytest.warns(UserWarning, match="vision tower of an older step .*trl#7198"):
            generation.sync_weights()
    generation.sync_weights()
    assert done == (reset * 2 if knows else [*reset, "sync"])


def test_weights_that_are_taken_from_lora_stay_merged():
    weight = torch.ones(2)

    def iterate():
        weight.add_(1)
        yield "weight", weight
        weight.sub_(1)

    generation = SimpleNamespace(_iter_named_params=iterate)
    trl_vllm_mend.mend_adapters(generation)
    ((name, sent),) = list(generation._iter_named_params())
    assert name == "weight" and sent.tolist() == [2, 2] and weight.tolist() == [1, 1]


def test_tokens_of_a_server_get_the_name_that_trl_reads():
    top = [{"token_id": 7, "logprob": -1.0}, {"token_id": 8, "logprob": -2.0}]
    named = {"token": "token_id:9", "token_id": 9, "logprob": -1.0, "top_logprobs": None}
    entries = [{"token_id": 7, "logprob": -1.0, "top_logprobs": top}, named]

    def post(url, json=None):
        return {"choices": [{"logprobs": {"content": entries}}, {"logprobs": None}]}

    client = SimpleNamespace(_post=post)
    trl_vllm_mend.mend_logprobs(client)
    client._post("http://here/v1/completions", json={})
    assert "token" not in entries[0]
    client._post("http://here/inference/v1/generate", json={})
    assert [entry["token"] for entry in (*entries, *top)] == [f"token_id:{x}" for x in (7, 9, 7, 8)]
