"""The verl adapter on packed sequences, verl's default, with what runs beside them there.

Text models need nothing. Without flash-attn verl's Qwen-VL attention stops; `verl_flash` stands in
for it. Everything else is verl's own: packing, rolled labels, its forwards, Ulysses, LoRA.
"""

import pytest
import torch

pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")

from tensordict import TensorDict  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402
from verl_cases import (  # noqa: E402
    FUSED,
    LOSS,
    engine_and_batch,
    engine_for,
    gradients_and_metrics,
    load_example,
    run_two,
    worst,
)
from verl_flash import plain_flash_attention  # noqa: E402

from cppo.demo.tiny import build_tiny_text_model  # noqa: E402

example = load_example()

from verl.utils import tensordict_utils as tu  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def padded(one_process):
    """Batch, gradients and metrics of an update with padding."""
    engine, batch = engine_and_batch(example)
    return batch, *gradients_and_metrics(engine, batch, example.actor_config(**LOSS))


@pytest.fixture
def flash():
    with plain_flash_attention():
        yield


def packed_update(batch, options, **settings):
    engine = engine_for(example, use_remove_padding=True, **options)
    batch = batch.copy()
    tu.assign_non_tensor(batch, use_remove_padding=True, **settings)
    return gradients_and_metrics(engine, batch, example.actor_config(**LOSS))


DYNAMIC = dict(use_dynamic_bsz=True, max_token_len_per_gpu=150)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (dict(), dict()),
        (dict(), DYNAMIC),
        (FUSED, dict(use_fused_kernels=True)),
        (FUSED, dict(use_fused_kernels=True, **DYNAMIC)),
    ],
    ids=["packed", "dynamic", "fused", "fused dynamic"],
)
def test_packed_sequences_have_the_gradients_of_padded_ones(
    padded, flash, options, settings, stats_calls
):
    batch, expected, their_metrics = padded
    found, metrics = packed_update(batch, options, **settings)
    assert worst(found, expected) < 2e-4
    assert metrics == pytest.approx(their_metrics, rel=1e-4)
    assert metrics["perception_tokens"] > 0 and metrics["gated_completions"] > 0
    assert bool(stats_calls) == bool(options)


def text_batch(**settings):
    """Eight completions of random tokens, of three different advantages."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for number in range(8):
        sizes = torch.randint(2, 9, (2,), generator=generator).tolist()
        prompt, response = (torch.randint(5, 30, (n,), generator=generator) for n in sizes)
        ids = torch.cat([prompt, response])
        for name, value in dict(
            prompts=prompt, responses=response, input_ids=ids,
            position_ids=torch.arange(len(ids)), response_mask=torch.ones_like(response),
            loss_mask=torch.ones_like(response), advantages=torch.full(sizes[1:], number % 3 - 1.0),
        ).items():  # fmt: skip
            rows.setdefault(name, []).append(value)
    nested = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in rows.items()}
    batch = TensorDict(nested, batch_size=8)
    tu.assign_non_tensor(batch, global_batch_size=8, **example.SETTINGS | settings)
    return batch


def test_text_models_run_packed_without_flash_attn(monkeypatch):
    # verl patches the class; it is as before after the test.
    forward = Qwen3ForCausalLM.forward
    found = []
    for packed, options in ((False, {}), (True, {}), (True, FUSED)):
        monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
        model, _ = build_tiny_text_model(size="test")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        engine = example.build_engine(model, None, use_remove_padding=packed, **options)
        batch = text_batch(use_remove_padding=packed, use_fused_kernels=bool(options))
        example.add_old_log_probs(engine, batch)
        found.append(gradients_and_metrics(engine, batch, example.actor_config(**LOSS))[0])
    assert worst(found[1], found[0]) < 2e-4 and worst(found[2], found[0]) < 2e-4


def test_two_optimizer_steps_on_packed_sequences(padded, flash):
    batch, actor = padded[0], example.actor_config(**LOSS)
    parameters = []
    for packed in (False, True):
        engine = engine_for(example, use_remove_padding=packed)
        before = [p.full_tensor().clone() for p in engine.module.parameters()]
        for _ in range(2):
            step = batch.copy()
            tu.assign_non_tensor(step, use_remove_padding=packed)
            with engine.train_mode():
                output = engine.train_batch(step, example.partial(example.ppo_loss, config=actor))
            engine.lr_scheduler_step()
            assert 0 < output["metrics"]["grad_norm"] < 1000
        parameters.append([p.full_tensor() for p in engine.module.parameters()])
    moved = [(a - b).abs().max() for a, b in zip(parameters[0], before, strict=True)]
    apart = [(a - b).abs().max() for a, b in zip(*parameters, strict=True)]
    assert min(moved) > 1e-4 and max(apart) < 0.05 * max(moved)


def test_lora_trains_its_adapters_alone(padded, flash):
    options = dict(lora_rank=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        engine = engine_for(example, use_remove_padding=packed, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=generator)
        batch = padded[0].copy()
        tu.assign_non_tensor(batch, use_remove_padding=packed)
        found.append(gradients_and_metrics(engine, batch, example.actor_config(**LOSS)))
    (with_padding, their_metrics), (without, metrics) = found
    assert without and all("lora_" in name for name in without)
    assert worst(without, with_padding) < 2e-4
    assert metrics == pytest.approx(their_metrics, rel=1e-4) and metrics["cpl_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sequences", "fused"])
def test_sequences_cut_between_two_processes_have_the_gradients_of_one(padded, how, tmp_path):
    _, expected, their_metrics = padded
    for found, metrics in run_two(how, tmp_path):
        assert worst(found, expected) < 2e-4
        assert metrics == pytest.approx(their_metrics, rel=1e-4)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_without_flash_attn_verl_stops_in_its_own_attention():
    """When this fails, verl has a plain attention of its own, and `verl_flash` can go."""
    from verl.models.transformers import qwen2_vl

    assert not hasattr(qwen2_vl, "_flash_use_top_left_mask")
    assert not hasattr(qwen2_vl, "flash_attn_varlen_func")
