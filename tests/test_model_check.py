"""The check of a model against itself: its verdicts, its words, its cost, and no trace of it."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import tiny_family
from torch import Tensor
from trainer_cases import VISION_FAMILIES, tiny

import cppo
from cppo.model import attention, comparison, forward
from cppo.model import check as model_check
from cppo.model.wrappers import unwrap
from cppo.ops.pack import pack_completions


def packed_family(family, **options):
    model = tiny_family(family, **options)
    forward.set_attention(model, "sdpa")
    return model


def a_batch(lengths=(7, 5)):
    ids = torch.arange(max(lengths)) % 50 + 3
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack_completions(ids.expand_as(mask), mask, mask & (torch.arange(max(lengths)) >= 2))


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "olmo3", "cohere2", "exaone4"])
def test_an_attention_without_windows_is_seen(family, monkeypatch):
    real = attention.attend

    def without_window(*call, **options):
        return real(*call, **{**options, "sliding_window": None})

    monkeypatch.setattr(attention, "attend", without_window)
    with pytest.raises(ValueError, match="on packed sequences, its logits are off by"):
        model_check.check_model(packed_family(family))


@pytest.mark.parametrize("more", [-1, 1])
def test_a_window_that_is_off_by_one_is_seen(more):
    model = packed_family("gemma3_text")
    model_check.check_model(model)
    other = packed_family("gemma3_text")
    for layer in other.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window += more
    with pytest.raises(ValueError, match="on packed sequences, its logits are off by"):
        model_check.check_model(other)


def test_sequences_that_see_each_other_are_seen(monkeypatch):
    """What a layer that drops `cu_seq_lens` came to: its mask of one element lets all through."""

    def stock(kernel, module, q, k, v, *mask, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[0] if mask else None)
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(attention, "attend", stock)
    words = (
        "cppo: model_type 'llama' cannot be trained here: on packed sequences, its logits are off "
        r"by 0\.\d+ of 0\.\d+ from those that it gives for each sequence alone by its eager "
        r"attention; 1e-06 of the largest is allowed \(compared in float64, where rounding is "
        r"below 1e-12\)"
    )
    with pytest.raises(ValueError, match=words):
        model_check.check_model(packed_family("llama"))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("nemotron", "NemotronAttention must attend within each sequence .* never gets cu_"),
        ("gpt_oss", r"GptOssAttention must do with .* 's_aux' \(attention sinks\)"),
        ("gemma2", r"'softcap' \(attn_logit_softcapping\)"),
        ("llama4_text", "with layers .*'chunked_attention'.* on packed sequences, its logits are"),
        ("lfm2", "with layers .*'conv'.* on packed sequences, its logits are off by"),
        ("modernbert-decoder", "by its LM head, its logits are off by"),
        ("doge", "DogeAttention must attend to all of a sequence .* a mask of its own"),
        ("deepseek_v32", "DeepseekV32Attention must do with plain attention, .* 'indices'"),
    ],
)
def test_a_refusal_says_what_is_wrong(family, words):
    with pytest.raises(ValueError, match=f"model_type {family!r} .*{words}"):
        model_check.check_model(packed_family(family))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("nanochat", {"final_logit_softcapping": 0.2}),
        ("gemma3_text", {"final_logit_softcapping": 0.2}),
    ],
)
def test_scaled_and_capped_heads_pass(family, change):
    model = packed_family(family)
    plain = forward.lm_head(model).logits(torch.ones(model.config.hidden_size))
    for name, value in change.items():
        setattr(model.config, name, value)
        if hasattr(model, name):  # Cohere keeps a copy
            setattr(model, name, value)
    assert not torch.allclose(forward.lm_head(model).logits(torch.ones(32)), plain)
    model_check.check_model(model)


def test_a_head_that_does_more_than_its_weight_says_is_refused():
    model = packed_family("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match="'llama' .* by its LM head, its logits are off by"):
        model_check.check_model(model)
    model = packed_family("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh())
    with pytest.raises(ValueError, match="'llama' .* by its LM head, its logits are off by"):
        model_check.check_model(model)


def test_a_model_with_nan_in_its_weights_is_refused():
    model = packed_family("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'llama' must have finite logits, its own .* are not"):
        model_check.check_model(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gemma3_text", "deepseek_v3"])
def test_a_right_model_passes_in_every_dtype(family, dtype):
    model_check.check_model(packed_family(family).to(dtype), shares=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_model_is_refused_in_every_dtype(dtype):
    with pytest.raises(ValueError, match="'lfm2' .* on packed sequences, its logits are off"):
        model_check.check_model(packed_family("lfm2").to(dtype))


def test_ties_of_a_router_are_no_difference():
    model = packed_family("mixtral").bfloat16()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    model_check.check_model(model, shares=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_weights_are_compared_in_their_own_arithmetic(dtype):
    model = packed_family("qwen3").to(dtype)
    model.hf_quantizer = object()
    model_check.check_model(model, shares=True)
    other = packed_family("nemotron").to(dtype)
    other.hf_quantizer = object()
    with pytest.raises(ValueError, match="'nemotron' .* never gets cu_seq_lens"):
        model_check.check_model(other)
    headed = packed_family("cohere").to(dtype)
    headed.hf_quantizer, headed.logit_scale = object(), 0.5
    words = f"roundings in {str(dtype).removeprefix('torch.')} may add up to"
    with pytest.raises(ValueError, match=f"by its LM head, .*{words}"):
        model_check.check_model(headed)


def state_of(model):
    """All of a model that a forward pass might change."""
    found = {"random": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_store = key in ("_parameters", "_buffers", "_modules")
            found[f"{name}.{key}"] = dict(value) if is_store else copy.copy(value)
        config = getattr(module, "config", None)
        found[f"{name}.config"] = None if config is None else dict(vars(config))
    for name, x in model.named_buffers():
        found[f"{name} value"] = (x.data_ptr(), x.dtype, x.clone())
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else p.grad.clone()
        found[f"{name} value"] = (p.data_ptr(), p._version, p.dtype, p.detach().clone(), gradient)
    return found


def same(one, other):
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)


def longrope():
    """A Phi-3 whose rotary frequencies are written anew in every call."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=16, pad_token_id=0, sliding_window=None,
        rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    )  # fmt: skip
    torch.manual_seed(0)
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize(
    "kind", ["mistral", "opt", "longrope", "mixtral", "adapted", "qwen2_5_vl", "llama4_text"]
)
def test_a_model_is_left_as_it_was_found(kind):
    if kind == "longrope":
        model = longrope()
    elif kind == "adapted":
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
        model = get_peft_model(tiny_family("qwen3"), options)
    else:
        model = tiny(kind)[0] if kind in VISION_FAMILIES else tiny_family(kind)
    forward.set_attention(model, "sdpa")
    base = unwrap(model)
    base.train()
    base.model.layers[0].eval() if hasattr(base.model, "layers") else None
    base(input_ids=torch.arange(3, 12)[None]).logits.sum().backward()
    random, before = torch.get_rng_state(), state_of(model)
    is_refused = kind == "llama4_text"
    verdict = pytest.raises(ValueError, match="'llama4_text'") if is_refused else nullcontext()
    with torch.autocast("cpu", torch.bfloat16):
        with verdict:
            model_check.check_model(model, shares=True)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    after = state_of(model)
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


