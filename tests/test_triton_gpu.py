"""The Triton kernels on a real GPU: what the interpreter cannot show."""

from __future__ import annotations

import fcntl
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import cppo
from cppo import LossConfig, Views, backends
from cppo.benchmarks.inputs import Sizes, row_inputs
from cppo.fused import head
from cppo.testing import (
    ROW_CASES,
    assert_as_accurate,
    assert_op_as_accurate,
    compact_views,
    evaluate,
    make_inputs,
    to_packed,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

needs_memory = pytest.mark.usefixtures("memory")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIGS = {
    "k3": LossConfig(cpl_coef=0.3, entropy_coef=0.01, kl_coef=0.1),
    "k1": LossConfig(divergence="k1", importance="sequence", reduction="dapo", cpl_coef=1.0),
    "full": LossConfig(divergence="full", dual_clip=3.0, cpl_coef=1.0),
}


@pytest.fixture
def memory():
    """Of the tests that need tens of GiB one runs at a time, in all workers of pytest-xdist."""
    name = f"cppo-tests-{os.getuid()}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def to_cuda(value):
    if isinstance(value, Views):
        return Views(*map(to_cuda, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


def on_gpu(inputs):
    return {name: to_cuda(value) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROW_CASES)
@pytest.mark.parametrize("op", ["token_stats", "perception_mask", "cppo_loss"])
def test_accuracy(op, case, dtype):
    if op == "perception_mask" and case not in ("random", "all_masked", "one_row", "empty"):
        pytest.skip("a case of logits")
    inputs = on_gpu(make_inputs(op, case, dtype=dtype))
    assert_op_as_accurate(op, "triton", inputs)
    assert_op_as_accurate(op, "triton", to_packed(inputs))


@pytest.mark.parametrize("vocabulary", [1, 1023, 32_000, 50_257, 151_936])
@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_split_and_whole_rows_of_any_vocabulary(config, dtype, rows, vocabulary):
    if rows * vocabulary > 700 * 32_000:
        rows = 40
    inputs = make_inputs(
        "cppo_loss", layout="packed", dtype=dtype, lengths=(rows, 3), vocabulary=vocabulary
    )
    assert_op_as_accurate("cppo_loss", "triton", on_gpu({**inputs, "config": config}))


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_selection_is_that_of_the_reference_to_the_last_bit(dtype, length):
    anchor, negative = torch.rand(2, 3, length, dtype=dtype, device="cuda")
    negative[1] = (negative[1] * 4).round()
    for fraction in (0.0, 0.1, 0.7, 1.0):
        options = {"fraction": fraction, "mask": torch.rand(3, length, device="cuda") < 0.8}
        ours = cppo.perception_mask(anchor, negative, **options, backend="triton")
        spec = cppo.perception_mask(anchor, negative, **options, backend="reference")
        assert torch.equal(ours, spec)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rows", ["whole", "compact"])
def test_repeatable_and_in_place(config, rows):
    inputs = make_inputs("cppo_loss", layout="packed", lengths=(300, 2, 170), vocabulary=5000)
    if rows == "compact":
        views = compact_views(inputs["logits"], inputs["advantages"], inputs["cu_seqlens"])
        inputs["logits"] = views
    inputs = on_gpu({**inputs, "config": config})
    first, again = evaluate("cppo_loss", inputs, "triton"), evaluate("cppo_loss", inputs, "triton")
    assert all(torch.equal(first[name], again[name]) for name in first)
    leaves = Views(*(view.clone().requires_grad_() for view in inputs["logits"]))
    logits = Views(*(leaf * 1 for leaf in leaves))
    out = cppo.cppo_loss(**{**inputs, "logits": logits}, backend="triton", inplace=True)
    gradients = torch.autograd.grad(out.loss, leaves)
    once = cppo.cppo_loss(**{**inputs, "logits": leaves}, backend="triton")
    expected = torch.autograd.grad(once.loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@needs_memory
def test_offsets_beyond_32_bits():
    rows, vocabulary = 16_384, 151_936
    assert rows * vocabulary > 2**31
    free = torch.cuda.mem_get_info()[0]
    if free < 2.5 * 2 * rows * vocabulary:
        pytest.skip(f"needs {5 * rows * vocabulary / 2**30:.0f} GiB of GPU memory, {free} B free")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(
        rows, vocabulary, generator=generator, dtype=torch.bfloat16, device="cuda"
    ).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    stats = cppo.token_stats(logits, targets, backend="triton")
    (gradient,) = torch.autograd.grad((stats.logps - 0.1 * stats.entropy).sum(), logits)
    for row in (0, rows // 2, rows - 1):
        one = logits[row : row + 1].detach()
        results = []
        for leaf, backend in (
            (one.clone(), "triton"),
            (one.clone(), "reference"),
            (one.double(), "reference"),
        ):
            leaf.requires_grad_()
            alone = cppo.token_stats(leaf, targets[row : row + 1], backend=backend)
            (own,) = torch.autograd.grad((alone.logps - 0.1 * alone.entropy).sum(), leaf)
            results.append((alone.logps, alone.entropy, own))
        ours = (stats.logps[row : row + 1], stats.entropy[row : row + 1], gradient[row : row + 1])
        for name, value, eager, exact in zip(
            ("logps", "entropy", "gradient"), ours, results[1], results[2], strict=True
        ):
            assert_as_accurate(name, value, eager, exact)


def assert_compiles_in_one_graph(op, views, config):
    """Compiled, the op on twice its `views` ("logits" or "hidden") gives what it gives eagerly."""
    inputs = on_gpu({**make_inputs(op, layout="packed"), "config": config})

    def loss_of(*given):
        arguments = {**inputs, views: Views(*(2 * view for view in given))}
        return getattr(cppo, op)(**arguments, backend="triton").loss

    leaves = [view.clone().requires_grad_() for view in inputs[views]]
    expected = loss_of(*leaves)
    ours = torch.compile(loss_of, fullgraph=True)(*leaves)
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad(ours, leaves)
    for mine, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_torch_compile_in_one_graph(config):
    assert_compiles_in_one_graph("cppo_loss", "logits", config)


def test_nothing_waits_for_the_host():
    inputs = on_gpu(make_inputs("cppo_loss", layout="packed", lengths=(30, 20, 10, 0, 3, 4)))
    inputs["logits"] = Views(*(view.requires_grad_() for view in inputs["logits"]))
    backends.pick("cppo_loss", inputs["targets"], "triton")
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            loss = cppo.cppo_loss(**inputs, backend="triton").loss
            torch.autograd.grad(loss, inputs["logits"])
        finally:
            torch.cuda.set_sync_debug_mode("default")


# The fused LM head: vendor GEMMs, and the kernels above on tiles of logits

HEAD_CONFIGS = {
    "resident": LossConfig(cpl_reduction="sequence", cpl_coef=1.0, entropy_coef=0.01),
    "recompute": LossConfig(cpl_reduction="token", cpl_coef=1.0),
    "k1": LossConfig(divergence="k1", cpl_reduction="sequence", cpl_coef=1.0),
    "full": LossConfig(divergence="full", cpl_coef=1.0),
}
every_head = pytest.mark.parametrize("config", HEAD_CONFIGS.values(), ids=HEAD_CONFIGS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["random", "large", "all_masked", "one_row", "empty"])
@pytest.mark.parametrize("op", ["linear_token_stats", "linear_cppo_loss"])
def test_accuracy_of_the_fused_head(op, case, dtype):
    inputs = on_gpu(make_inputs(op, case, dtype=dtype))
    for some in (inputs, {**inputs, "bias": None}, to_packed(inputs)):
        assert_op_as_accurate(op, "triton", some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [37, 50_257, 151_936])
@pytest.mark.parametrize("rows_per_tile", [3, 40, 1000])
@every_head
def test_tiles_of_any_size_and_vocabulary(config, rows_per_tile, vocabulary, dtype, monkeypatch):
    """Also rows of a vocabulary that is no multiple of 16 bytes, which are laid out wider."""
    tile = rows_per_tile * vocabulary * dtype.itemsize
    monkeypatch.setitem(head.TILE_BYTES, "cuda", tile)
    sizes = Sizes(8, 12, vocabulary, 64)
    inputs = row_inputs("linear_cppo_loss", sizes, dtype_name(dtype), torch.device("cuda"))
    assert_op_as_accurate("linear_cppo_loss", "triton", {**inputs, "config": config})


def dtype_name(dtype):
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


@needs_memory
@pytest.mark.parametrize("hidden", [2048, 3584])
@every_head
def test_the_fused_head_of_a_large_model(config, hidden):
    rows, vocabulary = 512, 151_936
    needed = 8 * (6 * rows + 4 * hidden) * vocabulary
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory for fp64")
    sizes = Sizes(8, rows // 8, vocabulary, hidden)
    inputs = row_inputs("linear_cppo_loss", sizes, "bf16", torch.device("cuda"))
    assert_op_as_accurate("linear_cppo_loss", "triton", {**inputs, "config": config})
    frozen = {**inputs, "config": config}
    views = Views(*(view.clone().requires_grad_() for view in frozen["hidden"]))
    everything = evaluate("linear_cppo_loss", frozen, "triton")
    out = cppo.linear_cppo_loss(**{**frozen, "hidden": views}, backend="triton")
    assert torch.equal(out.loss, everything["loss"])


def test_the_memory_of_the_fused_head_is_that_of_a_tile(monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cuda", 64 << 20)
    sizes = Sizes(64, 32, 151_936, 256)
    inputs = row_inputs("linear_cppo_loss", sizes, "bf16", torch.device("cuda"))
    views = Views(*(view.requires_grad_() for view in inputs["hidden"]))
    weight = inputs["weight"].requires_grad_()
    for config in HEAD_CONFIGS.values():
        weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = {**inputs, "hidden": views, "config": config}
        cppo.linear_cppo_loss(**given, backend="triton").loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        # The gradient of the weight in fp32 and in bf16, those of the views, and three tiles.
        gradients = 6 * weight.numel() + 3 * 8 * views.anchor.numel()
        assert peak < gradients + 3 * (64 << 20) + (16 << 20)


def test_the_fused_head_waits_for_the_host_a_few_times():
    inputs = on_gpu(make_inputs("linear_cppo_loss", layout="packed", lengths=(30, 20, 10, 0, 3)))
    inputs["advantages"] = inputs["advantages"].contiguous()
    views = Views(*(view.requires_grad_() for view in inputs["hidden"]))
    for name, most in (("resident", 2), ("recompute", 3)):
        given = {**inputs, "hidden": views, "config": HEAD_CONFIGS[name]}
        for measured in (False, True):
            torch.cuda.set_sync_debug_mode("warn" if measured else "default")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    loss = cppo.linear_cppo_loss(**given, backend="triton").loss
                    torch.autograd.grad(loss, views)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing" in str(w.message)]
        assert len(waits) <= most, [str(w.message) for w in waits]


@every_head
def test_torch_compile_of_the_fused_head(config):
    assert_compiles_in_one_graph("linear_cppo_loss", "hidden", config)
