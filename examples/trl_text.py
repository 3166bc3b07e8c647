"""Completion pruning in TRL, on a text model: python examples/trl_text.py [STEPS]"""

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local

import torch
from datasets import Dataset
from trl import GRPOConfig

from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.warmup import CHECKPOINTS
from cppo.integrations.trl import CPPO, CPPOGRPOTrainer, check, per_device_train_batch_size
from cppo.model.load import load_model, load_processor

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
print(*check(), sep="\n")

path = CHECKPOINTS / "arithmetic"
problems = ArithmeticProblems("train", 4096)
rows = [{name: problems[i][name] for name in ("prompt", "answer")} for i in range(8 * steps)]

trainer = CPPOGRPOTrainer(
    model=load_model(path),
    reward_funcs=arithmetic_accuracy,
    args=GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=16,
        # 128 completions of 8 questions are sampled for an update on 32.
        per_device_train_batch_size=per_device_train_batch_size(32, 16, prune_rate=0.75),
        max_completion_length=40,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=load_processor(path),
    cppo=CPPO(prune_rate=0.75),
)
trainer.train()
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(f"reward {rewards[0]:.3f} in the first steps, {rewards[-1]:.3f} in the last")
