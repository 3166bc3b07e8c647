"""The update of a micro-batch waits for the device at most twice, besides what its ops wait for.

There is no GPU here. `OnDevice` stands in for one: a tensor that says it is on another device, has
its values on the CPU, and notes every operation that makes the host wait, by the file that asks.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer_cases import config, fixed_batch, fixed_rollouts, questions_for, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cppo
from cppo import reference
from cppo.records import NumItems, map_tensors
from cppo.train.algorithm import microbatch_loss
from cppo.train.batch import Batch
from cppo.train.journal import Journal
from cppo.train.metrics import rollout_metrics
from cppo.train.policy import Policy
from cppo.train.progress import PhaseTimer
from cppo.train.scoring import Scores
from cppo.train.update import Update

DEVICE = torch.device("meta")
PACKAGE = Path(cppo.__file__).parent
# What the ops wait for is their own tests' business. In the backward pass that is the loss: who
# waits there, by a mask, has waited in the forward pass too.
OPS = ("reference.py", "fused/", "ops/", "backward")
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

waits: list[tuple[str, str]] = []  # operation, the file of the package that asked for it


class OnDevice(torch.Tensor):
    """A tensor on a device that is not there."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        layout = values.shape, values.stride(), values.storage_offset()
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, *layout, dtype=values.dtype, device=DEVICE
        )
        made.values = values
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()  # what torch itself does, where a subclass may not ask for it

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes tensors on the device that is not there."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    name, target = op.overloadpacket.__name__, kwargs.get("device")
    from_device = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
    to_device = from_device if target is None else torch.device(target) == DEVICE
    queued = kwargs.get("non_blocking") and to_device
    if from_device and (name in READS or not to_device or _reads_indices(name, args)):
        waits.append((name, _asker()))
    elif name == "_to_copy" and to_device and not from_device and not queued:
        waits.append(("a copy that is waited for", _asker()))
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    result = op(*tree_map_only(OnDevice, lambda x: x.values, args), **_plain(kwargs))
    wrap = lambda x: OnDevice(x) if type(x) is Tensor else x  # noqa: E731
    return tree_map_only(Tensor, wrap, result) if to_device else result


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = tree_map_only(OnDevice, lambda x: x.values, kwargs)
    return plain


def _reads_indices(name: str, args: Any) -> bool:
    """Masks are counted first; indices of the host are copied, and waited for."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    indices = [index for index in args[1] if index is not None]
    return any(i.dtype == torch.bool or not isinstance(i, OnDevice) for i in indices)


def _asker() -> str:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.match("torch/autograd/*.py"):
            return "backward"
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix()
    return "elsewhere"


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    waits.clear()
    with Device():
        yield waits


def moved(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OnDevice(buffer)
    return model


def own_value(module: nn.Module, query: Tensor, *arguments: Any, **bounds: Any) -> Any:
    """Stands in for the attention: a GPU's kernel takes its bounds from the device."""
    return query.transpose(1, 2).contiguous(), None


def case(**options: Any) -> tuple[Policy, Batch, Batch]:
    """A policy on the device, a batch there, and the same batch on the host."""
    model, tokenizer = tiny("text")
    policy = Policy(model, tokenizer, config(**options), torch.device("cpu"), suppressed=(3, 4))
    batch = fixed_batch(fixed_rollouts(model, tokenizer, questions_for("text"), group_size=4))
    batch = dataclasses.replace(
        batch, suppressed=policy.suppressed, share_prompts=policy.config.share_prompts
    )
    moved(policy.model.train())
    return policy, dataclasses.replace(batch, rollouts=map_tensors(batch.rollouts, OnDevice)), batch


def test_the_stand_in_notes_what_makes_the_host_wait() -> None:
    there, ahead = OnDevice(torch.arange(4.0)), torch.tensor([1, 2])
    reads = (
        lambda: there.sum().item(),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: bool(there[0] > 1),
        lambda: there.nonzero(),
        lambda: there[there > 1],
        lambda: there[ahead],
        lambda: there[[0, 1]],
        lambda: ahead.to(DEVICE),
    )
    for read in reads:
        with noted() as seen:
            read()
        assert len(seen) == 1
    with noted() as seen:
        queued = ahead.to(DEVICE, non_blocking=True)
        assert isinstance(there[queued] * 2 + torch.zeros(2, device=DEVICE), OnDevice)
    assert seen == []


@pytest.mark.parametrize("share_prompts", [False, True])
def test_waits_of_a_micro_batch(share_prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch, on_host = case(share_prompts=share_prompts)
    known = []
    pack = reference.pack_completions

    def packed(*arguments: Any) -> Any:
        known.append(arguments[-1])
        return pack(*arguments)

    monkeypatch.setattr(reference, "pack_completions", packed)
    monkeypatch.setattr("cppo.ops.loss.autocast_dtype", lambda device: None)
    name = policy.model.config._attn_implementation
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, own_value)
    update = Update(policy, 0, None, Journal(), PhaseTimer())  # type: ignore[arg-type]
    num_items = NumItems(*batch.counts(batch.kept))  # the lengths are read here, once per batch
    for _ in range(2):
        with noted() as seen:
            (part,) = batch.microbatches(batch.kept, 10**6)
            update.add_gradient(microbatch_loss, batch, part, num_items)
        own = [wait for wait in seen if not wait[1].startswith(OPS)]
        assert len(own) <= 2, own
        assert not [wait for wait in own if wait[1].startswith("train/")]
        assert not [wait for wait in own if wait[1] == "model/shared_prompts.py"]
    lengths = batch.lengths(part), batch.response_lengths(part)
    assert known == [lengths, lengths], "packing waits where it does not know the lengths"
    with noted() as seen:
        totals = update._totals()
    assert len(seen) == 1, "the metrics of all micro-batches are read at once"
    alone = microbatch_loss(on_host_too(policy), on_host, part, num_items, policy.config, None)
    assert totals["microbatches"] == 2
    assert totals["loss"] == pytest.approx(2 * alone.loss.item(), abs=1e-6)


def on_host_too(policy: Policy) -> Any:
    """The same model on the host."""
    model, tokenizer = tiny("text")
    return Policy(model, tokenizer, policy.config, torch.device("cpu"), (3, 4)).model.train()


def test_what_a_batch_is_cut_by_is_read_once() -> None:
    _, batch, on_host = case()
    rewards = torch.arange(len(batch.advantages)).double()
    with noted() as seen:
        lengths, counts = batch.lengths(batch.kept), batch.counts(batch.kept)
        found = rollout_metrics(batch, Scores(rewards, {"own": rewards}, {}, {}))
    asked = collections.Counter(file for _, file in seen)
    assert asked["train/batch.py"] == 1 and asked.total() <= 3, seen
    assert (lengths, counts) == (on_host.lengths(on_host.kept), on_host.counts(on_host.kept))
    assert found == rollout_metrics(on_host, Scores(rewards, {"own": rewards}, {}, {}))
