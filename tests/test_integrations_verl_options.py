"""What of the verl adapter runs without verl: hooks on modules, options, advantages, pruning."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cppo
from cppo.integrations.after_import import AfterImport, Hook
from cppo.integrations.verl_loss import group_advantages
from cppo.integrations.verl_options import Options, Pruning, check_run, loss_config

HAS_VERL = importlib.util.find_spec("verl") is not None


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of an importable module that nobody has imported yet."""
    (tmp_path / "somebody_elses.py").write_text("def run(a, b, c=1):\n    return a + b + c\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "somebody_elses"
    sys.modules.pop("somebody_elses", None)


def doubling(expected):
    def install(module):
        run = module.run
        module.run = lambda *args: 2 * run(*args)

    return Hook("doubling", "somebody_elses", {"run": expected}, install)


@pytest.mark.parametrize("is_imported", [False, True])
def test_a_hook_runs_once_right_after_its_module_or_at_once_if_it_is_there(module, is_imported):
    if is_imported:
        importlib.import_module(module)
    hooks = AfterImport([doubling("a b")])
    assert bool(hooks.results) == (module in sys.modules) == is_imported
    for _ in range(2):
        assert importlib.import_module(module).run(1, 2) == 8
        assert [str(fit) for fit in hooks.check()] == ["doubling: fits (somebody_elses)"]


def test_a_hook_leaves_a_changed_module_alone_and_says_so(module, caplog):
    hooks = AfterImport([doubling("a c")])
    with caplog.at_level(logging.WARNING):
        import somebody_elses
    assert somebody_elses.run(1, 2) == 4
    words = "doubling: does not fit (run: expected (a c), found (a b c))"
    assert [str(fit) for fit in hooks.check()] == [words] and words in caplog.text


def test_check_names_what_is_missing(module):
    gone = doubling("a")._replace(part="gone", expected={"Class.method": "self"})
    absent = gone._replace(part="absent", module="nobodys_module")
    assert [str(fit) for fit in AfterImport([gone, absent]).check()] == [
        "gone: does not fit (somebody_elses has no Class.method)",
        "absent: does not fit (nobodys_module cannot be imported: No module named "
        "'nobodys_module')",
    ]


@pytest.mark.skipif(HAS_VERL, reason="verl is installed")
def test_without_verl_the_adapter_imports_and_says_what_is_missing():
    code = (
        "import sys, cppo; finders = list(sys.meta_path); import cppo.integrations.verl as verl\n"
        "assert sys.meta_path == finders and 'transformers' not in sys.modules\n"
        "print(*verl.check())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ("verl: does not fit (pip install 'verl[verl-core]>=0.9')")


def actor(**policy_loss):
    """verl's ActorConfig, as far as it is read."""

    class Config(SimpleNamespace):
        def get(self, name, default=None):
            return getattr(self, name, default)

    return Config(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=0.3,
        clip_ratio_c=5.0,
        policy_loss=Config(loss_mode="cppo", **policy_loss),
    )


def test_loss_config_reads_what_verl_was_told():
    assert loss_config(actor()) == cppo.LossConfig(
        clip_low=0.2, clip_high=0.3, dual_clip=5.0, cpl_reduction="sequence", cpl_coef=0.0
    )
    words = (
        "policy_loss.divergence, policy_loss.tau, policy_loss.positive_views have no effect with "
    )
    with pytest.warns(match=words + ".*cpl_coef = 0; policy_loss.cpl_coef = 0.01 turns"):
        loss_config(actor(tau=0.5, divergence="k1", positive_views=["rotation"]))
    given = dict(tau=0.5, fraction=0.25, gating=False, detach_anchor=True, divergence="k1")
    given |= dict(cpl_coef=0.2, cpl_reduction="token")
    expected = cppo.LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=5.0, **given)
    assert loss_config(actor(**given)) == expected
    assert loss_config(actor(importance="sequence")).dual_clip is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(divergence="full"), "policy_loss.divergence must be one of 'k3', 'k1', got 'full'"),
        (dict(tau=0), "tau"),
        (dict(perception="vppo"), "must be 'cpl', 'cpl_all' or 'papo', got 'vppo': its weights"),
        (dict(papo_coef=-1.0), "papo_coef"),
        (dict(negative_views=("sunglasses",)), "sunglasses"),
    ],
)
def test_options_refuse_what_cannot_work(given, words):
    with pytest.raises(ValueError, match=words):
        Options(**given)


