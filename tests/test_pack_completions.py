"""pack_completions and PackedBatch on every backend."""

from __future__ import annotations

import pytest
import torch
from error_cases import refused
from hypothesis import given
from hypothesis import strategies as st

import cppo
from cppo import backends, reference
from cppo.testing import evaluate, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = backends.available("pack_completions")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["random", "one_row", "empty"])
def test_every_backend_packs_alike(backend, case):
    inputs = make_inputs("pack_completions", case)
    ours = evaluate("pack_completions", inputs, backend)
    expected = evaluate("pack_completions", inputs, "reference")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    # Left padding, right padding, both; the response is the second half of what is attended.
    input_ids = torch.tensor([[0, 0, 11, 12], [21, 22, 23, 0], [0, 31, 32, 0]], dtype=torch.int32)
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]])
    response = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0]])
    weights = torch.arange(12.0).view(3, 4).requires_grad_()
    packed = cppo.pack_completions(
        input_ids, attention, response, per_token={"weights": weights}, backend=backend
    )
    assert packed.input_ids.tolist() == [11, 12, 21, 22, 23, 31, 32]
    assert packed.input_ids.dtype == torch.int32
    assert packed.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 7] and packed.max_seqlen == 3
    assert packed.rows.tolist() == [0, 2, 3, 5]
    assert packed.targets.tolist() == [12, 22, 23, 32]
    assert packed.row_cu_seqlens.tolist() == [0, 1, 3, 4]
    assert packed.per_token["weights"].tolist() == [3, 5, 6, 10]
    packed.per_token["weights"].sum().backward()
    assert weights.grad.nonzero().tolist() == [[0, 3], [1, 1], [1, 2], [2, 2]]