def test_a_model_is_checked_once_and_costs_four_runs():
    model = packed_family("qwen3")
    runs = []
    model.model.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    batch = a_batch()
    first = cppo.packed_hidden(model, batch)
    assert len(runs) == 4 + 1
    assert torch.equal(cppo.packed_hidden(model, batch), first)
    assert len(runs) == 4 + 2
    shared = cppo.model.shared_prompts.share_prompts(batch, [0, 0])
    cppo.packed_hidden(model, batch, shared=shared)
    assert len(runs) == 4 + 2 + 5 + 1  # met with shared prompts for the first time
    cppo.packed_hidden(model, batch)
    assert len(runs) == 4 + 2 + 5 + 2


def test_another_head_or_adapter_is_another_model():
    from peft import LoraConfig, get_peft_model

    model = packed_family("qwen3")
    runs = []
    model.model.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    model_check.check_model(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for _ in range(2):
        model_check.check_model(adapted)
    assert len(runs) == 8
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    adapted.set_adapter("other")
    for _ in range(2):
        model_check.check_model(adapted)
    adapted.set_adapter("default")
    model_check.check_model(adapted)
    assert len(runs) == 12
    wrong = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh())
    adapted.get_base_model().set_output_embeddings(wrong)
    with pytest.raises(ValueError, match="by its LM head"):
        model_check.check_model(adapted)


def test_an_adapter_that_is_ignored_shows_though_it_is_zero(monkeypatch):
    from peft import LoraConfig, get_peft_model

    def of_base_layer(head, size):
        return head.base_layer.weight, None

    model = get_peft_model(packed_family("qwen3"), LoraConfig(r=2, target_modules=["lm_head"]))
    monkeypatch.setattr(forward, "_affine", of_base_layer)
    with pytest.raises(ValueError, match="'qwen3' .* by its LM head, its logits are off by"):
        model_check.check_model(model)


