"""The C++ row kernels: their e^x, their conversions, and every instruction set of this machine."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cppo
from cppo import backends
from cppo.fused import extension
from cppo.testing import assert_as_accurate, evaluate, make_inputs

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(
    "cpp" not in backends.available("token_stats"),
    reason=f"the extension is not built: {extension.missing['cpp']}",
)

# What a machine may have, the least first; each can be asked for below what it has.
CAPABILITIES = ("default", "avx2", "avx512")

# Every fp16 and bf16 number survives, and every result is as accurate, in a process of its own:
# the instruction set is chosen once.
EVERYTHING = """
import torch, cppo
from cppo.testing import ROW_CASES, assert_op_as_accurate, make_inputs
from cppo import LossConfig

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for case in ROW_CASES:
        # A row of less than a block, and of two blocks and some.
        for sizes in ({}, {"vocabulary": 4101, "lengths": (1, 2)}):
            inputs = make_inputs("token_stats", case, dtype=dtype, **sizes)
            assert_op_as_accurate("token_stats", "cpp", inputs)
    inputs = make_inputs("cppo_loss", dtype=dtype, vocabulary=4101, lengths=(1, 2))
    for divergence in ("k3", "full"):
        config = LossConfig(divergence=divergence, cpl_coef=0.5, entropy_coef=0.1)
        assert_op_as_accurate("cppo_loss", "cpp", {**inputs, "config": config})
    if dtype.itemsize == 2:
        numbers = torch.arange(-2**15, 2**15, dtype=torch.int16).view(dtype)
        finite = numbers[numbers.isfinite()]
        rows = torch.stack([torch.zeros_like(finite), finite], 1)
        # One token of two: its log-probability is -log(1 + e^z), which shows z as it was read.
        ours = cppo.token_stats(rows, torch.zeros(len(finite), dtype=torch.int64), backend="cpp")
        exact = -torch.logaddexp(torch.zeros(1, dtype=torch.float64), finite.double())
        torch.testing.assert_close(ours.logps.double(), exact, rtol=1e-6, atol=1.2e-7)
"""

# Gradients of two entries, +g and -g, which a 16-bit dtype rounds: to what torch rounds them to.
ROUNDING = """
import torch, cppo

for dtype in (torch.bfloat16, torch.float16):
    z = torch.zeros(40_000, 2, dtype=dtype, requires_grad=True)
    logps = cppo.token_stats(z, torch.zeros(len(z), dtype=torch.int64), backend="cpp").logps
    scale = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-6]) * 2
    scale[:6] = torch.tensor([131008.0, 131040.0, 131056.0, 1e30, 2.0**-24, 2.0**-25])
    (gradient,) = torch.autograd.grad(logps, z, scale)
    expected = torch.stack([scale / 2, -scale / 2], 1).to(dtype)
    assert torch.equal(gradient, expected), (gradient - expected).abs().max()
"""


# Logits far above or below those of the blocks before, where a block is summed again.
FAR = """
import torch
from cppo import LossConfig, Views
from cppo.testing import assert_op_as_accurate, evaluate, in_fp64, make_inputs

def place(row, number, *at):
    row[list(at)] = number

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    low, block = torch.finfo(dtype).min, 2048
    inputs = make_inputs("cppo_loss", dtype=dtype, vocabulary=10_000, lengths=(13,))
    z = torch.randn(3, 1, 13, 10_000, generator=torch.Generator().manual_seed(1))
    for rows in z[:, 0]:
        rows[1] += torch.arange(10_000) // block * 7.0  # every block exceeds all before
        rows[2] -= torch.arange(10_000) // block * 7.0
        place(rows[3], 40.0, 5000)
        place(rows[4], -90.0, 3000, 9999)
        place(rows[5], -1e4, 3, block - 1, block, 4 * block - 1)
        place(rows[6], -torch.inf, *range(block, 2 * block), 9998)
        rows[7, :block] = -torch.inf
        place(rows[8], low, *range(0, 10_000, 3))
        rows[9, :block] = low
        rows[10] += 3000.0  # where exponents are measured from has few digits left
        rows[11] = rows[11] * 0.1 - 777.7
        place(rows[12], 13.7, 5)  # nearly all of the mass, in the first block
    inputs["targets"] = torch.tensor([[0, 9999, 0, 5000, 7, 7, 7, 8000, 1, 6000, 9, 9, 5]])
    inputs["logits"] = Views(*z.to(dtype))
    inputs["advantages"] = torch.ones(1)
    one = {"logits": inputs["logits"].anchor, "targets": inputs["targets"]}
    assert_op_as_accurate("token_stats", "cpp", one)
    for divergence in ("k3", "full"):
        config = LossConfig(divergence=divergence, cpl_coef=0.5, entropy_coef=0.1)
        assert_op_as_accurate("cppo_loss", "cpp", {**inputs, "config": config})
    # A token that one view alone excludes: the divergence is large, not infinite. (The gradients of
    # eager are NaN then.)
    inputs["logits"].positive[..., 17] = low
    inputs["config"] = config
    ours = evaluate("cppo_loss", inputs, "cpp")["loss"].double()
    exact = evaluate("cppo_loss", in_fp64(inputs))["loss"]
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)
"""

# Gradients of more than 32 MiB go past the caches, from the first aligned address of a row on. In
# place they do not.
PAST_CACHES = """
import torch, cppo
from cppo import LossConfig, Views

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for vocabulary in (8192, 8195):
        rows = 33 * 2**20 // (vocabulary * dtype.itemsize) + 1
        logits = torch.randn(2, 1, rows, vocabulary, dtype=dtype)
        targets = torch.randint(0, vocabulary, (1, rows))
        mask = torch.rand(1, rows) < 0.7

        def gradients(divergence, inplace):
            views = Views(*(z.clone().requires_grad_() for z in (*logits, logits.mean(0))))
            config = LossConfig(divergence=divergence, cpl_coef=0.5, entropy_coef=0.1)
            options = dict(mask=mask, config=config, inplace=inplace, backend="cpp")
            loss = cppo.cppo_loss(views, targets, torch.ones(1), **options).loss
            return torch.autograd.grad(loss, views)

        for divergence in ("k3", "full"):
            new, in_place = gradients(divergence, False), gradients(divergence, True)
            assert all(map(torch.equal, new, in_place)), (dtype, vocabulary, divergence)