@st.composite
def batches(draw):
    """Any attention mask, with holes too; any marks; any kept rows in any order."""
    num_completions, length = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    size = num_completions * length
    bits = st.lists(st.booleans(), min_size=size, max_size=size)
    shape = (num_completions, length)
    attention = torch.tensor(draw(bits), dtype=torch.bool).view(shape)
    marks = torch.tensor(draw(bits), dtype=torch.bool).view(shape)
    marks &= ~(attention & (attention.cumsum(1) == 1))
    kept = draw(st.permutations(range(num_completions)))
    kept = kept[: draw(st.integers(0, num_completions))]
    return attention, marks, torch.tensor(kept, dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@given(batch=batches())
def test_unpacking_what_was_packed_is_the_identity(backend, batch):
    attention, marks, kept = batch
    ids = torch.arange(1, attention.numel() + 1).view(attention.shape)
    packed = cppo.pack_completions(
        ids, attention, marks, kept, per_token={"ids": ids}, backend=backend
    )
    # What stays are the response tokens of the kept rows, and nothing else.
    stays = torch.zeros_like(attention)
    stays[kept] = (attention & marks)[kept]
    assert torch.equal(packed.unpack(packed.targets), ids * stays)
    assert torch.equal(packed.per_token["ids"], packed.targets)
    # Every completion is its attended tokens, and every row is followed by its target.
    bounds = packed.cu_seqlens.tolist()
    for i, row in enumerate(kept.tolist()):
        part = packed.input_ids[bounds[i] : bounds[i + 1]]
        assert torch.equal(part, ids[row][attention[row]])
        restarted = packed.position_ids[bounds[i] : bounds[i + 1]]
        assert torch.equal(restarted, torch.arange(len(part)))
    assert torch.equal(packed.input_ids[packed.rows + 1], packed.targets)
    assert torch.equal(packed.input_ids, ids.flatten()[packed.token_index])
    counts = packed.row_cu_seqlens.diff()
    assert torch.equal(counts, (attention & marks)[kept].sum(1).int())
    assert packed.max_seqlen == int(attention[kept].sum(1).max() if len(kept) else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_kept_permutes_the_stream(backend):
    inputs = make_inputs("pack_completions")
    kept = torch.tensor([4, 0, 2])
    packed = cppo.pack_completions(**{**inputs, "kept": kept}, backend=backend)
    alone = [
        cppo.pack_completions(**{**inputs, "kept": row[None]}, backend=backend) for row in kept
    ]
    assert torch.equal(packed.input_ids, torch.cat([one.input_ids for one in alone]))
    assert torch.equal(packed.targets, torch.cat([one.targets for one in alone]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_and_stride(backend, dtype):
    inputs = make_inputs("pack_completions")
    expected = evaluate("pack_completions", inputs, "reference")

    def strided(x):
        return torch.stack([x, x + 1], -1)[..., 0]

    changed = {
        "input_ids": strided(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"].to(dtype).T.contiguous().T,
        "completion_mask": inputs["completion_mask"].to(dtype).T.contiguous().T,
    }
    ours = evaluate("pack_completions", {**inputs, **changed}, backend)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@given(batch=batches(), seed=st.integers(0, 9))
def test_every_backend_gathers_and_unpacks_like_the_reference(batch, seed):
    attention, marks, kept = batch
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.bfloat16, torch.bool, torch.int32, torch.uint8]
    along = {
        str(dtype): torch.randint(0, 9, attention.shape, generator=generator).to(dtype)
        for dtype in dtypes[: 1 + seed % 5]
    }
    ids = torch.randint(0, 99, attention.shape, generator=generator)
    results = {}
    for backend in BACKENDS:
        packed = cppo.pack_completions(
            ids, attention, marks, kept, per_token=along, backend=backend
        )
        results[backend] = packed.per_token, packed.unpack(packed.per_token)
    for name, value in along.items():
        stays = torch.zeros_like(attention)
        stays[kept] = (attention & marks)[kept]
        for gathered, placed in results.values():
            assert torch.equal(placed[name], torch.where(stays, value, value.new_zeros(())))
            assert torch.equal(gathered[name], results["reference"][0][name])
            assert gathered[name].dtype == placed[name].dtype == value.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_both_ways(backend, monkeypatch):
    monkeypatch.setenv("CPPO_BACKEND", backend)
    inputs = make_inputs("pack_completions")
    shape = inputs["input_ids"].shape
    weights = torch.rand(*shape, dtype=torch.float64, requires_grad=True)

    def there_and_back(weights):
        packed = cppo.pack_completions(
            **inputs, per_token={"w": weights, "ids": inputs["input_ids"]}
        )
        gathered = packed.per_token["w"]
        both = packed.unpack({"w": gathered**2, "ids": packed.per_token["ids"]})
        return gathered, both["w"]

    assert torch.autograd.gradcheck(there_and_back, (weights,))
    assert torch.autograd.gradgradcheck(there_and_back, (weights,))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("index", [[0, 1, 2, 2, 3], [4, 5, 0, 1, 5], [0, 2, 4], [5], []])
def test_unpack_takes_any_places(index):
    index = torch.tensor(index, dtype=torch.int64)
    values = [10.0 + index, (10 + index).short()]  # where a place comes twice, so does its value
    ours = torch.ops.cppo.unpack(values, index, 2, 3)
    for one, expected in zip(ours, reference.unpack(values, index, 2, 3), strict=True):
        assert torch.equal(one, expected)
    again = torch.ops.cppo.gather_tokens(ours, index)
    assert all(torch.equal(one, value) for one, value in zip(again, values, strict=True))
    for outside in (-1, 6):
        with pytest.raises(RuntimeError, match="target_index must be in \\[0, 6\\)"):
            torch.ops.cppo.unpack([torch.zeros(1)], torch.tensor([outside]), 2, 3)


def lengths_of(inputs):
    """(tokens, response tokens) of the kept completions."""
    kept = inputs["kept"]
    masks = inputs["attention_mask"], inputs["completion_mask"]
    return tuple(mask[kept].sum(1).tolist() for mask in masks)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_lengths_known_on_the_host_spare_the_only_wait(backend, monkeypatch):
    inputs = make_inputs("pack_completions")
    expected = evaluate("pack_completions", inputs, "reference")
    # As for tensors on a GPU, whose values nothing may look at.
    monkeypatch.setattr("cppo.ops.pack.may_read", lambda *tensors: False)
    waits = []
    stock = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (waits.append(x.shape), stock(x))[1])
    ours = cppo.pack_completions(**inputs, backend=backend)
    assert waits == [(4,)]
    known = cppo.pack_completions(**inputs, lengths=lengths_of(inputs), backend=backend)
    monkeypatch.undo()
    assert len(waits) == 3  # those of lengths_of itself
    assert known.max_seqlen == ours.max_seqlen == int(expected["cu_seqlens"].diff().max())
    for name, value in expected.items():
        assert torch.equal(getattr(known, name), value), name
        assert torch.equal(getattr(ours, name), value), name


def test_lengths_are_checked_where_that_costs_nothing():
    inputs = make_inputs("pack_completions")
    tokens, responses = lengths_of(inputs)
    cppo.pack_completions(**inputs, lengths=(tokens, responses))
    with pytest.raises(ValueError, match="lengths must be those of the masks, response tokens of"):
        cppo.pack_completions(**inputs, lengths=(tokens, [*responses[:-1], responses[-1] + 1]))
    with pytest.raises(ValueError, match="lengths must be two lists of K = 3 integers, .* \\[3, 2"):
        cppo.pack_completions(**inputs, lengths=(tokens, responses[:2]))


@pytest.mark.parametrize("with_lengths", [True, False])
def test_packing_and_unpacking_compile_with_their_gradients(with_lengths, monkeypatch):
    inputs = make_inputs("pack_completions")
    lengths = lengths_of(inputs) if with_lengths else None
    weights = torch.rand(inputs["input_ids"].shape, requires_grad=True)

    def call(weights):
        packed = cppo.pack_completions(**inputs, per_token={"w": weights}, lengths=lengths)
        return packed.unpack(packed.per_token["w"].sin())

    expected = call(weights)
    (gradient,) = torch.autograd.grad(expected.sum(), weights)
    options = torch._dynamo.config.patch(capture_scalar_outputs=True)
    with options:
        ours = torch.compile(call, fullgraph=True, backend="aot_eager")(weights)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), weights)[0], gradient)


