"""Pruning and contrastive perception in TRL, on a vision-language model.

python examples/trl_vision.py [STEPS]
"""

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local

import torch
from datasets import Dataset
from trl import GRPOConfig

from cppo import LossConfig
from cppo.demo.digits import DigitSums, digit_sum_accuracy
from cppo.demo.warmup import CHECKPOINTS
from cppo.integrations.trl import CPPO, CPPOGRPOTrainer, per_device_train_batch_size
from cppo.model.load import load_model, load_processor, special_token_ids_to_suppress

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20

path = CHECKPOINTS / "digits"  # a 1.3 M parameter Qwen2.5-VL that has seen handwritten digits
model, processor = load_model(path), load_processor(path)
scenes = DigitSums("train", 8 * steps)
rows = [
    {name: scenes[i][name] for name in ("prompt", "images", "answer")} for i in range(8 * steps)
]

trainer = CPPOGRPOTrainer(
    model=model,
    reward_funcs=digit_sum_accuracy,
    args=GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=16,
        per_device_train_batch_size=per_device_train_batch_size(32, 16, prune_rate=0.75),
        max_completion_length=40,
        # A sampled image placeholder would have no image.
        generation_kwargs={"suppress_tokens": special_token_ids_to_suppress(model, processor)},
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
    processing_class=processor,
    cppo=CPPO(prune_rate=0.75, loss=LossConfig(cpl_coef=0.01, cpl_reduction="sequence")),
)
trainer.train()
logged = [row for row in trainer.state.log_history if "reward" in row]
for name in ("reward", "cppo/cpl_loss", "cppo/perception_share", "cppo/gated_share"):
    print(f"{name}: {logged[0][name]:.3f} in the first steps, {logged[-1][name]:.3f} in the last")
