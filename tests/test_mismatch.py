"""What an engine's numbers do to an update: metrics, corrections, options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_trainer import moved
from trainer_cases import (
    config,
    fixed_case,
    gradients,
    noise,
    packed,
    padded_logps,
    questions_for,
    relative_difference,
    tiny,
    trainer_for,
)

from cppo.model.prompts import encode_questions
from cppo.options.loss import CORRECTIONS
from cppo.options.trainer import CPPOConfig, LossConfig, VLLMConfig
from cppo.records import NumItems
from cppo.rollouts.sampler import Draws, Sampling
from cppo.train import engine as engines
from cppo.train import update
from cppo.train.algorithm import microbatch_loss
from cppo.train.mismatch import mismatch, mismatch_metrics
from cppo.train.progress import read_metrics

# The mismatch


def test_metrics_of_the_mismatch_by_hand() -> None:
    model, _, batch = fixed_case("text", lengths=[2, 3, 1, 2, 1, 1, 1, 1])
    d = torch.zeros(batch.rollouts.input_ids.shape)
    tokens = batch.rollouts.completion_mask.nonzero().tolist()
    values = [0.5, -0.25, 0.0, 1.5, math.nan, -2.0, *[0.0] * (len(tokens) - 6)]
    logps = torch.full(d.shape, -3.0)
    for (row, column), value in zip(tokens, values, strict=True):
        d[row, column] = value
    per_token = {"sampling_logps": logps - d, "old_logps": logps}
    stream = dataclasses.replace(batch, per_token=per_token).pack(batch.kept)
    known = [v for v in values if not math.isnan(v)]
    for mode, corrected in (
        ("none", None), ("bypass", None), ("token_truncate", 2), ("token_mask", 2),
        # Ratios of the completions e^0.25, e^1.5, e^-2, then 1: the second and third are bounded.
        ("sequence_truncate", 3), ("sequence_mask", 3),
    ):  # fmt: skip
        config = LossConfig(importance_correction=mode, correction_min=0.5, correction_max=3.0)
        sums = mismatch(torch.zeros(len(tokens)), stream, config)
        found = mismatch_metrics({name: float(value) for name, value in sums.items()})
        assert found["mismatch/mean"] == pytest.approx(sum(map(abs, known)) / len(known))
        assert found["mismatch/max"] == 2.0
        k3 = [math.exp(v) - 1 - v for v in known]
        assert found["mismatch/kl_engine_policy"] == pytest.approx(sum(k3) / len(known))
        reverse = [v * math.exp(v) - math.exp(v) + 1 for v in known]
        assert found["mismatch/kl_policy_engine"] == pytest.approx(sum(reverse) / len(known))
        share = None if corrected is None else corrected / len(known)
        assert found.get("mismatch/corrected_share") == (share and pytest.approx(share))


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_gradients_of_an_update_are_those_of_the_formula(
    family: str, mode: str, has_old: bool
) -> None:
    """In fp64, read anew from the padded forward of the stock model."""
    model, processor, batch = fixed_case(family, dtype=torch.float64)
    mask = batch.rollouts.completion_mask
    logps = padded_logps(model, batch.rollouts)
    torch.manual_seed(1)
    engine = (logps.detach() + 0.6 * torch.randn(mask.shape, dtype=torch.float64)) * mask
    old = (logps.detach() + 0.1 * torch.randn(mask.shape, dtype=torch.float64)) * mask
    knows_old = has_old and mode != "bypass"
    per_token = {"sampling_logps": engine} | ({"old_logps": old} if knows_old else {})
    batch = dataclasses.replace(batch, per_token=per_token)
    options: Any = dict(cpl_coef=0.0, correction_min=0.5, correction_max=1.5)
    own = config(importance_correction=mode, **options)
    everything = torch.arange(len(mask))
    items = NumItems(len(mask), int(mask.sum()))
    found = gradients(
        model,
        lambda: microbatch_loss(model, batch, everything, items, own, processor).loss.backward(),
    )

    before = old if knows_old else logps.detach()
    d = (before - engine) * mask
    if mode.startswith("sequence"):
        d = d.sum(1, keepdim=True).expand_as(d)
    weight = d.exp()
    inside = (weight >= 0.5) & (weight <= 1.5)
    assert 0 < (inside & mask).sum() < mask.sum()
    if mode.endswith("truncate"):
        weight = weight.clamp(0.5, 1.5)
    elif mode.endswith("mask"):
        weight = weight * inside
    else:
        weight = torch.ones_like(d)
    logps = padded_logps(model, batch.rollouts)
    ratio = (logps - (engine if mode == "bypass" else before)).exp()
    a = batch.advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * weight
    loss = -((surrogate * mask).sum(1) / mask.sum(1)).mean()
    expected = gradients(model, loss)
    assert relative_difference(found, expected) < 1e-6


def test_bypass_takes_the_engines_numbers_for_the_old_ones(
    other: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    forwards: list[str] = []
    stock = update.token_logps
    monkeypatch.setattr(update, "token_logps", lambda *a: forwards.append("old") or stock(*a))
    options: dict[str, Any] = dict(optimizer_steps=2, max_steps=2, rewards=noise)
    other(tmp_path / "0", importance_correction="bypass", **options).train()
    assert forwards == []
    other(tmp_path / "1", importance_correction="token_truncate", **options).train()
    assert len(forwards) == 2
    rows = [read_metrics(tmp_path / run)[0] for run in "01"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "bypass"])
def test_an_engine_in_bf16_is_corrected(mode: str, other: Any, tmp_path: Any) -> None:
    trainer = other(tmp_path, importance_correction=mode, max_steps=2, rewards=noise,
                    vllm=VLLMConfig(dtype="bfloat16"))  # fmt: skip
    (engine,) = other.made
    engine._model.to(torch.bfloat16)
    assert max(moved(trainer).values()) > 0
    for row in read_metrics(tmp_path):
        assert 1e-4 < row["mismatch/mean"] < 0.1 and row["mismatch/kl_engine_policy"] > 0


# Options


def test_the_correction_is_one_option_in_two_places() -> None:
    def found(config: CPPOConfig, **changes: Any) -> str:
        return dataclasses.replace(config, **changes).loss.importance_correction

    assert found(CPPOConfig()) == "none"
    # A copy with another engine, as of a config.yaml that a run has written.
    assert found(CPPOConfig(), engine="vllm") == "token_truncate"
    assert found(CPPOConfig(importance_correction="none"), engine="vllm") == "none"
    assert found(CPPOConfig(engine="vllm"), importance_correction="none") == "none"
    assert found(CPPOConfig(engine="vllm"), max_steps=3) == "token_truncate"
    of_loss = CPPOConfig(engine="vllm", loss=LossConfig(importance_correction="sequence_mask"))
    assert found(of_loss, max_steps=3) == "sequence_mask"
    assert found(of_loss, importance_correction="bypass") == "bypass"
    with pytest.raises(ValueError, match="CPPOConfig.importance_correction must be one of"):
        CPPOConfig(importance_correction="tis")
    with pytest.raises(TypeError, match="vllm serve --tensor-parallel-size` has several"):
        VLLMConfig(tensor_parallel_size=2)
    low = LossConfig(temperature=1e-3)  # which vLLM would raise
    with pytest.raises(ValueError, match="engine must be 'builtin' with loss.temperature < 0.01"):
        CPPOConfig(engine="vllm_server", loss=low)
    assert CPPOConfig(loss=low)
    with pytest.raises(ValueError, match="CPPOConfig.engine must be one of"):
        CPPOConfig(engine="sglang")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "VLLMConfig.dtype must be one of"),
        ({"memory_share": 1.5}, "VLLMConfig.memory_share"),
        ({"max_model_len": 1}, "VLLMConfig.max_model_len"),
        ({"address": "localhost:8000"}, "VLLMConfig.address must be of the form http://host:port"),
        ({"check_tolerance": 0}, "VLLMConfig.check_tolerance"),
        ({"arguments": {1: 2}}, "VLLMConfig.arguments"),
        ({"retries": -1}, "VLLMConfig.retries"),
    ],
)
def test_mistakes_in_the_options_of_vllm(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VLLMConfig(**options)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("fp32", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("fp32", "bfloat16", "bfloat16"),
        ("bf16", "float32", "float32"),
    ],
)
def test_the_dtype_of_the_engine(precision: str, dtype: str, expected: str) -> None:
    config = CPPOConfig(engine="vllm", precision=precision, vllm=VLLMConfig(dtype=dtype))
    assert engines.engine_dtype(config) == expected


def test_vllm_that_is_not_installed_is_named(tmp_path: Any) -> None:
    with pytest.raises(ImportError, match=r"CPPOConfig.engine = 'vllm' needs .* 'cppo\[vllm\]'"):
        trainer_for(tmp_path, engine="vllm")


def test_what_an_engine_samples_for_a_prompt_with_images() -> None:
    """One token for each image, in its place: vLLM writes one for each patch by itself."""
    from cppo.rollouts.vllm_requests import requests

    model, processor = tiny("qwen2_5_vl")
    prompts = encode_questions(packed(model), processor, questions_for("qwen2_5_vl"))
    sampling = Sampling(2, 4, 1.0)
    image = model.config.image_token_id
    found = requests(prompts, sampling, Draws(3, 8, slice(0, 8)))
    tokenizer = processor.tokenizer
    for own, question in zip(found, prompts.questions, strict=True):
        text = processor.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True
        )
        assert own.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own.token_ids.count(image) == len(own.images) == len(question.images)
    assert len({own.seed for own in found}) == 4
    # A part of the questions has the seeds that it has in the whole.
    part = requests(prompts.of([2, 3]), sampling, Draws(3, 8, slice(4, 8)))
    assert [own.seed for own in part] == [own.seed for own in found[2:]]