NO_KERNELS = backends.why_not("pack_completions", "cuda", "cuda")
needs_gpu = pytest.mark.skipif(
    bool(NO_KERNELS) or not torch.cuda.is_available(), reason=NO_KERNELS or "needs a CUDA device"
)


def on_gpu(inputs):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 1024), (300, 700), (3, 0), (0, 5)])
def test_the_gpu_packs_and_unpacks_bit_for_bit_like_the_cpu(shape, mask_dtype):
    generator = torch.Generator().manual_seed(shape[0])
    attention = torch.rand(shape, generator=generator) < 0.8
    marks = torch.rand(shape, generator=generator) < 0.6
    marks &= ~(attention & (attention.cumsum(1) == 1))
    dtypes = [torch.bool, torch.bfloat16, torch.float32, torch.float64]
    along = {str(dtype): torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes}
    inputs = {
        "input_ids": torch.randint(0, 9999, shape, generator=generator),
        "attention_mask": attention.to(mask_dtype),
        "completion_mask": marks.to(mask_dtype),
        "kept": torch.randperm(shape[0], generator=generator)[: (shape[0] + 1) // 2],
    }
    expected = cppo.pack_completions(**inputs, per_token=along, backend="cpp")
    there = {name: value.cuda() for name, value in along.items()}
    lengths = lengths_of({**inputs, "completion_mask": attention & marks})
    for known in (None, lengths):
        ours = cppo.pack_completions(
            **on_gpu(inputs), per_token=there, lengths=known, backend="cuda"
        )
        assert ours.max_seqlen == expected.max_seqlen
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(ours, name).cpu(), value), name
        placed, placed_expected = ours.unpack(ours.per_token), expected.unpack(expected.per_token)
        for name in along:
            assert torch.equal(ours.per_token[name].cpu(), expected.per_token[name]), name
            assert torch.equal(placed[name].cpu(), placed_expected[name]), name


