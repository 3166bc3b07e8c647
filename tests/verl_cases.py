"""What the verl tests share: the example's engine and batches, as a module of its own.

As a script, `python tests/verl_cases.py RANK STORE OUTPUT HOW`: one of two processes of an update.
HOW is "halves": each has half of the batch, the completions with A > 0 and the others; or
"sequences" or "fused": both have the batch, and verl cuts the packed sequences between them
(Ulysses), without or with our fused statistics.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl_flash import plain_flash_attention

ROOT = Path(__file__).parents[1]
FUSED = dict(use_fused_kernels=True, fused_kernel_options=dict(impl_backend="cppo"))
LOSS = dict(loss_agg_mode="seq-mean-token-mean", cpl_coef=0.5)


OVERRIDES = """
data.train_batch_size=3 actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.rollout.n=8
actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.model.path=none critic.enable=False
algorithm.adv_estimator=grpo trainer.val_before_train=False
""".split()


def composed(*overrides: str, base: Sequence[str] = OVERRIDES) -> Any:
    """verl's configuration, as main_ppo composes it."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", [*base, *overrides])


def load_example() -> ModuleType:
    """examples/verl_cpu.py, which makes a CPU verl's device."""
    if "verl_cpu" not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(
            "verl_cpu", ROOT / "examples" / "verl_cpu.py"
        )
        module = sys.modules["verl_cpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["verl_cpu"]


def engine_for(example: ModuleType, **options: Any) -> Any:
    model, processor = example.build_tiny_vlm(size="test")
    with torch.no_grad():
        for parameter in model.parameters():
            # Far enough from uniform for the views to differ.
            parameter.mul_(3)
    return example.build_engine(model, processor, **options)


def engine_and_batch(example: ModuleType, packed: bool = False, **options: Any) -> tuple[Any, Any]:
    """An engine and 16 completions of 4 questions, with old log-probabilities of that engine."""
    from verl.utils.tensordict_utils import assign_non_tensor

    engine = engine_for(example, use_remove_padding=packed, **options)
    batch = example.made_up_batch(engine.model_config.processor, num_questions=4, seed=2)
    fused = options.get("use_fused_kernels", False)
    assign_non_tensor(batch, use_remove_padding=packed, use_fused_kernels=fused)
    example.add_old_log_probs(engine, batch)
    return engine, batch


def gradients(engine: Any, batch: Any, actor: Any) -> dict[str, Tensor]:
    """Gradients of verl's loss of a whole batch, micro-batches accumulated."""
    return gradients_and_metrics(engine, batch, actor)[0]


def accumulated(engine: Any) -> dict[str, Tensor]:
    """The gradients that the parameters have, and no longer after this."""
    found = {
        name: parameter.grad.full_tensor().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is not None
    }
    engine.optimizer_zero_grad()
    return found


def gradients_and_metrics(
    engine: Any, batch: Any, actor: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    from verl.workers.utils.losses import ppo_loss

    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(batch.copy(), partial(ppo_loss, config=actor))
        found = accumulated(engine)
    metrics = output["metrics"]
    names = ("cpl_loss", "perception_tokens", "gated_completions")
    return found, {x: metrics[f"actor/{x}"].aggregate() for x in names if f"actor/{x}" in metrics}


def worst(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest entry of each."""
    assert ours.keys() == expected.keys()
    differences = [
        ((ours[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6))
        for name in ours
    ]
    return float(torch.stack(differences).max())


def half(batch: Any, positive: bool) -> Any:
    """The completions with A > 0, or the same number of the others."""
    from verl.utils.tensordict_utils import index_select_tensor_dict

    advantages = torch.stack([row[0] for row in batch["advantages"].unbind()])
    rows = (advantages > 0 if positive else advantages <= 0).nonzero()[:, 0]
    return index_select_tensor_dict(batch, rows)


def update(
    example: ModuleType, share: Any = None, packed: bool = False, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of an update on a share of the batch."""
    engine, batch = engine_and_batch(example, packed, **options)
    batch = share(batch) if share else batch
    return gradients_and_metrics(engine, batch, example.actor_config(**LOSS))


def run_two(how: str, folder: Path) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Gradients and metrics of each of two processes of an update."""
    command = [sys.executable, str(ROOT / "tests" / "verl_cases.py")]
    where = (str(folder / "store"), str(folder / "out"), how)
    ranks = [
        subprocess.Popen([*command, str(rank), *where], stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"out{rank}.pt", weights_only=False) for rank in range(2)]


def main(rank: int, store: str, output: str, how: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    example = load_example()
    if how == "halves":
        found = update(example, partial(half, positive=rank == 0))
    else:
        with plain_flash_attention():
            fused = FUSED if how == "fused" else {}
            found = update(example, packed=True, sequence_parallel=2, **fused)
    torch.save(found, f"{output}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
