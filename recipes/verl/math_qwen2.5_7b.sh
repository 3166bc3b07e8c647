#!/usr/bin/env bash
# Completion pruning on MATH with Qwen2.5-7B-Instruct: the setting of Lin et al. 2025
# (arXiv 2503.22342) in verl >= 0.9, on 4 GPUs of 80 GB. Further options of verl go behind it.
#
#   S='Think about the problem step by step between <think> and </think>, then give the final answer
#   between <answer> and </answer>, in the form $\boxed{ANSWER}$.'
#   cppo data to-verl math data/math data/verl/math_train.parquet --split train --system-prompt "$S"
#   cppo data to-verl math data/math data/verl/math_test.parquet --split test --system-prompt "$S"
#   bash recipes/verl/math_qwen2.5_7b.sh
#
# Its configuration is checked here, no run was made. As gsm8k_qwen2.5_1.5b.sh, whose comments say where
# each number is from ("code" is math_cppo.sh there), but for what is set below; needs math-verify.
set -euo pipefail

options=(
  data.train_files=data/verl/math_train.parquet
  data.val_files=data/verl/math_test.parquet
  actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct
  # paper: 2 for an equivalent answer, 1 for the format
  "+reward.custom_reward_function.reward_kwargs.rewards=[{math_verify:{},weight:2.0},think_answer_format]"
  trainer.experiment_name=math_qwen2.5_7b
  trainer.n_gpus_per_node=4 # code
)
exec bash "$(dirname "$0")/gsm8k_qwen2.5_1.5b.sh" "${options[@]}" "$@"
