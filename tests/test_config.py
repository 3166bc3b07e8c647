"""Configuration files: what is read, and every mistake with the words that answer it."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cppo.cli.config_file import ConfigError
from cppo.cli.run_config import dump, load
from cppo.options.trainer import CPPOConfig, LoraConfig, LossConfig
from cppo.train.arguments import check_optimizer_steps

GOOD = """
model: {path: some/model}
data:
  train: {loader: gsm8k, path: data/gsm8k}
  eval: {loader: gsm8k, path: data/gsm8k, split: test}
rewards: [boxed]
trainer:
  batch_size: 8
  group_size: 4
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


# (override of a good file, what the error must say)
BAD_OVERRIDES = [
    # misspelt keys
    (
        "trainer.prune_rat=0.5",
        "trainer.prune_rat is not a key .*0.5.*did you mean trainer.prune_rate",
    ),
    ("prune_rate=0.5", "prune_rate is not a key .*did you mean trainer.prune_rate"),
    ("trainer.tau=0.2", "did you mean trainer.loss.tau"),
    ("trainer.loss.temprature=1", "did you mean trainer.loss.temperature.*Allowed: temperature"),
    ("trainer.lora.rank_of_all=8", r"trainer.lora.rank_of_all is not a key .*Allowed: r, alpha"),
    ("data.train.loder=math", "did you mean data.train.loader"),
    ("zzz=1", r"zzz is not a key \(its value: 1\)\. Allowed: model, data, rewards, trainer"),
    # wrong types
    ("trainer.batch_size=many", r"trainer.batch_size must be a whole number, got 'many' \(text\)"),
    ("trainer.max_steps=1.5", r"trainer.max_steps must be a whole number, got 1.5 \(a number\)"),
    ("trainer.batch_size=true", r"must be a whole number, got True \(true/false\)"),
    ("trainer.learning_rate=[1]", r"learning_rate must be a number, got \[1\] \(a list\)"),
    ("trainer.dynamic_allocation=1", "dynamic_allocation must be true or false, got 1"),
    ("trainer.scale_rewards=off", r"scale_rewards must be text, got False \(true/false\)"),
    ("trainer.trackers=wandb", r"trainer.trackers must be a list, got 'wandb' \(text\)"),
    ("trainer.betas=[0.9]", "trainer.betas must be a list of 2 values"),
    ("trainer.betas=[0.9, x]", r"trainer.betas\[1\] must be a number, got 'x'"),
    ("trainer.loss=3", "trainer.loss must be a mapping of keys, got 3"),
    ("trainer=none", r"trainer must be a mapping of keys, got 'none' \(text\)"),
    ("data.train=none", "data.train must be a mapping of keys, got 'none'"),
    # out of range
    ("trainer.prune_rate=1.0", "trainer.prune_rate must be a number >= 0 and < 1, got 1.0"),
    ("trainer.prune_rate=.nan", "trainer.prune_rate must be .*, got nan"),
    ("trainer.seed=-1", "trainer.seed must be an integer >= 0, got -1"),
    ("trainer.group_size=0", "trainer.group_size must be an integer >= 2, got 0"),
    ("trainer.learning_rate=0", "trainer.learning_rate must be a number > 0, got 0"),
    ("trainer.loss.tau=0", "trainer.loss.tau must be a number > 0, got 0"),
    ("trainer.loss.fraction=2", "trainer.loss.fraction must be a number >= 0 and <= 1, got 2"),
    ("trainer.lora.r=0", "trainer.lora.r must be an integer >= 1, got 0"),
    ("trainer.betas=[0.9, 1.0]", "trainer.betas must be two numbers in"),
    ("data.train.limit=0", "data.train.limit must be an integer >= 1, got 0"),
    ("trainer.output_dir=''", "trainer.output_dir must be the path of a folder, got ''"),
    ("trainer.seed=1e400", "trainer.seed must be a whole number"),
    ("trainer.process_timeout=1e300", "process_timeout must be a number > 0 and <= 1e.09, got"),
    ("trainer.lora.target_modules='('", "target_modules must be a regular expression that can .*"),
    ("trainer.best_metric=foo", "trainer.best_metric must be 'sampled/<reward>' or 'greedy/<rew"),
    # nothing would be learned
    ("trainer.reward_weights=[0]", "trainer.reward_weights must be not all 0: nothing would be le"),
    # names
    ("trainer.loss.divergence=kl", "trainer.loss.divergence must be one of 'k3', .*, got 'kl'"),
    ("trainer.precision=fp8", "trainer.precision must be one of 'fp32', 'bf16', got 'fp8'"),
    ("trainer.lr_scheduler=cosin", "trainer.lr_scheduler must be one of .*cosine.*, got 'cosin'"),
    ("data.train.loader=gsm", "data.train.loader must be one of .*'gsm8k'.*, got 'gsm'"),
    ("rewards=[boxd]", "rewards: .*unknown reward 'boxd'; did you mean 'boxed'"),
    ("rewards=[{cosine_length: {max_len: 5}}]", "rewards: .*'max_len'.*did you mean 'max_length'"),
    (
        "rewards=[{boxed: {}, weight: heavy}]",
        "rewards: .*weight of 'boxed' must be a finite number",
    ),
    (
        "trainer.positive_views=[rotate]",
        "trainer.positive_views: .*'rotate'; did you mean 'rotation'",
    ),
    ("trainer.negative_views=[{zoom_crop: {scal: 2}}]", "trainer.negative_views: .*'scal'"),
    # options that do not go together
    ("model.builder=tiny_digits", "model.path or model.builder must be given, not both"),
    ("model.path=none", "model.path or model.builder must be given, not both: got path None"),
    ("model={builder: tiny}", "model.builder must be one of 'tiny_digits', .*, got 'tiny'"),
    (
        "model.architecture={hidden_size: 8}",
        "model.architecture must be a mapping with a model_type",
    ),
    ("data.train.loader=digits", "data.train.path must be left out: loader 'digits' makes its own"),
    (
        "data.train.path=none",
        "data.train.path must be a file or folder for loader 'gsm8k', got None",
    ),
    ("rewards=[]", "rewards must name at least one reward"),
    ("trainer.warmup_steps=-1", "trainer.warmup_steps must be an integer >= 0, got -1"),
    ("trainer.reward_weights=[1, 2]", "a number for each of the 1 rewards, got 2"),
    (
        "trainer={batch_size: 8, negative_views: [], loss: {perception: vppo}}",
        "trainer.negative_views must name a perturbation with trainer.loss.perception = 'vppo'",
    ),
    (
        "trainer.loss={importance: sequence, perception: vppo}",
        "trainer.loss.importance must be 'token' with perception = 'vppo', which chooses tokens, "
        "got 'sequence'",
    ),
    (
        "trainer={batch_size: 8, positive_views: [], loss: {cpl_coef: 0.01}}",
        "must name a perturbation each while trainer.loss.cpl_coef > 0",
    ),
    # overrides that are none
    ("trainer.seed", "an override must be key.sub=value, got 'trainer.seed'"),
    ("trainer..seed=1", "an override must be key.sub=value"),
    ("trainer.betas=[0.9", "trainer.betas: line 1, column .*, got '\\[0.9'"),
]


