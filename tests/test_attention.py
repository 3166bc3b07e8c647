"""Which attention runs where, and that every kernel is called for the same result."""

import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from cppo.model import attention
from cppo.model.stream_sdpa import Runs, stream_sdpa

# Queries and keys of four sequences: the first has nothing before it, the others do.
LENGTHS, KEY_LENGTHS = [7, 3, 0, 5], [7, 10, 7, 12]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def streams(kv_heads=4):
    """Query, key, value (1, heads, S, 8) and the keys' places: a prompt of 7, seen by all."""
    total = sum(LENGTHS)
    query = torch.randn(1, 4, total, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, total, 8, dtype=torch.float64)
    own = torch.arange(total).split(LENGTHS)
    index = torch.cat([own[0], *(torch.cat([own[0], part]) for part in own[1:])])
    return query, key, value, index


def by_hand(query, key, value, scale, window=None):
    """(1, S, heads, 8): every token over the prompt and its own sequence, one by one.

    With a window, over the last `window` of them, itself included.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    out = torch.empty_like(query)
    for piece, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        for token in range(start, end):
            seen = list(range(7)) if piece else []
            seen = (seen + list(range(start, token + 1)))[-window if window else None :]
            weights = (query[..., token, :, None].mT @ key[:, :, seen].mT * scale).softmax(-1)
            out[:, :, token] = (weights @ value[:, :, seen])[:, :, 0]
    return out.transpose(1, 2)


def call(kernel, query, key, value, index, window=None):
    options = {
        "sliding_window": window,
        "cu_seq_lens_q": cumulative(LENGTHS).to(query.device),
        "cu_seq_lens_k": cumulative(KEY_LENGTHS).to(query.device),
        "max_length_q": max(LENGTHS),
        "max_length_k": max(KEY_LENGTHS),
    }
    layer = torch.nn.Identity()
    return attention.attend(
        kernel, layer, query, key, value, scaling=0.3, key_index=index, **options
    )[0]


def stand_in(seen):
    """The arithmetic of the varlen kernels, in fp32 and without a GPU: (S, heads, d) each."""

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        seen.append({"max_q": max_q, "max_k": max_k, "kv_heads": key.shape[1], **options})
        parts = (x.float().transpose(0, 1)[None] for x in (query, key, value))
        scale = options.get("scale", options.get("softmax_scale"))
        left, right = options["window_size"]
        assert right == 0
        window = None if left == -1 else left + 1
        out = stream_sdpa(*parts, Runs(cu_seq_q, cu_seq_k), scale, window)
        return out[0].transpose(0, 1).to(query.dtype)

    return kernel


WINDOWS = [None, 1, 2, 5, 7, 11, 12, 100]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_sequence_sees_what_is_gathered_for_it_up_to_its_own_place(kv_heads, window):
    query, key, value, index = streams(kv_heads)
    out = call(None, query, key, value, index, window)
    torch.testing.assert_close(out, by_hand(query, key, value, 0.3, window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("lengths", "calls"),
    [([9, 8, 9], 1), ([40, 1, 2, 1], 4), ([3], 1), ([4, 0, 4], 1)],
    ids=["padded", "one by one", "one", "an empty one"],
)
def test_a_window_in_a_packed_stream(lengths, calls, window, monkeypatch):
    total = sum(lengths)
    query, key, value = torch.randn(3, 1, 2, total, 8, dtype=torch.float64)
    seen_calls = []
    stock = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (seen_calls.append(1), stock(*a, **k))[1]
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(total)
    behind = place[:, None] - place
    seen = (owner[:, None] == owner) & (behind >= 0) & (behind < (window or total))
    scores = (query @ key.mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    bounds = {"cu_seq_lens_q": cumulative(lengths), "cu_seq_lens_k": cumulative(lengths)}
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    options = {**bounds, **longest, "scaling": 0.3, "sliding_window": window}
    out, _ = attention.attend(None, torch.nn.Identity(), query, key, value, **options)
    torch.testing.assert_close(out, expected)
    assert len(seen_calls) == calls


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("knows_gqa", [True, False])
def test_pytorch_varlen_is_called_for_the_same_result(kv_heads, knows_gqa, monkeypatch):
    import torch.nn.attention.varlen as varlen

    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == "query key value cu_seq_q cu_seq_k max_q max_k".split()
    assert {"scale", "window_size"} <= set(parameters)

    seen = []
    kernel = stand_in(seen)
    if knows_gqa:  # since torch 2.12

        def with_gqa(*args, scale, window_size, enable_gqa=False):
            return kernel(*args, scale=scale, window_size=window_size)

        monkeypatch.setattr(varlen, "varlen_attn", with_gqa)
    else:
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query, key, value, index = streams(kv_heads)
    halves = [x.bfloat16() for x in (query, key, value)]
    for window, told_window in ((None, -1), (12, -1), (5, 4), (1, 0)):
        seen.clear()
        out = call(attention._KERNELS["varlen"], *halves, index, window)
        exact = by_hand(query, key, value, 0.3, window)
        torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.05)
        (told,) = seen
        assert told["window_size"] == (told_window, 0)
        assert (told["max_q"], told["max_k"]) == (7, 12)
        assert told["kv_heads"] == (kv_heads if knows_gqa else 4)
    # In single precision there is no such kernel, and sdpa runs instead.
    full = call(attention._KERNELS["varlen"], query, key, value, index)
    torch.testing.assert_close(full, by_hand(query, key, value, 0.3))
    assert len(seen) == 1


def test_flash_attn_is_called_for_the_same_result(monkeypatch):
    seen = []
    package = types.SimpleNamespace(flash_attn_varlen_func=stand_in(seen))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    query, key, value, index = streams(2)
    halves = [x.half() for x in (query, key, value)]
    for window, told_window in ((None, -1), (4, 3)):
        seen.clear()
        out = call(attention._KERNELS["flash_attention_2"], *halves, index, window)
        exact = by_hand(query, key, value, 0.3, window)
        torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)
        assert seen[0]["causal"] is True and seen[0]["max_k"] == 12
        assert seen[0]["window_size"] == (told_window, 0)


@pytest.mark.parametrize("name", ["s_aux", "softcap", "position_bias", "block_indices", "news"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_what_a_layer_asks_for_and_does_not_get_is_refused(name, is_packed):
    query, key, value, _ = streams()
    bounds = {}
    if is_packed:
        bounds = {"cu_seq_lens_q": cumulative(LENGTHS), "cu_seq_lens_k": cumulative(LENGTHS)}
        bounds |= {"max_length_q": 7, "max_length_k": 7}
    layer = torch.nn.Identity()
    out, _ = attention.attend(None, layer, query, key, value, **{name: None}, **bounds)
    assert out.isfinite().all()
    with pytest.raises(ValueError, match=f"Identity must do with plain attention, .* {name!r}"):
        attention.attend(None, layer, query, key, value, **{name: torch.ones(4)}, **bounds)


def test_a_packed_stream_without_its_bounds_or_with_another_mask_is_refused():
    query, key, value, _ = streams()
    layer, mask = torch.nn.Identity(), attention.no_mask(torch.device("cpu"))
    with pytest.raises(ValueError, match="Identity must .* but it never gets cu_seq_lens"):
        attention.attend(None, layer, query, key, value, mask)
    bounds = dict(cu_seq_lens_q=cumulative(LENGTHS), max_length_k=7)
    with pytest.raises(ValueError, match="Identity must .* but it is not causal"):
        attention.attend(None, layer, query, key, value, mask, is_causal=False, **bounds)
    own = torch.ones(1, 4, 15, 15)
    with pytest.raises(ValueError, match=r"has a mask of its own of shape \(1, 4, 15, 15\)"):
        attention.attend(None, layer, query, key, value, own, **bounds)
    # One token of one sequence, as decoding has it, is no stream.
    one = (x[:, :, :1] for x in (query, key, value))
    assert attention.attend(None, layer, *one, mask)[0].shape == (1, 1, 4, 8)


def a_machine(monkeypatch, capability=(9, 0), has_flash=True):
    """A GPU that is not there; returns which packages are installed."""
    installed = {"flash_attn": False, "torch.nn.attention.varlen": True}
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: installed[name] or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    return installed


def test_one_place_chooses_and_says_why_not(monkeypatch):
    installed = a_machine(monkeypatch)
    assert attention.choose_attention("auto", "cpu") == "sdpa"
    assert attention.choose_attention("auto", "cuda:1") == "varlen"
    installed["flash_attn"] = True
    assert attention.choose_attention("auto", "cuda") == "flash_attention_2"
    assert attention.choose_attention("sdpa", "cuda") == "sdpa"
    installed.update(dict.fromkeys(installed, False))
    assert attention.choose_attention("auto", "cuda") == "sdpa"
    words = r"cppo: attention must be 'auto' or one that runs here \(sdpa\), got "
    with pytest.raises(ValueError, match=words + "'varlen': torch .* has no torch.nn.att"):
        attention.choose_attention("varlen", "cuda")
    with pytest.raises(ValueError, match=words + "'varlen': the model is on cpu"):
        attention.choose_attention("varlen", "cpu")
    with pytest.raises(ValueError, match="'flash_attention_2': flash-attn is not inst"):
        attention.choose_attention("flash_attention_2", "cuda")


@pytest.mark.parametrize(
    ("capability", "has_flash", "layers", "reason"),
    [
        ((8, 0), True, attention.Layers((128, 128), torch.bfloat16), ""),
        ((8, 9), True, attention.Layers((256, 256)), ""),
        ((7, 5), True, None, "needs compute capability 8.0, the GPU has 7.5"),
        ((7, 0), True, attention.Layers((64, 64)), "the GPU has 7.0"),
        ((9, 0), False, None, "this build of torch has no flash attention"),
        ((9, 0), True, attention.Layers((512, 512)), "up to 256, the model's have 512"),
        ((9, 0), True, attention.Layers((36, 36)), "a multiple of 8 numbers"),
        ((9, 0), True, attention.Layers((192, 128)), "keys have 192 numbers a head, its values 12"),
        ((9, 0), True, attention.Layers((64, 64), torch.float32), "computes in torch.float32"),
    ],
)
def test_a_kernel_is_chosen_only_where_it_runs(capability, has_flash, layers, reason, monkeypatch):
    a_machine(monkeypatch, capability, has_flash)
    chosen = attention.choose_attention("auto", "cuda", layers=layers)
    assert chosen == ("sdpa" if reason else "varlen")
    if reason:
        with pytest.raises(ValueError, match=r"runs here \(sdpa\), got 'varlen': .*" + reason):
            attention.choose_attention("varlen", "cuda", layers=layers)


def test_the_head_sizes_of_configs():
    from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig

    assert attention.head_sizes(LlamaConfig(hidden_size=96, num_attention_heads=4)) == (24, 24)
    assert attention.head_sizes(Gemma3TextConfig(head_dim=256)) == (256, 256)
    assert attention.head_sizes(DeepseekV3Config()) == (192, 128)


def test_info_says_which_attention_runs():
    from cppo.cli.info import collect

    assert collect()["attention"]["cpu"] == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("kind", ["varlen", "flash_attention_2"])
def test_kernels_on_the_gpu_are_as_accurate_as_sdpa(kind, window):
    reason = attention.why_not(kind, "cuda")
    if reason:
        pytest.skip(reason)
    query, key, value, index = (x.cuda() for x in streams(2))
    exact = by_hand(query, key, value, 0.3, window)
    wide = [torch.nn.functional.pad(x, (0, 56)).bfloat16() for x in (query, key, value)]
    for x in wide:
        x.requires_grad_()
    out = call(attention._KERNELS[kind], *wide, index, window)[..., :8]
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.05)
    gradients = torch.autograd.grad(out.float().square().sum(), wide)
    again = call(None, *wide, index, window)[..., :8]
    expected = torch.autograd.grad(again.float().square().sum(), wide)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)
