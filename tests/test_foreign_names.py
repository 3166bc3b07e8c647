"""Options of TRL and verl, wherever they are written, are answered with ours."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
from cli_cases import DIGITS, cppo

from cppo.cli.config_file import ConfigError, all_keys
from cppo.cli.run_config import RunConfig, load
from cppo.options.foreign_names import _VALUES, KEYS
from cppo.options.trainer import CPPOConfig, LossConfig

OURS = all_keys(RunConfig)


def ours_in(words):
    return re.findall(r"\b(?:trainer|data|model|rewards)(?:\.\w+)*", words)


@pytest.mark.parametrize("words", sorted({*KEYS.values(), *_VALUES.values()}))
def test_every_answer_names_keys_that_there_are(words):
    assert all(
        key in OURS for key in ours_in(re.sub(r"docs/\w+\.md|the trainer|a model", "", words))
    )


@pytest.mark.parametrize("word", [word for word in _VALUES.values() if " " not in word])
def test_every_value_is_one_that_its_key_takes(word):
    vllm = ["trainer.loss.max_length=8"] if "vllm" in word else []
    assert load(DIGITS, [word, *vllm])


@pytest.mark.parametrize("name", sorted(name for name in KEYS if "." not in name))
def test_no_name_of_theirs_is_a_key_of_ours_at_the_place_where_they_write_it(name):
    """Or it would be taken, and mean something else."""
    for place in (f"trainer.{name}", f"trainer.loss.{name}"):
        if place in OURS:
            assert ours_in(KEYS[name]) == [place]


# (what is written, what the answer names)
ASKED = [
    ("num_generations=8", "here it is trainer.group_size$"),
    ("trainer.num_generations=8", "trainer.num_generations is not a key .its value: 8.; here it"),
    ("trainer.beta=0.1", "here it is trainer.loss.kl_coef$"),  # not betas
    ("beta=0.1", "here it is trainer.loss.kl_coef$"),
    ("trainer.loss.beta=0.1", "here it is trainer.loss.kl_coef$"),
    ("trainer.epsilon=0.2", "here it is trainer.loss.clip_low, and trainer.loss.clip_high where"),
    ("trainer.loss.epsilon_high=0.28", "here it is trainer.loss.clip_high$"),
    ("trainer.loss_type=dr_grpo", "here it is trainer.loss.reduction=dr_grpo$"),
    ("trainer.loss_type=bnpo", "trainer.loss.reduction=dapo, whose mean is over the tokens"),
    ("trainer.loss_type=cispo", "here it is trainer.loss.reduction$"),
    ("trainer.max_completion_length=9", "here it is trainer.max_completion_tokens$"),
    ("trainer.max_prompt_length=9", "here it is trainer.max_prompt_tokens$"),
    ("trainer.per_device_train_batch_size=4", "trainer.batch_size is the completions of a step"),
    ("trainer.gradient_accumulation_steps=4", "trainer.max_tokens_per_microbatch"),
    ("num_train_epochs=2", "here it is trainer.num_epochs$"),
    ("trainer.total_epochs=2", "here it is trainer.num_epochs$"),
    ("trainer.report_to=wandb", "here it is trainer.trackers$"),
    ("trainer.report_to=none", r"here it is trainer.trackers=\[\]$"),
    ("trainer.logging_steps=1", "here it is trainer.log_every$"),
    ("trainer.save_steps=1", "here it is trainer.save_every$"),
    ("trainer.eval_steps=1", "here it is trainer.eval_every$"),
    ("trainer.test_freq=1", "here it is trainer.eval_every$"),
    ("trainer.save_total_limit=1", "here it is trainer.keep_checkpoints$"),
    ("trainer.bf16=true", "here it is trainer.precision=bf16$"),
    ("trainer.dtype=bfloat16", "here it is trainer.precision$"),
    ("trainer.use_peft=true", "trainer.lora is there or null"),
    ("trainer.lora.lora_alpha=16", "here it is trainer.lora.alpha$"),
    ("trainer.use_vllm=true", "here it is trainer.engine=vllm$"),
    ("trainer.vllm_mode=server", "here it is trainer.engine=vllm_server$"),
    ("trainer.vllm_gpu_memory_utilization=0.3", "here it is trainer.vllm.memory_share$"),
    ("trainer.vllm.gpu_memory_utilization=0.3", "here it is trainer.vllm.memory_share$"),
    ("trainer.temperature=0.7", "here it is trainer.loss.temperature$"),
    ("temperature=0.7", "here it is trainer.loss.temperature$"),
    ("trainer.top_p=0.9", "completions are sampled from the whole distribution"),
    ("model.model_name_or_path=x", "here it is model.path$"),
    ("data.dataset_name=x", "here it is data.train.path$"),
    ("reward_funcs=[boxed]", "here it is rewards$"),
    ("trainer.attn_implementation=sdpa", "here it is trainer.attention$"),
    ("trainer.warmup_ratio=0.1", "here it is trainer.warmup_steps, in optimizer steps$"),
    ("trainer.lr_scheduler_type=cosine", "here it is trainer.lr_scheduler$"),
    ("trainer.ppo_epochs=1", "here it is trainer.num_iterations$"),
    ("trainer.mask_truncated_completions=true", "here it is trainer.mask_overlong$"),
    ("trainer.delta=3", "here it is trainer.loss.dual_clip$"),
    ("trainer.importance_sampling_level=sequence", "here it is trainer.loss.importance$"),
    ("trainer.resume_from_checkpoint=x", "--resume` goes on"),
    ("trainer.push_to_hub=true", "nothing is uploaded"),
    ("trainer.deepspeed=ds.json", "the trainer does not shard a model"),
    # verl's sections
    ("actor_rollout_ref.rollout.n=5", "line: actor_rollout_ref.rollout.n is not a key; here it is"),
    ("actor_rollout_ref.actor.kl_loss_coef=0.1", "here it is trainer.loss.kl_coef$"),
    ("actor_rollout_ref.actor.optim.lr=1e-6", "here it is trainer.learning_rate$"),
    ("actor_rollout_ref.model.path=x", "here it is model.path$"),
    ("actor_rollout_ref.actor.loss_agg_mode=token-mean", "here it is trainer.loss.reduction=dapo$"),
    ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "trainer.max_tokens_per_microbatch"),
    ("algorithm.kl_ctrl.kl_coef=0.1", "here it is trainer.loss.kl_coef$"),
    ("data.train_files=x", "here it is data.train.path$"),
    ("data.max_response_length=9", "here it is trainer.max_completion_tokens$"),
    ("data.image_key=images", "here it is data.train.images_key$"),
    ("trainer.default_local_dir=x", "here it is trainer.output_dir$"),
    ("trainer.n_gpus_per_node=2", "accelerate launch"),
    # ours in another place
    ("data.prompt_key=question", "did you mean data.train.prompt_key"),
    ("answer_key=label", "did you mean data.train.answer_key"),
    ("weight_decay=0.1", "did you mean trainer.weight_decay"),
    ("trainer.loss.learning_rate=1", "did you mean trainer.learning_rate"),
    ("optimizer_steps.seed=3", "did you mean trainer.optimizer_steps|did you mean trainer.seed"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "words"), ASKED, ids=[override for override, _ in ASKED])
def test_a_name_of_theirs_is_answered(override, words):
    with pytest.raises(ConfigError, match="is not a key") as caught:
        load(DIGITS, [override])
    assert re.search(words, str(caught.value)), caught.value


def test_in_a_file_and_as_a_flag(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(f"extends: {DIGITS}\nactor_rollout_ref:\n  rollout:\n    temperature: 0.6\n")
    status, _, err = cppo(capsys, "train", str(path))
    words = (
        "actor_rollout_ref.rollout.temperature is not a key; here it is trainer.loss.temperature"
    )
    assert status == 2 and err == f"cppo train: error: {path}: {words}\n"
    with pytest.raises(SystemExit):
        cppo(capsys, "train", DIGITS, "--num-generations=8")
    words = "keys are set as key=value, and num_generations: here it is trainer.group_size"
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cppo(capsys, "train", DIGITS, "--dry-rum")
    assert (
        "unrecognized arguments: --dry-rum; keys are set as key=value\n" in capsys.readouterr().err
    )


def test_what_stands_in_a_mapping_of_ones_own_is_not_looked_at():
    kwargs = "trainer.chat_template_kwargs={beta: 1, n: 2}"
    assert load(DIGITS, [kwargs]).trainer.chat_template_kwargs == {"beta": 1, "n": 2}
    arguments = load(DIGITS, ["trainer.vllm.arguments.dtype=half"]).trainer.vllm.arguments
    assert arguments == {"dtype": "half"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CPPOConfig(num_generations=8), "'num_generations'; here it is CPPOConfig.group_s"),
        (
            lambda: CPPOConfig(beta=0.1),
            "CPPOConfig has no option 'beta'; here it is LossConfig.kl_",
        ),
        (
            lambda: LossConfig(epsilon=0.1),
            "LossConfig has no option 'epsilon'; here it is LossConf",
        ),
        (lambda: CPPOConfig(kl_coef=0.1), "'kl_coef'; here it is LossConfig.kl_coef$"),
        (lambda: CPPOConfig(tau=0.1), "'tau'; it is one of CPPOConfig.loss, a LossConfig$"),
        (
            lambda: CPPOConfig(group_sise=8),
            "has no option 'group_sise'; did you mean 'group_size'?",
        ),
        (lambda: replace(CPPOConfig(), lr=1.0), "'lr'; here it is CPPOConfig.learning_rate$"),
        (lambda: CPPOConfig(zzz=8), "CPPOConfig has no option 'zzz'$"),
    ],
)
def test_python_is_answered_as_the_command_line_is(make, words):
    with pytest.raises(TypeError, match=words.replace("?", r"\?")):
        make()


def test_options_are_copied_and_pickled():
    config = CPPOConfig(group_size=4, loss=LossConfig(tau=0.2))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
