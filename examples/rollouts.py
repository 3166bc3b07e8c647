"""The same training by either engine: python examples/rollouts.py [STEPS] [--engine vllm]

builtin: the decoding loop of this package. vllm: vLLM in this process, pip install 'cppo[vllm]'.
vllm_server: a `vllm serve` of the folder that is printed at the start; docs/rollouts.md says with
which options it must be started.
"""

import argparse
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local

import torch

from cppo import CPPOConfig, CPPOTrainer, VLLMConfig
from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.warmup import CHECKPOINTS
from cppo.model.load import load_model, load_processor

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int, nargs="?", default=20)
parser.add_argument("--engine", choices=("builtin", "vllm", "vllm_server"), default="builtin")
parser.add_argument("--address", default="http://127.0.0.1:8000", help="of the server")
options = parser.parse_args()

path = CHECKPOINTS / "arithmetic"  # or "Qwen/Qwen2.5-1.5B-Instruct"
print(f"{options.engine} samples from {path}")

trainer = CPPOTrainer(
    load_model(path),
    arithmetic_accuracy,
    ArithmeticProblems("train", 4096),
    config=CPPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        # 128 completions of 8 questions are sampled for an update on 32.
        batch_size=32,
        group_size=16,
        prune_rate=0.75,
        max_completion_tokens=40,
        learning_rate=1e-4,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        engine=options.engine,
        vllm=VLLMConfig(max_model_len=256, address=options.address),
    ),
    processor=load_processor(path),
)
try:
    trainer.train()
finally:
    trainer.engine.close()
rows = [row for row in trainer.history if "loss" in row]
rewards = [row["reward/mean"] for row in rows]
print(f"reward {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last")
if "mismatch/mean" in rows[-1]:
    mean, largest = (max(row[f"mismatch/{name}"] for row in rows) for name in ("mean", "max"))
    print(f"log-probabilities differ by {mean:.1g} on average, {largest:.1g} at most, in any step")
