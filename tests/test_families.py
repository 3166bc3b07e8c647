"""Every text family of transformers: run rightly, or refused."""

import pytest
import torch
from families import FAMILIES, is_known, tiny_family
from transformers import DynamicCache

from cppo.model import check as model_check
from cppo.model import forward
from cppo.model.padded import run_padded
from cppo.model.ways import choose_ways
from cppo.ops.pack import pack_completions

CLOSE = 2e-5  # of the largest logit; what is wrong is off by far more, rounding in fp32 by far less


def relative(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def logits_by(run, model, sequences):
    """Logits of whole sequences but for their last token, by a forward of ours in fp32."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    batch = pack_completions(ids, mask, mask & (torch.arange(ids.shape[1]) >= 1))
    hidden = run(model, forward.Stream(batch))
    logits = forward.lm_head(model).logits(hidden)
    return list(logits.split((lengths - 1).tolist()))


def decoded_logits(model, sequences):
    """Logits of the last four tokens: two prompts padded on the left, then token by token."""
    longest = max(len(s) for s in sequences)
    ids = torch.stack([torch.cat([s.new_zeros(longest - len(s)), s]) for s in sequences])
    mask = torch.stack([torch.arange(longest) >= longest - len(s) for s in sequences]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.get_text_config())
    rows = []
    for stop in range(longest - 3, longest + 1):
        start = 0 if stop == longest - 3 else stop - 1
        output = model.model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            use_cache=True,
            **forward.cache_argument(model, cache),
        )
        rows.append(forward.lm_head(model).logits(output.last_hidden_state[:, -1]))
    return list(torch.stack(rows, 1))


def sequences_alone(family):
    """A model with a short window, a few sequences, and its logits of each truly alone, in fp32."""
    model = tiny_family(family, window=5)
    draw = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, 60, (n,), generator=draw) for n in (13, 9, 11)]
    with torch.no_grad():
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    return model, sequences, alone


def errors_of(run, model, sequences, alone):
    """Of a forward of ours and of decoding, relative to the largest logit."""
    with torch.no_grad():
        ours, decoded = logits_by(run, model, sequences), decoded_logits(model, sequences)
    errors = [relative(found, own[:-1]) for found, own in zip(ours, alone, strict=True)]
    return errors + [relative(found, own[-4:]) for found, own in zip(decoded, alone, strict=True)]


def runs_right(family):
    """Found out without the check: longer sequences, a real window, fp32, each truly alone."""
    model, *expected = sequences_alone(family)
    try:
        forward.set_attention(model, "sdpa")
        return max(errors_of(forward.run_packed, model, *expected)) < CLOSE
    except Exception:
        return False


def verdict(family):
    """What the check says; '' when it has nothing to say."""
    model = tiny_family(family)
    try:
        forward.check_supported(model)
        forward.set_attention(model, "sdpa")
        model_check.check_model(model, shares=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verdict_is_that_of_an_independent_comparison(family):
    if not is_known(family):
        pytest.skip(f"this transformers has no {family}")
    words = verdict(family)
    assert runs_right(family) == (not words), words
    assert not words or repr(family) in words


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_packed_is_padded_and_right_or_refused(family):
    if not is_known(family):
        pytest.skip(f"this transformers has no {family}")
    model, *expected = sequences_alone(family)
    try:
        ways = choose_ways(model, "sdpa")
    except ValueError as error:
        assert repr(family) in str(error)
        return
    run = forward.run_packed if ways.text else run_padded
    assert max(errors_of(run, model, *expected)) < CLOSE


@pytest.mark.parametrize(
    ("family", "is_packed"),
    [
        ("llama", True),
        ("gpt_oss", False),
        ("gemma2", False),
        ("gemma3_text", True),
        ("lfm2", False),
    ],
)
def test_which_way_is_chosen(family, is_packed):
    assert choose_ways(tiny_family(family, window=5), "sdpa").text == is_packed
