"""Updates of verl's FSDP2 engine on a CPU, with the policy loss and the views of cppo.

    python examples/verl_cpu.py

verl has no rollout without vLLM or SGLang, and no CPU platform. So this is its training half alone,
on a tiny random Qwen2.5-VL, with made-up completions. Everything below `main` is what verl sets up
by itself on a GPU: a platform, an engine, a batch. Nothing here imports cppo.integrations.verl;
verl does.
"""

from __future__ import annotations

import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import verl.plugin.platform as platform


class CPU(platform.platform_cuda.PlatformCUDA):
    """Enough of a device for verl's engine."""

    device_name, vendor_name, device_module = "cpu", "cpu", SimpleNamespace(**vars(torch.cpu))
    device_module.mem_get_info = lambda *_: (0, 1)
    device_module.memory_allocated = device_module.memory_reserved = lambda *_: 0
    device_module.max_memory_allocated = device_module.max_memory_reserved = lambda *_: 0
    device_module.empty_cache = lambda: None

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"


# Before verl asks which device there is.
platform.set_platform(CPU())

from tensordict import TensorDict  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from verl.models.transformers.qwen2_vl import get_rope_index  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.trainer.ppo.core_algos import get_adv_estimator_fn  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

from cppo.demo.digits import DigitSums  # noqa: E402
from cppo.demo.tiny import build_tiny_vlm  # noqa: E402

GROUP_SIZE = 4
SETTINGS = dict(
    temperature=1.0,
    use_remove_padding=False,  # packed sequences need flash-attn in verl's Qwen-VL attention
    use_dynamic_bsz=False,
    micro_batch_size_per_gpu=4,
    pad_token_id=0,
)


def main(steps: int = 4) -> list[dict[str, float]]:
    """Run `steps` updates; returns the metrics of each."""
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model, processor = build_tiny_vlm(size="test")
    engine = build_engine(model, processor, learning_rate=1e-3)
    actor = actor_config(cpl_coef=0.2, loss_agg_mode="seq-mean-token-mean")
    history = []
    for step in range(steps):
        batch = made_up_batch(processor, num_questions=4, seed=step)
        add_old_log_probs(engine, batch)
        with engine.train_mode():
            output = engine.train_batch(batch, partial(ppo_loss, config=actor))
        engine.lr_scheduler_step()
        row = {name: aggregate(value) for name, value in output["metrics"].items()}
        history.append(row)
        print(f"step {step}  " + "  ".join(f"{name} {row[name]:.4f}" for name in sorted(row)))
    return history


def actor_config(loss_agg_mode: str = "token-mean", **policy_loss: Any) -> FSDPActorConfig:
    """What Hydra makes of actor_rollout_ref.actor."""
    return omega_conf_to_dataclass(
        dict(
            _target_="verl.workers.config.FSDPActorConfig",
            strategy="fsdp2",
            rollout_n=GROUP_SIZE,
            ppo_micro_batch_size_per_gpu=4,
            loss_agg_mode=loss_agg_mode,
            policy_loss={
                "_target_": "cppo.integrations.verl.PolicyLossConfig",
                "loss_mode": "cppo",
                **policy_loss,
            },
        )
    )


def build_engine(
    model: PreTrainedModel,
    processor: Any,
    learning_rate: float = 1e-3,
    sequence_parallel: int = 1,
    **options: Any,
) -> Any:
    """verl's FSDP2 engine of a model; `options` are those of actor_rollout_ref.model."""
    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    engines["cpu"] = engines["cuda"]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # The stock processor class needs torchvision; this one is handed over instead.
        config = HFModelConfig(
            path=folder,
            load_tokenizer=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
            **dict(use_remove_padding=False) | options,
        )
        config.processor = processor
        engine = EngineRegistry.new(
            model_type="language_model",
            backend="fsdp2",
            model_config=config,
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                ulysses_sequence_parallel_size=sequence_parallel,
                use_torch_compile=False,
                mixed_precision=dict(param_dtype="fp32", reduce_dtype="fp32"),
            ),
            optimizer_config=FSDPOptimizerConfig(lr=learning_rate, total_training_steps=100),
            checkpoint_config=CheckpointConfig(),
        )
        engine.initialize()
    return engine


def made_up_batch(processor: Any, num_questions: int, seed: int = 0) -> Any:
    """Questions about digits and completions of random digits, as verl's agent loop writes them."""
    generator = torch.Generator().manual_seed(seed)
    questions, uids = DigitSums(size=num_questions, seed=seed), []
    rows: dict[str, list[Any]] = {}
    for index in range(num_questions * GROUP_SIZE):
        question = questions[index // GROUP_SIZE]
        text = processor.apply_chat_template(question["prompt"], add_generation_prompt=True)
        encoded = processor(text=[text], images=question["images"], return_tensors="pt")
        prompt, grid = encoded["input_ids"][0], encoded["image_grid_thw"]
        length = int(torch.randint(3, 9, (), generator=generator))
        letters = "".join(
            str(d) for d in torch.randint(10, (length,), generator=generator).tolist()
        )
        response = torch.tensor(processor.tokenizer(letters)["input_ids"])
        input_ids = torch.cat([prompt, response])
        vision = get_rope_index(processor, input_ids, image_grid_thw=grid)
        score = torch.zeros(len(response))
        score[-1] = letters.count(question["answer"][-1])
        for name, value in dict(
            prompts=prompt,
            responses=response,
            input_ids=input_ids,
            position_ids=torch.cat([torch.arange(len(input_ids))[None], vision]),
            response_mask=torch.ones_like(response),
            loss_mask=torch.ones_like(response),
            rm_scores=score,
            multi_modal_inputs=dict(pixel_values=encoded["pixel_values"], image_grid_thw=grid),
        ).items():
            rows.setdefault(name, []).append(value)
        uids.append(str(index // GROUP_SIZE))
    stack = rows.pop("multi_modal_inputs")
    nested = {
        name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
        for name, values in rows.items()
        if name != "position_ids"
    }
    nested["position_ids"] = tu.nested_tensor_from_tensor_list(rows["position_ids"], ragged_idx=2)
    batch = TensorDict(nested, batch_size=len(uids))
    tu.assign_non_tensor_stack(batch, "multi_modal_inputs", stack)
    tu.assign_non_tensor(batch, global_batch_size=len(uids), **SETTINGS)
    padded = batch.select("rm_scores", "response_mask").to_padded_tensor()
    advantages, _ = get_adv_estimator_fn("cppo")(
        padded["rm_scores"], padded["response_mask"], index=uids
    )
    batch["advantages"] = torch.nested.as_nested_tensor(
        [a[: len(r)] for a, r in zip(advantages, rows["responses"], strict=True)],
        layout=torch.jagged,
    )
    return batch


def add_old_log_probs(engine: Any, batch: Any) -> None:
    """Put the log-probabilities of the policy before the update into the batch."""
    with engine.eval_mode():
        log_probs = engine.infer_batch(batch)["model_output"]["log_probs"]
    batch["old_log_probs"] = response_from_nested(log_probs, batch["response_mask"])


def aggregate(value: Any) -> float:
    """A metric of an update: verl keeps one value per micro-batch."""
    if hasattr(value, "aggregate"):
        return float(value.aggregate())
    return float(torch.tensor(value, dtype=torch.float64).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
