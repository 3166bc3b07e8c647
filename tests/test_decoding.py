"""The decoding loop's parts: exact draws, no waits, keys and values in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_family
from test_attention_kernel import Attentions
from torch import Tensor
from trainer_cases import VISION_FAMILIES, packed, questions_for, tiny

import cppo.rollouts.engine
import cppo.rollouts.sampler as sampler
from cppo.model import attention, forward
from cppo.model.cache import can_be_joined, completion_cache, prompt_cache
from cppo.model.forward import LMHead
from cppo.model.prompts import Prompts, encode_questions
from cppo.questions import Question
from cppo.rollouts import memory
from cppo.rollouts.rollout import sample_completions
from cppo.rollouts.sampler import Draws, Sampling, decode, inverse_cdf

DRAWS = 1_000_000


def text_prompts(lengths: list[int]) -> Prompts:
    """Random prompts, padded on the left."""
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 60, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    return Prompts([Question([], [], {}) for _ in lengths], ids * mask, mask, None, None)


# The draws


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 128, 300])
def test_draws_follow_the_softmax(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    hidden = torch.randn(1, 8).to(dtype)
    weight = torch.randn(vocabulary, 8).to(dtype)
    bias = torch.zeros(vocabulary, dtype=dtype)
    bias[[0, 5, vocabulary - 1]] = -torch.inf
    head, temperature = LMHead(weight, bias, None, 1.0, None), 0.8
    expected = (head.logits(hidden).double() / temperature).softmax(-1)[0]
    found = torch.zeros(vocabulary, dtype=torch.int64)
    rows = hidden.expand(DRAWS // 50, -1)
    for _ in range(50):
        uniform = torch.rand(len(rows), dtype=torch.float64)
        drawn, logps = sampler._draw(rows, head, temperature, uniform)
        assert (logps - expected.log()[drawn]).abs().max() < 1e-5
        found += drawn.bincount(minlength=vocabulary)
    possible = expected > 0
    assert found[~possible].sum() == 0 and int((~possible).sum()) == 3
    counts = expected[possible] * DRAWS
    chi_square = ((found[possible] - counts).square() / counts).sum().item()
    freedom = int(possible.sum()) - 1
    # Mean `freedom`, variance twice that: five standard deviations above it.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [5, 128, 129, 300])
def test_no_number_draws_a_token_of_weight_zero(dtype: torch.dtype, vocabulary: int) -> None:
    edge = torch.tensor([0.0, 5e-324, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    for token in {0, 3, vocabulary - 1, vocabulary // 2}:
        weights = torch.zeros(len(edge), vocabulary, dtype=dtype)
        weights[:, token] = 1e-30
        assert inverse_cdf(weights, edge).tolist() == [token] * len(edge)
    # The first and the last of several, by the smallest and the largest number.
    weights = torch.zeros(len(edge), vocabulary, dtype=dtype)
    weights[:, 1:-1] = torch.rand(vocabulary - 2, dtype=dtype) + 0.1
    drawn = inverse_cdf(weights, edge)
    assert drawn[0] == 1 and drawn[-1] == vocabulary - 2


def test_a_number_draws_what_an_exact_sum_says() -> None:
    torch.manual_seed(0)
    weights = torch.randn(64, 1000, dtype=torch.float64).mul(3).softmax(-1)
    uniform = torch.rand(64, dtype=torch.float64)
    expected = torch.searchsorted(weights.cumsum(-1), uniform[:, None], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights, uniform), expected)


# The loop


def draws_of(prompts: Prompts, group: int) -> Draws:
    count = group * len(prompts.questions)
    return Draws(0, count, slice(0, count))


def decoded(every: int, drop: float, monkeypatch: pytest.MonkeyPatch, seed: int = 3) -> Any:
    monkeypatch.setattr(sampler, "_LOOK_EVERY", {"cpu": every})
    monkeypatch.setattr(sampler, "_DROP_SHARE", drop)
    model, _ = tiny("text")
    closing = list(range(3, 24))
    sampling = Sampling(4, 40, 1.0, suppressed=[1, 2], closing=closing, pad=1)
    draws = Draws(seed, 12, slice(0, 12))
    return decode(packed(model).eval(), text_prompts([5, 3, 7]), sampling, draws).tokens


def test_when_it_looks_and_drops_changes_no_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = decoded(1, 0.2, monkeypatch)
    for every, drop in ((1, 0.0), (1, 2.0), (8, 0.2), (8, 0.0), (64, 0.2)):
        assert torch.equal(decoded(every, drop, monkeypatch), tokens)
    assert not torch.equal(decoded(1, 0.2, monkeypatch, seed=4), tokens)
    ended = torch.isin(tokens, torch.arange(3, 24))
    assert (ended.sum(1) <= 1).all() and ended[:, -1].any()  # the longest has no padding
    behind = ended.cumsum(1) - ended.long() > 0
    assert (tokens[behind] == 1).all() and (tokens[~behind] != 1).all()
    assert len(set(ended.long().argmax(1).tolist())) > 3


@pytest.mark.parametrize("family", ["text", *VISION_FAMILIES])
def test_the_host_waits_once_in_eight_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_LOOK_EVERY", {"cpu": 8})
    model, processor = tiny(family)
    prompts = encode_questions(model, processor, questions_for(family))
    packed(model).eval()
    waits = {}
    for tokens in (24, 48):
        sampling = Sampling(4, tokens, 1.0, suppressed=[2])
        with Attentions() as ops, torch.autocast("cpu", torch.bfloat16):
            found = decode(model, prompts, sampling, draws_of(prompts, 4))
            assert found.tokens.shape == found.logps.shape == (16, tokens)
        waits[tokens] = len(ops.waits)
        assert {dtype for _, dtype in ops.seen} == {torch.bfloat16}
    looks = (48 - 24) // 8
    # `tolist` of the rows' states is one transfer, which reads each number of it on the host.
    assert (waits[48] - waits[24]) == looks * _reads_of_a_look()


def _reads_of_a_look() -> int:
    with Attentions() as ops:
        torch.zeros(4, dtype=torch.int64).tolist()
    return len(ops.waits)


def test_hidden_states_that_are_not_finite_are_an_error() -> None:
    model, _ = tiny("text")
    packed(model).eval()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    words = "hidden states are not finite in 6 of 6 completions"
    with pytest.raises(FloatingPointError, match=words):
        decode(model, text_prompts([5, 3, 7]), Sampling(2, 4, 1.0), Draws(0, 6, slice(0, 6)))


@pytest.mark.parametrize("wrong", ["weight", "suppressed", "temperature"])
def test_logits_that_say_nothing_are_an_error(wrong: str) -> None:
    model, _ = tiny("text")
    packed(model).eval()
    head = model.get_output_embeddings().weight
    if wrong == "weight":
        with torch.no_grad():
            head[70] = torch.nan  # in no prompt
    sampling = Sampling(
        2,
        4,
        temperature=1e-45 if wrong == "temperature" else 1.0,
        suppressed=range(len(head)) if wrong == "suppressed" else (),
    )
    with pytest.raises(FloatingPointError, match="logits are not finite in 6 of 6 completions"):
        decode(model, text_prompts([5, 3, 7]), sampling, Draws(0, 6, slice(0, 6)))


@pytest.mark.parametrize("family", ["text", *VISION_FAMILIES])
def test_prompts_in_parts_give_the_same_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny(family)
    prompts = encode_questions(model, processor, questions_for(family))
    packed(model).eval()
    rows = []
    stock = model.model.forward

    def watched(*arguments: Any, **options: Any) -> Any:
        rows.append(options["input_ids"].shape)
        return stock(*arguments, **options)

    monkeypatch.setattr(model.model, "forward", watched)
    whole = decode(model, prompts, Sampling(2, 6, None), draws_of(prompts, 2)).tokens
    count, width = prompts.input_ids.shape
    assert rows[0] == (count, width)
    rows.clear()
    monkeypatch.setattr(sampler, "_PREFILL_TOKENS", 3 * width + 1)
    again = decode(model, prompts, Sampling(2, 6, None), draws_of(prompts, 2)).tokens
    assert torch.equal(again, whole)
    assert [shape for shape in rows if shape[1] == width] == [(3, width), (1, width)]


# The cache


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "olmo3", "cohere2"])
@pytest.mark.parametrize("window", [None, 4])
def test_logits_from_the_cache_in_place_are_those_of_the_whole_row(
    family: str, window: int | None
) -> None:
    model = tiny_family(family, window=window).double()
    forward.set_attention(model, "sdpa")
    prompts = text_prompts([6, 4])
    mask = torch.nn.functional.pad(prompts.attention_mask.long(), (0, 9), value=1)
    mask = mask.repeat_interleave(2, 0)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([prompts.input_ids.repeat_interleave(2, 0), ids], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        expected = model.model(input_ids=ids, **options).last_hidden_state
        forward.set_attention(model, "sdpa")
        cache = prompt_cache(model)
        run(model, cache, prompts.input_ids, mask[::2, :6], positions[::2, :6])
        cache = completion_cache([cache], 2, 9)
        storage = [layer._keys.data_ptr() for layer in cache.layers]
        rows = torch.arange(4)
        for step in range(9):
            if step == 5:
                rows = torch.tensor([1, 3])
                cache.batch_select_indices(rows)
            own = ids[rows, 6 + step, None], mask[rows, : 7 + step]
            found = run(model, cache, *own, positions[rows, 6 + step, None])
            torch.testing.assert_close(found[:, 0], expected[rows, 6 + step])
    assert [layer._keys.data_ptr() for layer in cache.layers] == storage


def run(model: Any, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **forward.cache_argument(model, cache),
    ).last_hidden_state
    return hidden


def test_the_cache_has_the_dtype_that_the_attention_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    stock = sampler.completion_cache
    monkeypatch.setattr(
        sampler, "completion_cache", lambda *options: kept.append(stock(*options)) or kept[-1]
    )
    model, _ = tiny("text")
    packed(model).eval()
    for is_on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            decode(model, text_prompts([5, 3]), Sampling(2, 3, 1.0), Draws(0, 4, slice(0, 4)))
        layer = kept[-1].layers[0]
        assert {layer._keys.dtype, layer._values.dtype} == {dtype}
        assert layer._keys.shape[:3] == (4, model.config.num_key_value_heads, 5 + 3)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_heads_of_one_token_are_not_expanded(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cppo.model import attention

    query = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    key, value = torch.randn(2, 3, heads, 11, 8, dtype=torch.float64)
    mask = torch.arange(11) >= torch.tensor([0, 4, 2])[:, None, None, None]
    wide = [x.repeat_interleave(4 // heads, 1) for x in (key, value)]
    scores = (query @ wide[0].mT * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    asked = []
    stock = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda *a, **k: asked.append((a[0].shape, k)) or stock(*a, **k),
    )
    out, _ = attention.attend(None, torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(out, expected)
    ((shape, options),) = asked
    assert shape == ((3, 4, 1, 8) if heads == 4 else (3, heads, 4 // heads, 8))
    assert not options.get("enable_gqa")


# How many rows


def test_the_batch_is_what_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("text")
    packed(model).eval()
    config, prompts = model.config, encode_questions(model, processor, questions_for("text"))
    width = prompts.input_ids.shape[1] + 6
    cached = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row = width * cached + 16 * config.vocab_size
    sizes = []
    stock = cppo.rollouts.engine.decode

    def watched(model: Any, prompts: Prompts, *options: Any) -> Tensor:
        sizes.append(len(prompts.questions))
        return stock(model, prompts, *options)

    monkeypatch.setattr(cppo.rollouts.engine, "decode", watched)
    options = {"group_size": 3, "max_new_tokens": 6, "temperature": 1.0}
    found = {}
    for rows, batch_size, expected in ((1000, 1024, [4]), (6, 1024, [2, 2]), (0, 1024, [1] * 4),
                                       (1000, 6, [2, 2]), (9, 1024, [3, 1])):  # fmt: skip
        monkeypatch.setattr(memory, "free_memory", lambda _, rows=rows: int(2 * row * (rows + 0.5)))
        sizes.clear()
        torch.manual_seed(0)
        rollouts = sample_completions(model, processor, prompts, batch_size=batch_size, **options)
        assert sizes == expected
        found[rows] = rollouts.completion_ids
    # What is drawn does not depend on what was decoded together.
    assert all(ids == found[1000] for ids in found.values())
    assert len({tuple(ids) for ids in found[1000]}) > 4


def test_memory_of_a_row_under_autocast_and_on_this_machine() -> None:
    model, _ = tiny("text")
    free = memory.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    weight = model.lm_head.weight
    wide = memory.token_bytes(model.config, memory._compute_dtype(weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.token_bytes(model.config, memory._compute_dtype(weight)) == wide / 2


def test_memory_is_shared_by_processes_and_limited_by_a_container(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 1000)
    monkeypatch.setattr(memory, "_free_of_container", lambda: [])
    assert memory.free_memory(torch.device("cpu")) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(torch.device("cpu")) == 250
    monkeypatch.undo()
    assert memory._free_of_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert memory._free_of_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("800\n")
    assert memory._free_of_container(tmp_path) == [500]
    # The caches of files that are in it are no less free than those of the machine.
    stat = "anon 90\nfile 210\ninactive_anon 1\ninactive_file 150\nactive_file 50\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert memory._free_of_container(tmp_path) == [700]


def test_a_cache_with_placeholders_is_filled_in_parts() -> None:
    from transformers import Gemma3nTextConfig
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=Gemma3nTextConfig())
    assert {type(layer).__name__ for layer in cache.layers} >= {"DummyLayer"}
    assert can_be_joined(cache)


def test_a_rollout_that_fails_leaves_the_mode_as_it_was() -> None:
    model, processor = tiny("text")
    packed(model).train()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    prompts = encode_questions(model, processor, questions_for("text"))
    options = {"group_size": 2, "max_new_tokens": 2, "temperature": 1.0}
    with pytest.raises(FloatingPointError):
        sample_completions(model, processor, prompts, **options)
    assert model.training


def test_head_sizes_by_another_name() -> None:
    from transformers import JetMoeConfig

    assert attention.head_sizes(JetMoeConfig()) == (128, 128)
