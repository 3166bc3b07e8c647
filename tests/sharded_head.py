"""What test_heads runs on two processes: torchrun tests/sharded_head.py.

A head that is a DTensor: forward and gradients against the whole head, memory between the two.
"""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from families import tiny_family
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import cppo
from cppo import LossConfig, Views
from cppo.model.forward import lm_head
from cppo.testing import make_inputs

# Gradients computed in the forward, and in the backward.
CONFIGS = {
    "resident": LossConfig(cpl_reduction="sequence", cpl_coef=0.5, entropy_coef=0.01),
    "full": LossConfig(divergence="full", cpl_coef=0.5, entropy_coef=0.01),
}


def loss_and_leaves(config, inputs, weight, backend="auto"):
    views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
    given = {**inputs, "hidden": views, "weight": weight, "config": config}
    return cppo.linear_cppo_loss(**given, backend=backend).loss, views


def whole_weights():
    """Weights of the size of `inputs["weight"]` that are alive and not a shard."""
    gc.collect()
    alive = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (37, 8))
    return sum(1 for _ in alive)


def same_batch_everywhere(mesh, config) -> None:
    inputs = make_inputs("linear_cppo_loss", layout="packed")
    whole = inputs["weight"].clone().requires_grad_()
    expected, views = loss_and_leaves(config, inputs, whole)
    expected.backward()
    shard = distribute_tensor(inputs["weight"], mesh, [Shard(0)]).requires_grad_()
    loss, own_views = loss_and_leaves(config, inputs, shard)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert isinstance(shard.grad, DTensor) and shard.grad.placements == shard.placements
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)
    for own, view in zip(own_views, views, strict=True):
        torch.testing.assert_close(own.grad, view.grad)


def a_batch_for_each(mesh, config) -> None:
    """The gradient is the mean of the processes', as FSDP's own."""
    batches = [make_inputs("linear_cppo_loss", layout="packed", seed=rank) for rank in range(2)]
    weight = batches[0]["weight"]
    whole = weight.clone().requires_grad_()
    for inputs in batches:
        (loss_and_leaves(config, inputs, whole)[0] / 2).backward()
    shard = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss_and_leaves(config, batches[mesh.get_rank()], shard)[0].backward()
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)


def nothing_whole_is_held(mesh) -> None:
    """Between forward and backward a process has its shard alone, and notices a change of it."""
    inputs = make_inputs("linear_cppo_loss", layout="packed")
    shard = distribute_tensor(inputs.pop("weight"), mesh, [Shard(0)]).requires_grad_()
    before = whole_weights()
    loss, _ = loss_and_leaves(CONFIGS["full"], inputs, shard)
    assert whole_weights() == before
    with torch.no_grad():
        shard += 1
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified in place" in str(error)
    else:
        raise AssertionError("a changed shard went unnoticed")


def beside_fsdp(mesh) -> None:
    """The head of a model under `fully_shard`, called outside of the model's forward."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    plain = torch.nn.Sequential(*layers[:1], torch.nn.Linear(8, 37, bias=False))
    batch = make_inputs("linear_token_stats", layout="packed", seed=mesh.get_rank())
    both = [make_inputs("linear_token_stats", layout="packed", seed=rank) for rank in range(2)]

    def loss(model, inputs):
        states = model[0](inputs["hidden"])
        stats = cppo.linear_token_stats(states, model[1].weight, inputs["targets"])
        return stats.logps.mean()

    ((loss(plain, both[0]) + loss(plain, both[1])) / 2).backward()
    expected = [parameter.grad.clone() for parameter in plain.parameters()]
    plain.zero_grad()
    sharded = torch.nn.Sequential(*plain)
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded[1], mesh=mesh)
    loss(sharded, batch).backward()
    for parameter, gradient in zip(sharded.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)


def a_model_that_is_checked_in_its_shards(mesh) -> None:
    """The check of a model runs within the forward of the module that FSDP wraps."""

    class Policy(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return cppo.packed_hidden(self.model, batch) @ lm_head(self.model).weight.T

    ids = torch.arange(27).view(3, 9) * 5 % 60 + 3
    mask = torch.ones_like(ids)
    batch = cppo.pack_completions(ids, mask, mask * (torch.arange(9) >= 3))
    results = []
    for is_sharded in (False, True):
        policy = Policy(tiny_family("qwen3")).train()
        cppo.set_attention(policy.model, "sdpa")
        if is_sharded:
            for layer in policy.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(policy, mesh=mesh)
        logits = policy(batch)
        logits.sin().sum().backward()
        gradients = [p.grad.full_tensor() if is_sharded else p.grad for p in policy.parameters()]
        results.append([logits.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for config in CONFIGS.values():
        same_batch_everywhere(mesh, config)
        a_batch_for_each(mesh, config)
    nothing_whole_is_held(mesh)
    beside_fsdp(mesh)
    a_model_that_is_checked_in_its_shards(mesh)
    dist.destroy_process_group()
    print("sharded heads: all held", flush=True)
    # Seen once: torch aborted afterwards, with "terminate called without an active exception".
    os._exit(0)


if __name__ == "__main__":
    main()