def test_advantages_of_groups_of_different_sizes():
    index = ["b", "a", "b", "a", "b", "c"]
    scores = torch.tensor([1.0, 0, 0, 1, 0.5, 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]])
    rewards = torch.zeros(6, 3)
    rewards[torch.arange(6), mask.sum(1) - 1] = scores
    for config, scale in ((None, "group"), (dict(norm_adv_by_std_in_grpo=False), "none")):
        advantages, returns = group_advantages(rewards, mask, index, config, unknown=1)
        expected = torch.zeros(6)
        expected[[0, 2, 4]] = cppo.group_advantages(scores[[0, 2, 4]], 3, scale=scale)
        expected[[1, 3]] = cppo.group_advantages(scores[[1, 3]], 2, scale=scale)
        torch.testing.assert_close(advantages, expected[:, None] * mask, rtol=0, atol=0)
        assert returns is advantages and expected[5] == 0


def test_pruning_keeps_the_largest_of_each_question():
    sizes = {"a_0": 1.0, "b_0": 0.1, "a_1": 0.5, "b_2": 0.3, "a_2": 2.0, "a_3": 0.2}
    assert Pruning(prune_rate=0.5).kept(sizes, 0) == {"a_0", "a_2", "b_2"}
    assert Pruning(prune_rate=0.5, prune="largest").kept(sizes, 0) == {"a_1", "a_3", "b_0"}
    assert Pruning(prune_rate=0.5, prune_scope="batch").kept(sizes, 0) == {"a_0", "a_1", "a_2"}
    assert Pruning(prune_rate=0.99).kept(sizes, 0) == {"a_2", "b_2"}


def test_of_equal_completions_the_first_stay_whatever_the_order_of_arrival():
    sizes = {f"q_{number}": 1.0 for number in (10, 2, 0, 11)}
    assert Pruning(prune_rate=0.5).kept(sizes, 0) == {"q_0", "q_2"}
    random = Pruning(prune_rate=0.5, prune="random")
    assert len(random.kept(sizes, 0)) == 2
    assert random.kept(sizes, 3) == random.kept(dict(reversed(sizes.items())), 3)
    assert len({frozenset(random.kept(sizes, seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    "given", [dict(prune_rate=1.0), dict(prune_scope="x"), dict(prune="variance")]
)
def test_pruning_refuses_values_out_of_range(given):
    with pytest.raises(ValueError, match=f"cppo.integrations.verl: {next(iter(given))} must be"):
        Pruning(**given)


@pytest.mark.parametrize(
    ("algorithm", "critic", "words"),
    [
        (dict(use_kl_in_reward=True), False, "use_kl_loss"),
        (dict(), True, "a critic's advantages"),
        (dict(adv_estimator="gae"), None, "a critic's advantages"),
        (dict(adv_estimator="optimal_token_baseline"), None, "optimal_token_baseline needs"),
    ],
)
def test_runs_whose_advantages_come_late_are_refused(algorithm, critic, words):
    algorithm = {"use_kl_in_reward": False, "adv_estimator": "grpo", **algorithm}
    config = SimpleNamespace(
        algorithm=SimpleNamespace(**algorithm), critic=SimpleNamespace(enable=critic)
    )
    with pytest.raises(ValueError, match=words):
        check_run(config)
    config.algorithm = SimpleNamespace(use_kl_in_reward=False, adv_estimator="cppo")
    config.critic.enable = None
    check_run(config)