def test_rotary_positions_that_depend_on_the_longest_sequence_have_a_limit():
    model = longrope().eval()
    forward.set_attention(model, "sdpa")
    with torch.no_grad():
        long = cppo.packed_hidden(model, a_batch((16, 9)))
        short = cppo.packed_hidden(model, a_batch((9,)))
        torch.testing.assert_close(long[-7:], short)
        # Beyond it one sequence changes the other, which is why:
        mixed = forward.run_packed(model, forward.Stream(a_batch((17, 9))))
        assert (mixed[-7:] - short).abs().max() > 1e-3
    words = "a sequence of 17 tokens is longer than 16: .* positions of model_type 'phi3' depend"
    with pytest.raises(ValueError, match=words):
        cppo.packed_hidden(model, a_batch((17, 9)))


def test_it_runs_in_inference_mode_and_not_at_all_while_compiling():
    model = packed_family("qwen3")
    with torch.inference_mode():
        expected = cppo.packed_hidden(model, a_batch())
    other = packed_family("qwen3")
    runs = []
    other.lm_head.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    compiled = torch.compile(lambda batch: cppo.packed_hidden(other, batch), backend="eager")
    torch.testing.assert_close(compiled(a_batch()), expected)
    assert not runs
    wrapped = torch.compile(packed_family("qwen3"), backend="eager")
    torch.testing.assert_close(cppo.packed_hidden(wrapped, a_batch()), expected)
    inside = packed_family("qwen3")
    inside.compile(backend="eager")
    torch.testing.assert_close(cppo.packed_hidden(inside, a_batch()), expected)


def test_what_fails_without_words_is_said_with_its_kind(monkeypatch):
    def broken(*call, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(comparison, "run_packed", broken)
    words = "'llama' cannot be run on packed sequences: IndexError: list index out of range"
    with pytest.raises(ValueError, match=words):
        model_check.check_model(packed_family("llama"))


@pytest.mark.parametrize(
    ("family", "counts"), [("gpt2", True), ("gpt_neo", True), ("opt", False), ("llama", False)]
)
def test_positions_that_count_the_padding(family: str, counts: bool) -> None:
    config_class = transformers.CONFIG_MAPPING[family]
    small = dict(n_embd=16, n_layer=2, n_head=2) if family == "gpt2" else {}
    small |= dict(attention_types=[[["global"], 2]], num_layers=2) if family == "gpt_neo" else {}
    small |= dict(hidden_size=16, num_attention_heads=2, word_embed_proj_dim=16)
    names = {name: size for name, size in small.items() if hasattr(config_class(), name)}
    config = config_class(**names, vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = copy.deepcopy(model.state_dict())
    assert model_check.counts_padding(model.train()) is counts
    assert model.training and all(map(torch.equal, before.values(), model.state_dict().values()))


def test_learned_positions_end_where_their_table_does():
    model = packed_family("opt")
    size = model.config.max_position_embeddings
    limit = model_check.position_limit(model)
    assert limit is not None and limit.tokens == size
    with torch.no_grad():
        cppo.packed_hidden(model, a_batch((size, 5)))
        words = f"a sequence of {size + 1} tokens is longer than {size}: .*has learned positions"
        with pytest.raises(ValueError, match=words):
            cppo.packed_hidden(model, a_batch((size + 1, 5)))


# (class, its config's size, what the refusal says)
ENCODERS = "must be a causal language model, got the encoder-decoder family of {} "
OTHERS = "must be a causal language model of transformers with its body|must let its attention"
REFUSED = [
    ("BartForCausalLM", {}, ENCODERS),
    ("BartForConditionalGeneration", {}, ENCODERS),
    ("MarianForCausalLM", {}, ENCODERS),
    ("PegasusForCausalLM", {}, ENCODERS),
    ("BlenderbotForCausalLM", {}, ENCODERS),
    ("MBartForCausalLM", {}, ENCODERS),
    ("T5ForConditionalGeneration", {}, ENCODERS),
    ("WhisperForConditionalGeneration", {}, ENCODERS),
    ("GPT2LMHeadModel", {"n_layer": 1}, OTHERS),
    ("GPTJForCausalLM", {"n_layer": 1}, OTHERS),
    ("GPTNeoXForCausalLM", {"num_hidden_layers": 1}, OTHERS),
    ("FalconForCausalLM", {"num_hidden_layers": 1}, OTHERS),
    ("BloomForCausalLM", {"n_layer": 1}, OTHERS),
    ("MptForCausalLM", {"n_layers": 1}, OTHERS),
    ("MambaForCausalLM", {"num_hidden_layers": 1}, OTHERS),
]


@pytest.mark.parametrize(("name", "size", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_models_of_another_build_are_refused_in_words(name, size, words):
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**size))
    with pytest.raises(ValueError, match=words.format(name)):
        forward.check_supported(model)
        forward.set_attention(model, "sdpa")
