"""Under autocast the packed forward reaches a half-precision kernel, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_forward import stream_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import VISION_FAMILIES, tiny

import cppo
from cppo.model import attention, forward
from cppo.model.check import check_model
from cppo.model.stream_sdpa import Runs, stream_sdpa
from cppo.model.wrappers import unwrap


class Attentions(TorchDispatchMode):
    """Names and dtypes of the attention ops that run, and what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if "scaled_dot_product" in name and "backward" not in name:
            self.seen.append((name, args[0].dtype))
        is_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if is_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def a_varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.dtype, ...]]]:
    """A stand-in for `torch.nn.attention.varlen` that runs on a CPU; yields the dtypes it got."""
    got: list[tuple[torch.dtype, ...]] = []

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, bounds: Any, scale: Any, window: Any
    ) -> Tensor:
        got.append((query.dtype, key.dtype, value.dtype))
        streams = (x.transpose(0, 1)[None] for x in (query, key, value))
        runs = Runs(bounds.cu_query, bounds.cu_key)
        return stream_sdpa(*streams, runs, scale, window)[0].transpose(0, 1)

    with monkeypatch.context() as patch:
        patch.setitem(attention._KERNELS, "varlen", kernel)
        patch.setattr(attention, "why_not", lambda *_: "")
        yield got


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ["text", *VISION_FAMILIES])
def test_autocast_reaches_the_kernel_in_bf16(
    family: str,
    adapters: bool,
    checkpointing: bool,
    is_shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import LoraConfig, get_peft_model

    from cppo.model.shared_prompts import share_prompts

    model, _ = tiny(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    batch = stream_of([9, 5, 7])
    positions = None if family == "text" else batch.position_ids.expand(3, -1)
    shared = share_prompts(batch, [0, 1, 2]) if is_shared else None
    with a_varlen_kernel(monkeypatch) as got:
        forward.set_attention(model, "varlen")
        check_model(model, shares=is_shared)  # in fp64, before what is counted
        layers = unwrap(model).config.get_text_config().num_hidden_layers
        got.clear()
        model.train()
        with torch.autocast("cpu", torch.bfloat16), Attentions() as ops:
            hidden = cppo.packed_hidden(model, batch, positions, shared=shared)
        hidden.float().square().mean().backward()
    # A checkpointed layer runs once more in the backward.
    assert got == [(torch.bfloat16,) * 3] * (layers * (2 if checkpointing else 1))
    assert ops.seen and {dtype for _, dtype in ops.seen} == {torch.bfloat16}


def test_sdpa_reads_the_bounds_once_per_forward_and_in_bf16() -> None:
    model, _ = tiny("text")
    forward.set_attention(model, "sdpa")
    batch = stream_of([9, 5, 7])
    check_model(model)
    counts = {}
    for layers in (1, 2):
        unwrap(model).config.num_hidden_layers = layers
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Attentions() as ops:
            cppo.packed_hidden(model, batch)
        assert len(ops.seen) == layers and {d for _, d in ops.seen} == {torch.bfloat16}
        counts[layers] = len(ops.waits)
    assert counts[1] == counts[2]


def test_the_kernel_is_chosen_for_where_the_model_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(name: str, device: object, layers: object) -> str:
        runs = name == "sdpa" or (name == "varlen" and str(device) == "cuda")
        return "" if runs else "not here"

    monkeypatch.setattr(attention, "why_not", why_not)
    model, _ = tiny("text")
    for device, name in ((None, "sdpa"), (torch.device("cuda"), "varlen")):
        forward.set_attention(model, "auto", device)
        assert unwrap(model).config._attn_implementation == attention.NAMES[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_gpu_is_the_one_that_was_chosen() -> None:
    from torch.profiler import ProfilerActivity, profile
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).cuda()
    layers = forward.layers_of(model, torch.bfloat16)
    chosen = attention.choose_attention("auto", "cuda", layers=layers)
    if chosen == "sdpa":
        pytest.skip(attention.why_not("varlen", "cuda", layers))
    forward.set_attention(model, "auto")
    batch = stream_of([9, 5, 7]).to("cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        cppo.packed_hidden(model, batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            cppo.packed_hidden(model, batch)
            torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    assert any("flash" in name and "fwd" in name for name in names), (chosen, names)
    assert not any("scaled_dot_product" in name for name in names), (chosen, names)