@pytest.mark.parametrize(("override", "words"), BAD_OVERRIDES, ids=[o for o, _ in BAD_OVERRIDES])
def test_a_bad_override_is_answered(good, override, words):
    with pytest.raises(ConfigError, match="^command line: .*" + words):
        load(good, [override])


# (a whole file, what the error must say)
BAD_FILES = [
    ("", "the file is empty"),
    ("# nothing but a comment", "the file is empty"),
    ("[model, data]", "must hold a mapping of keys, got a list"),
    ("model: {path: a", "line 1, column .*expected ',' or '}'"),
    ("model:\n\tpath: a", "line 2, column 1: found character '.t'"),
    (GOOD + "  batch_size: 16\n", "line 10, column 3: key 'batch_size' appears twice"),
    (GOOD + "model: {path: b}\n", "line 10, column 1: key 'model' appears twice"),
    (GOOD + "1: one\n", "1 is not a key"),
    (GOOD.replace("rewards: [boxed]\n", ""), "rewards is missing"),
    (GOOD.replace("  train: {loader: gsm8k, path: data/gsm8k}\n", ""), "data.train is missing"),
    (
        GOOD.replace("model: {path: some/model}", "model:"),
        "model must be a mapping of keys, got None",
    ),
    (GOOD.replace("batch_size: 8", "batch_sise: 8"), "did you mean trainer.batch_size"),
    (GOOD + "  reward_weights: [2]\n" + "rewards: [numeric]\n", "key 'rewards' appears twice"),
    (
        GOOD.replace("[boxed]", "[{boxed: {}, weight: 2}]") + "  reward_weights: [1]\n",
        "trainer.reward_weights must be left out where `rewards` has a weight",
    ),
    (
        GOOD.replace("  eval: {loader: gsm8k, path: data/gsm8k, split: test}\n", "")
        + "  eval_every: 5\n",
        "trainer.eval_every must be 0 without held-out questions .*, got 5",
    ),
    (
        GOOD + "  dynamic_allocation: false\n  batch_size_: 8\n",
        "trainer.batch_size_ is not a key .*did you mean trainer.batch_size",
    ),
    (
        GOOD.replace("batch_size: 8", "batch_size: 6") + "  dynamic_allocation: false\n",
        "trainer.batch_size must be a multiple of group_size = 4, got 6",
    ),
    ("extends: bad.yaml\n" + GOOD, "extends leads back to the file itself"),
    ("extends: [a]\n" + GOOD, "extends must be the name of a file"),
    ("extends: nowhere.yaml\n" + GOOD, "nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[words for _, words in BAD_FILES])
def test_a_bad_file_is_answered(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load(path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_answered(tmp_path):
    with pytest.raises(ConfigError, match="missing.yaml: no such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="cannot be read: it is not UTF-8"):
        load(tmp_path / "binary.yaml")


def test_values_take_the_type_of_their_field(good):
    config = load(
        good,
        [
            "trainer.learning_rate=1e-4",  # text in YAML 1.1
            "trainer.weight_decay='0.1'",
            "trainer.max_grad_norm=2",
            "trainer.max_steps=1e3",
            "trainer.max_prompt_tokens=none",
            "trainer.betas=[0.9, 0.95]",
            "trainer.gradient_checkpointing=True",
            "trainer.lora.r=4",
            "trainer.positive_views=[{rotation: {degrees: 5}}]",
            "data.eval=null",
            "model.path=a=b",  # only the first = divides
        ],
    )
    trainer = config.trainer
    assert trainer.learning_rate == 1e-4 and trainer.weight_decay == 0.1
    assert trainer.max_grad_norm == 2.0 and isinstance(trainer.max_grad_norm, float)
    assert trainer.max_steps == 1000 and isinstance(trainer.max_steps, int)
    assert trainer.max_prompt_tokens is None and trainer.gradient_checkpointing is True
    assert trainer.betas == (0.9, 0.95) and trainer.lora == LoraConfig(r=4)
    assert trainer.positive_views == ({"rotation": {"degrees": 5}},)
    assert config.data.eval is None and config.model.path == "a=b"


# (options of a config, what the error must say)
BAD_OPTIONS = [
    ({"output_dir": 5}, "output_dir must be the path of a folder, got 5"),
    ({"output_dir": None}, "output_dir must be the path of a folder, got None"),
    ({"output_dir": b"runs"}, "output_dir must be the path of a folder, got b'runs'"),
    ({"output_dir": "a\0b"}, "output_dir must be the path of a folder, got "),
    (
        {"best_metric": 5},
        "best_metric must be 'sampled/<reward>' or 'greedy/<reward>', or None, got",
    ),
    ({"best_metric": "sampled/"}, "best_metric must be 'sampled/<reward>' or "),
    (
        {"best_metric": "greedy/boxed", "eval_greedy": False},
        "best_metric must be 'sampled/<reward>' with eval_greedy = False, or None, got 'greedy/bo",
    ),
    ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs must be a dict with text as its keys"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict with text as its keys"),
    ({"group_size": 4.0}, "group_size must be an integer >= 2, got 4.0"),
    ({"group_size": np.bool_(True)}, "group_size must be an integer >= 2, got True"),
    ({"eval_samples": torch.tensor(True)}, "eval_samples must be an integer >= 1, got True"),
    ({"seed": 2**63}, r"seed must be an integer >= 0 and < 2\*\*63, got 9223372036854775808"),
    ({"learning_rate": 10**400}, "learning_rate must be a number > 0, got 1000"),
    ({"betas": (0, 10**400)}, "betas must be two numbers in"),
    ({"weight_decay": math.inf}, "weight_decay must be a number >= 0, got inf"),
    ({"batch_size": "8"}, "batch_size must be an integer >= 1, got '8'"),
    ({"max_steps": 2.5}, "max_steps must be an integer >= 1, got 2.5"),
    ({"learning_rate": "1e-6"}, "learning_rate must be a number > 0, got '1e-6'"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
    ({"betas": (0.9, "x")}, r"betas must be two numbers in \[0, 1\), got \(0.9, 'x'\)"),
    ({"trackers": "wandb"}, "trackers must be a tuple or list, got 'wandb'"),
    ({"positive_views": "rotation"}, "positive_views must be a tuple or list, got 'rotation'"),
    ({"loss": {"tau": 1}}, "loss must be a LossConfig, got {'tau': 1}"),
    ({"lora": 8}, "lora must be a LoraConfig or None, got 8"),
    ({"scale_rewards": None}, "scale_rewards must be one of 'group', 'none', 'batch', got None"),
    ({"prune": np.array(["smallest", "largest"])}, "prune must be one of 'smallest', "),
    ({"reward_weights": (0, 0.0)}, "reward_weights must be not all 0"),
    ({"reward_weights": np.zeros(2)}, "reward_weights must be finite numbers, one per reward"),
    ({"reward_weights": ()}, "reward_weights must be not all 0"),
    ({"reward_weights": (1.0, math.inf)}, "reward_weights must be finite numbers, one per rew"),
    ({"reward_weights": 2.0}, "reward_weights must be finite numbers, .*, got 2.0"),
    ({"optimizer_steps": 65}, "optimizer_steps must be <= 64, the completions kept, got 65"),
    (
        {"optimizer_steps": 17, "prune_rate": 0.75, "dynamic_allocation": False},
        "optimizer_steps must be <= 16, the completions kept, got 17",
    ),
    (
        # 4 questions are drawn for 2 completions of each, of which a batch keeps 6 of 12.
        {
            **dict(batch_size=8, group_size=3, prune_rate=0.5, prune_scope="batch"),
            "optimizer_steps": 7,
        },
        "optimizer_steps must be <= 6, the completions kept, got 7",
    ),
    (
        {"warmup_steps": 3, "lr_scheduler": "constant"},
        "warmup_steps must be 0 with lr_scheduler = 'constant'",
    ),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_a_bad_option_is_answered(options, words):
    with pytest.raises(ValueError, match=f"^CPPOConfig.{words}"):
        CPPOConfig(**options)


@pytest.mark.parametrize("targets", [5, (1,), (), "", ("",), None, ["q_proj", 2], {"q_proj": 1}])
def test_layers_that_are_no_names_are_answered(targets):
    with pytest.raises(ValueError, match="LoraConfig.target_modules must be 'all-linear', a regu"):
        LoraConfig(target_modules=targets)


def test_numbers_of_other_libraries_are_taken_as_plain_ones():
    config = CPPOConfig(
        group_size=np.int64(4),
        batch_size=torch.tensor(16),
        prune_rate=np.float32(0.5),
        eval_greedy=np.bool_(False),
        betas=[np.float64(0.9), torch.tensor(0.5)],
        reward_weights=(np.int32(2), 0),
        output_dir=Path("runs") / "here",
        loss=LossConfig(temperature=np.float16(0.5), max_length=np.uint8(7)),
        lora=LoraConfig(r=np.int64(4), target_modules=["q_proj"]),
    )
    assert config == CPPOConfig(
        group_size=4,
        batch_size=16,
        prune_rate=0.5,
        eval_greedy=False,
        betas=(0.9, 0.5),
        reward_weights=(2, 0),
        output_dir="runs/here",
        loss=LossConfig(temperature=0.5, max_length=7),
        lora=LoraConfig(r=4, target_modules=("q_proj",)),
    )
    for value in dataclasses.asdict(config).values():
        assert type(value) in (int, float, bool, str, tuple, dict, type(None))


def test_steps_that_the_completions_just_fill_are_taken():
    assert CPPOConfig(batch_size=8, group_size=4, optimizer_steps=8).completions_kept() == 8
    few = dict(batch_size=8, group_size=4, prune_rate=0.75, dynamic_allocation=False)
    assert CPPOConfig(**few, optimizer_steps=2).completions_kept() == 2
    check_optimizer_steps(CPPOConfig(batch_size=8, optimizer_steps=2), 4)
    words = "CPPOConfig.optimizer_steps must be <= 2, the completions of one of 4 processes, got 3"
    with pytest.raises(ValueError, match=words):
        check_optimizer_steps(CPPOConfig(batch_size=8, optimizer_steps=3), 4)
    check_optimizer_steps(CPPOConfig(batch_size=2, group_size=2), 4)


def test_a_partial_loss_keeps_the_defaults_of_the_trainer(good):
    # Images are contrasted where that is asked for; the ops are asked by their views.
    assert CPPOConfig().loss == LossConfig(cpl_coef=0.0) and LossConfig().cpl_coef == 0.01
    assert load(good, ["trainer.loss.kl_coef=0.1"]).trainer.loss.contrasts is False
    assert load(good, ["trainer.loss.cpl_coef=0.1"]).trainer.loss.contrasts is True
    config = load(good, ["trainer.loss.tau=0.3"])
    assert config.trainer.loss == dataclasses.replace(CPPOConfig().loss, tau=0.3)


def test_later_overrides_win_and_reach_through_empty_sections(good):
    config = load(
        good, ["trainer.seed=1", "trainer.seed=2", "trainer.lora=null", "trainer.lora.r=2"]
    )
    assert config.trainer.seed == 2 and config.trainer.lora == LoraConfig(r=2)


def test_extends_merges_key_by_key(tmp_path, good):
    child = tmp_path / "child.yaml"
    child.write_text("extends: good.yaml\nmodel: {path: other}\ntrainer: {batch_size: 12}\n")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\ntrainer: {seed: 3}\n")
    config = load(grandchild)
    assert config.model.path == "other" and config.rewards == ("boxed",)
    assert (config.trainer.batch_size, config.trainer.group_size, config.trainer.seed) == (12, 4, 3)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.lora.r=8", "trainer.lora.target_modules=[q_proj, v_proj]"],
        ["rewards=[{cosine_length: {max_length: 64, correct: [1.0, 0.5]}, weight: 0.5}, boxed]"],
        ["data.system_prompt='Say: \"#1\"\\n- then 1e-4'", "trainer.learning_rate=3e-7"],
        ["trainer.trackers=[tensorboard]", "trainer.reward_weights=[2]", "data.eval=null"],
        ["model={builder: tiny_digits}", "data.train={loader: digits, limit: 10}"],
    ],
)
def test_dump_reads_back_to_the_same_configuration(good, tmp_path, overrides):
    config = load(good, overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config
    assert dump(load(copy)) == dump(config)