"""


def run(code, capability):
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def skip_where_missing(capability):
    best = torch.ops.cppo.row_capability()
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this machine has {best}, and PyTorch would crash when told {capability}")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_of_this_machine(capability):
    skip_where_missing(capability)
    for code in (EVERYTHING, FAR, ROUNDING, PAST_CACHES):
        done = run(code, capability)
        assert done.returncode == 0, done.stderr[-2000:]
    assert run("import torch, cppo; print(torch.ops.cppo.row_capability())", capability).stdout == (
        f"{capability}\n"
    )


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
SETS = {
    "default": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *(f"-mavx512{x}" for x in "f bw vl dq".split())],
}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", ["-O1", "-O0 -ffp-contract=off"])
def test_accuracy_hangs_on_no_flag_of_the_compiler(flags, tmp_path):
    """Multiply-adds that accuracy needs are there where the compiler contracts none by itself."""
    library = tmp_path / "rows.so"
    objects = [str(tmp_path / f"{name}.o") for name in SETS]
    general = [str(COMPILER), "-std=c++20", "-fPIC", f"-I{ROOT / 'csrc'}", *flags.split()]
    for (name, own), built in zip(SETS.items(), objects, strict=True):
        source = ROOT / "csrc" / "cpu" / f"row_kernels_{name}.cpp"
        # Where the machine is of another kind, the file is empty and takes no flags of x86.
        own = own if torch.ops.cppo.row_capability() != "default" else []
        subprocess.run([*general, *own, "-c", str(source), "-o", built], check=True)
    shim = str(ROOT / "tests" / "row_kernels_alone.cpp")
    subprocess.run([*general, "-shared", shim, *objects, "-o", str(library)], check=True)
    # Far from zero few digits are left for differences, and what the product of such a logit loses
    # all logits of a row lose alike: rounded to bf16 they are a few numbers.
    rows = torch.randn(4, 3 * 2048 + 5) + torch.tensor([[3000.0], [-777.7], [130.0], [0.0]])
    rows = rows.bfloat16().float()
    target = torch.zeros(len(rows), dtype=torch.int64)
    eager = cppo.token_stats(rows, target, backend="reference")
    exact = cppo.token_stats(rows.double(), target, backend="reference")
    pointer = ctypes.c_void_p
    row_stats = ctypes.CDLL(str(library)).row_stats
    row_stats.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int64, ctypes.c_double, pointer]
    best = CAPABILITIES.index(torch.ops.cppo.row_capability())
    for capability in CAPABILITIES[: best + 1]:
        out = torch.empty(len(rows), 3, dtype=torch.float64)
        for row, at in zip(rows, out, strict=True):
            row_stats(capability.encode(), row.data_ptr(), len(row), 1.0, at.data_ptr())
        logps = rows[:, 0] - out[:, 0] - out[:, 1].log()
        entropy = out[:, 1].log() - out[:, 2]
        name = f"{capability} {flags}"
        assert_as_accurate(f"{name} logps", logps.float(), eager.logps, exact.logps)
        assert_as_accurate(f"{name} entropy", entropy.float(), eager.entropy, exact.entropy)


def floats(low, high):
    """Every 137th float in [low, high], low < 0 <= high."""
    end = torch.tensor(low).view(torch.int32).item()
    negative = torch.arange(-(2**31), end, 137, dtype=torch.int32).view(torch.float32)
    end = torch.tensor(high).view(torch.int32).item()
    positive = torch.arange(0, end, 137, dtype=torch.int32).view(torch.float32)
    return torch.cat([negative, positive])


# 2^t is the gradient of a row of logits t at temperature 1 / ln 2, whose statistics say that its
# terms are measured from 0 and add up to ln 2. The last token is the target.
POWERS = """
import math, torch, cppo

