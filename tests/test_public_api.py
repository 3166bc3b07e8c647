"""What `import cppo` gives and documents."""

from __future__ import annotations

import inspect

import pytest
import torch

import cppo

FUNCTIONS = [n for n in cppo.__all__ if inspect.isfunction(getattr(cppo, n))]
SIGNATURES = {
    "group_advantages": "rewards, group_size, *, scale, eps, backend",
    "prune_completions": "advantages, group_size, prune_rate, *, scope, prune, drop_zero, rewards, "
    "lengths, generator, backend",
    "advantages_and_prune": "rewards, group_size, prune_rate, *, scale, eps, scope, prune, "
    "drop_zero, lengths, advantages_of, generator, backend",
    "prune_weights": "advantages, kept, group_size, prune_rate, *, scope, prune",
    "select_groups": "rewards, group_size, *, top_p",
    "pack_completions": "input_ids, attention_mask, completion_mask, kept, *, per_token, lengths, "
    "backend",
    "packed_hidden": "model, batch, positions, images, image_of, shared",
    "set_attention": "model, name, device",
    "plan_microbatches": "lengths, max_tokens",
    "balance_ranks": "lengths, world_size",
    "questions_needed": "batch_size, group_size, prune_rate",
    "token_stats": "logits, targets, *, temperature, mask, inplace, backend",
    "linear_token_stats": "hidden, weight, targets, *, bias, suppressed, temperature, logit_scale, "
    "softcap, logits_dtype, mask, backend",
    "perception_mask": "anchor_entropy, negative_entropy, *, fraction, mask, cu_seqlens, backend",
    "visual_dependency": "old_logps, removed_logps, *, mask, cu_seqlens, fraction, floor, of_all",
    "importance_weights": "old_logps, sampling_logps, *, mask, cu_seqlens, config",
    "inspect": "model, processor, image, question, *, answer, samples, temperature, seed, config",
    "cppo_loss": "logits, targets, advantages, *, old_logps, ref_logps, sampling_logps, "
    "token_weights, removed_logps, mask, cu_seqlens, num_items, config, inplace, backend",
    "linear_cppo_loss": "hidden, weight, targets, advantages, *, bias, suppressed, old_logps, "
    "ref_logps, sampling_logps, token_weights, removed_logps, mask, cu_seqlens, num_items, config, "
    "logit_scale, softcap, logits_dtype, backend",
}


def names_of(function):
    names, starred = [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            names.append("*")
            starred = True
        names.append(name)
    return ", ".join(names)


def test_signatures():
    assert {name: names_of(getattr(cppo, name)) for name in FUNCTIONS} == SIGNATURES


@pytest.mark.parametrize("name", cppo.__all__)
def test_every_public_name_is_documented(name):
    documentation = inspect.getdoc(getattr(cppo, name))
    assert documentation and not documentation.startswith(f"{name}("), "a generated docstring"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_their_contract(name):
    documentation = inspect.getdoc(getattr(cppo, name))
    for section in ("Specification: ", "Args:", "Returns:", "Raises:", "ValueError"):
        assert section in documentation, section
    arguments = documentation[documentation.index("Args:") : documentation.index("Returns:")]
    for argument in inspect.signature(getattr(cppo, name)).parameters:
        assert argument in arguments, argument


def test_unknown_names_and_dir():
    with pytest.raises(AttributeError, match="module 'cppo' has no attribute 'ppo'"):
        _ = cppo.ppo
    assert set(cppo.__all__) <= set(dir(cppo))


def test_values_are_checked_on_the_cpu_and_never_while_compiling(monkeypatch):
    from cppo.ops.checks import may_read

    cpu, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    monkeypatch.delenv("CPPO_DEBUG", raising=False)
    assert may_read(cpu, None) and not may_read(cpu, elsewhere)
    monkeypatch.setenv("CPPO_DEBUG", "1")
    assert may_read(elsewhere)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not may_read(cpu)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cppo.group_advantages(torch.rand(8), 4),
        lambda: cppo.advantages_and_prune(torch.rand(8), 4, 0.5),
        lambda: cppo.token_stats(torch.rand(8, 5), torch.arange(8) % 5),
    ],
    ids=["group_advantages", "advantages_and_prune", "token_stats"],
)
def test_checks_and_dispatch_do_not_break_a_compiled_graph(call):
    torch.manual_seed(1)
    expected = call()
    torch.manual_seed(1)
    ours = torch.compile(call, fullgraph=True, backend="eager")()
    torch.testing.assert_close(ours, expected)
