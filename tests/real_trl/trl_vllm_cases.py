"""Runs of CPPOGRPOTrainer with a real vLLM, for the tests of both of TRL's modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from cppo.demo.arithmetic import ArithmeticProblems
from cppo.demo.digits import DigitSums
from cppo.demo.warmup import CHECKPOINTS
from cppo.integrations.trl import CPPO, CPPOGRPOTrainer
from cppo.model.load import load_model, load_processor
from cppo.options.trainer import LossConfig

EXACT = 1e-4  # nats, in fp32
STEPS = 4
LORA: dict[str, Any] = dict(r=4, lora_alpha=16, target_modules="all-linear")
LOOK = CPPO(prune_rate=0.5, loss=LossConfig(cpl_coef=0.02))


def folder_of(kind: str, folder: Path) -> Path:
    """A demo's checkpoint, with the settings of videos that vLLM asks for."""
    source = CHECKPOINTS / {"text": "arithmetic", "images": "digits"}[kind]
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_processor(source).save_pretrained(folder)
    return folder


def length(completions: list[Any], **columns: Any) -> list[float]:
    texts = [messages[0]["content"] for messages in completions]
    return [len(text) + len({*text}) / 7 for text in texts]


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    rows: Any = ArithmeticProblems("train", 16) if kind == "text" else DigitSums("train", 16)
    names = [name for name in ("prompt", "images") if name in rows[0]]
    rows = [{name: row[name] for name in names} for row in (rows[i] for i in range(count))]
    if kind == "text":
        rows = [{"prompt": [{"role": "user", "content": str(row["prompt"])}]} for row in rows]
    return list(rows)


def run(
    kind: str,
    folder: Path,
    cppo: CPPO = LOOK,
    *,
    seen: list[dict[str, Any]] | None = None,
    questions: int = 16,
    trainer: Any = CPPOGRPOTrainer,
    peft_config: Any = None,
    **args: Any,
) -> Any:
    """A trained trainer; two questions of four completions each are a rollout.

    Args: seen: takes the rollouts, as they are after pruning; args: of GRPOConfig.
    """

    class Watched(trainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            rollout = super()._generate_and_score_completions(inputs)
            if seen is not None:
                seen.append(rollout)
            return rollout

    path = folder_of(kind, folder)
    defaults: dict[str, Any] = dict(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        max_steps=STEPS,
        learning_rate=1e-3,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=12,
        use_vllm=True,
    )
    own = Watched(
        model=load_model(path),
        processing_class=load_processor(path),
        reward_funcs=length,
        args=GRPOConfig(**(defaults | args)),
        train_dataset=Dataset.from_list(rows_of(kind, questions)),
        cppo=cppo,
        peft_config=peft_config,
    )
    own.train()
    return own


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def differences(trainer: Any, what: str) -> list[float]:
    """The largest difference of a log-probability of each rollout, which it prints as well."""
    largest = logged(trainer, "sampling/sampling_logp_difference/max")
    print(f"{what}: largest differences {largest}")
    return largest