def powers(t):
    logits, target = torch.cat([t, torch.zeros(1)])[None], torch.tensor([len(t)])
    saved = torch.tensor([[0.0], [math.log(2.0)], [0.0]])
    given = (-torch.ones(1), None, logits, target, None, None, saved, 1 / math.log(2.0))
    return torch.ops.cppo.token_stats_backward(*given)[0, :-1]
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_power_of_two_is_within_two_ulp(capability, tmp_path):
    skip_where_missing(capability)
    # More than the terms of a softmax need, which are measured from at most 4 below the top.
    t, integers = floats(-126.0, 12.0), torch.arange(-126.0, 128.0)
    torch.save([t, integers], tmp_path / "t")
    code = f"""
{POWERS}
found = [powers(t) for t in torch.load({str(tmp_path / "t")!r})]
torch.save(found, {str(tmp_path / "powers")!r})
"""
    done = run(code, capability)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, of_integers = torch.load(tmp_path / "powers")
    exact = t.double().exp2()
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    error = ((ours.double() - exact).abs() / ulp).max()
    assert len(t) > 1.5e7 and error < 2
    assert torch.equal(of_integers, integers.exp2())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_terms_are_as_exact_as_those_of_torch(temperature):
    """e^((z - m) / temperature) by a power of two, against torch's two roundings and exp."""
    x = floats(-80.0, 0.0)[None] * temperature
    logits = torch.cat([torch.zeros(1, 1), x[:, ::8]], 1)
    one = torch.zeros(1, dtype=torch.int64)

    def error(gradient):
        exact = (logits.double() / temperature).softmax(-1)
        exact[0, 0] -= 1
        return ((-gradient * temperature - exact) / exact).abs().max()

    found = []
    for backend in ("cpp", "reference"):
        z = logits.clone().requires_grad_()
        logps = cppo.token_stats(z, one, temperature=temperature, backend=backend).logps
        found.append(error(torch.autograd.grad(logps.sum(), z)[0].double()))
    assert found[0] <= 2 * found[1] + 1e-6


def test_the_power_of_what_is_not_a_number_or_too_small():
    here = {}
    exec(POWERS, here)
    ours = here["powers"](torch.tensor([0.0, -torch.inf, -200.0, -127.0, torch.nan]))
    assert ours[:4].tolist() == [1, 0, 0, 0] and ours[4].isnan()


def test_a_nan_of_any_payload_makes_its_row_nan():
    logits = torch.zeros(3, 40)
    payloads = torch.tensor([0x7FC00001, 0x7F8001FF, -1], dtype=torch.int32)
    logits[torch.arange(3), torch.tensor([0, 17, 39])] = payloads.view(torch.float32)
    stats = cppo.token_stats(logits, torch.full((3,), 5), backend="cpp")
    assert stats.logps.isnan().all() and stats.entropy.isnan().all()


def test_a_gradient_of_nan_of_any_payload_is_nan_in_bf16():
    logits = torch.randn(2, 40, dtype=torch.bfloat16, requires_grad=True)
    logps = cppo.token_stats(logits, torch.zeros(2, dtype=torch.int64), backend="cpp").logps
    upstream = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    (gradient,) = torch.autograd.grad(logps, logits, upstream)
    assert gradient.isnan().all()


@pytest.mark.parametrize("op", ["token_stats", "cppo_loss"])
def test_the_number_of_threads_changes_no_bit(op):
    inputs = make_inputs(op, vocabulary=3001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluate(op, inputs, "cpp")
        torch.set_num_threads(2)
        two = evaluate(op, inputs, "cpp")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_memory_beyond_the_logits_is_a_row():
    """Peak growth of a forward and an in-place backward, against 95 MiB of logits."""
    code = """
import resource, torch, cppo
torch.set_num_threads(1)
z = torch.randn(2, 81, 151_936).requires_grad_()
y = torch.zeros(2, 81, dtype=torch.int64)
cppo.token_stats(z[:1, :1], y[:1, :1]).logps.sum().backward()
z.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logits = z.detach()[:, 1:].requires_grad_()
stats = cppo.token_stats(logits, y[:, 1:], inplace=True)
(stats.logps.sum() + stats.entropy.sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = run(code, torch.ops.cppo.row_capability())
    assert done.returncode == 0, done.stderr
    # ru_maxrss is in KiB on Linux; 1 % of the logits, and the allocator's noise.
    assert int(done.stdout) < 0.01 * 2 * 80 * 151_936 * 4 / 1024 + 1024