@pytest.mark.gpu
@needs_gpu
def test_on_the_gpu_gradients_flow_and_known_lengths_wait_for_nothing():
    inputs = on_gpu(make_inputs("pack_completions"))
    lengths = lengths_of(inputs)
    weights = torch.rand(inputs["input_ids"].shape, device="cuda", requires_grad=True)
    cppo.pack_completions(**inputs, per_token={"w": weights})  # the first call loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = cppo.pack_completions(**inputs, per_token={"w": weights}, lengths=lengths)
        placed = packed.unpack(packed.per_token["w"] ** 2)
        (gradient,) = torch.autograd.grad(placed.sum(), weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stays = torch.zeros_like(weights)
    stays[inputs["kept"]] = inputs["completion_mask"][inputs["kept"]].float()
    assert torch.equal(gradient, 2 * weights.detach() * stays)


def test_unpack_refuses_other_sizes_and_to_moves_everything():
    packed = cppo.pack_completions(**make_inputs("pack_completions"))
    with pytest.raises(ValueError, match=r"values\['b'\] must be \(T,\) = \(\d+,\), got \(1,\)"):
        packed.unpack({"a": packed.targets, "b": packed.targets[:1]})
    with pytest.raises(ValueError, match=r"cppo.PackedBatch.unpack: values must be \(T,\)"):
        packed.unpack(torch.zeros(len(packed.targets) + 1))
    moved = packed.to("meta")
    assert moved.rows.device.type == "meta" and moved.shape == packed.shape


IDS, ON = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
LAST = torch.tensor([[0, 0, 1, 1]] * 2)


def pack(ids=IDS, attention=ON, response=LAST, kept=None, **options):
    return cppo.pack_completions(ids, attention, response, kept, **options)


ERRORS = [
    (lambda: pack(IDS.float()), TypeError, "input_ids must be of integer dtype"),
    (lambda: pack(IDS.short()), TypeError, "input_ids must be int32 or int64, got torch.int16"),
    (lambda: pack(IDS.tolist()), TypeError, "input_ids must be a Tensor, got list"),
    (
        lambda: pack(per_token=[IDS]),
        TypeError,
        "per_token must be a mapping of names to tensors, got list",
    ),
    (lambda: pack(IDS[0]), ValueError, "input_ids must be (B, L), got (4,)"),
    (
        lambda: pack(attention=ON[:, 1:]),
        ValueError,
        "attention_mask must be (B, L) = (2, 4) like input_ids, got (2, 3)",
    ),
    (lambda: pack(response=LAST[0]), ValueError, "completion_mask must be (B, L) = (2, 4)"),
    (
        lambda: pack(per_token={"logps": ON[:1]}),
        ValueError,
        "per_token['logps'] must be (B, L) = (2, 4) like input_ids, got (1, 4)",
    ),
    (
        lambda: pack(per_token={"hidden": torch.zeros(2, 4, 3)}),
        ValueError,
        "per_token['hidden'] must be (B, L) = (2, 4) like input_ids, got (2, 4, 3)",
    ),
    (lambda: pack(kept=torch.tensor([0, 2])), ValueError, "[0, B) = [0, 2), got 2 at index 1"),
    (lambda: pack(kept=torch.tensor([-1])), ValueError, "got -1 at index 0"),
    (lambda: pack(kept=torch.tensor([1, 1])), ValueError, "unique, got 1 more than once"),
    (lambda: pack(kept=torch.tensor([0.0])), TypeError, "kept must be of integer dtype"),
    (lambda: pack(kept=torch.tensor([0]).int()), ValueError, "kept must be (K,) int64"),
    (lambda: pack(kept=torch.tensor([[0]])), ValueError, "kept must be (K,) int64, got (1, 1)"),
    (lambda: pack(response=ON), ValueError, "first attended token of completion 0"),
    (
        lambda: pack(response=torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1]])),
        ValueError,
        "first attended token of completion 1",
    ),
    (lambda: pack(attention=ON.to("meta")), ValueError, "attention_mask must be on cpu"),
]

test_bad_input = refused(ERRORS, "pack_completions")


def test_a_first_token_response_of_a_dropped_completion_is_no_error():
    response = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    assert pack(response=response, kept=torch.tensor([1])).targets.numel() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchecked_a_first_token_is_no_response(backend):
    # On a GPU nothing is read, so the backends themselves must not point before the stream.
    implementation = backends.pick("pack_completions", IDS, backend)
    everything = torch.ones(2, 4, dtype=torch.bool)
    packed = implementation.pack_completions(IDS, everything, everything, torch.arange(2))
    assert packed[3].tolist() == [0, 1, 2, 4, 5, 6] and packed[5].tolist() == [0, 3, 6]
