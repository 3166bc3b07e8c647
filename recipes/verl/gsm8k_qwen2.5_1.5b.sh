#!/usr/bin/env bash
# Completion pruning on GSM8K with Qwen2.5-1.5B-Instruct: the setting of Lin et al. 2025
# (arXiv 2503.22342) in verl >= 0.9, on 2 GPUs of 80 GB. Further options of verl go behind it.
#
#   cppo data to-verl gsm8k data/gsm8k data/verl/gsm8k_train.parquet --split train
#   cppo data to-verl gsm8k data/gsm8k data/verl/gsm8k_test.parquet --split test
#   bash recipes/verl/gsm8k_qwen2.5_1.5b.sh
#
# Its configuration is checked here, no run was made. "code" is lzhxmu/CPPO's cppo_verl (gsm8k_cppo.sh
# and cppo_trainer.yaml): 8 questions of 16 completions a step and, by dynamic allocation, 8 / (1 - P)
# at the prune rate P. Another P: train_batch_size and ppo_mini_batch_size change with it.
# Not as there: the rewards are the paper's (2 or 1.5 for the number, 1 for the format); the log goes to
# the console alone.
set -euo pipefail

options=(
  data.train_files=data/verl/gsm8k_train.parquet
  data.val_files=data/verl/gsm8k_test.parquet
  data.train_batch_size=16 # code: 8 / (1 - 0.5)
  data.max_prompt_length=2048 # code
  data.max_response_length=2048 # code
  data.shuffle=False # code
  algorithm.adv_estimator=cppo # code: grpo, which it equals
  trainer.v1.trainer_mode=cppo
  +trainer.v1.cppo.prune_rate=0.5 # code; paper: up to 0.9375
  actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct
  actor_rollout_ref.model.use_fused_kernels=True # ours
  actor_rollout_ref.model.fused_kernel_options.impl_backend=cppo # ours
  actor_rollout_ref.actor.strategy=fsdp2 # ours; code: fsdp
  actor_rollout_ref.actor.ppo_mini_batch_size=16 # code: one mini-batch
  actor_rollout_ref.actor.ppo_epochs=2 # code
  actor_rollout_ref.actor.use_dynamic_bsz=True # code
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096 # code
  actor_rollout_ref.actor.policy_loss.loss_mode=cppo
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean # code
  actor_rollout_ref.actor.clip_ratio_c=10.0 # code
  actor_rollout_ref.actor.use_kl_loss=True # code
  actor_rollout_ref.actor.kl_loss_coef=0.04 # paper and code
  actor_rollout_ref.actor.kl_loss_type=low_var_kl # code
  actor_rollout_ref.actor.optim.lr=1e-6 # code
  actor_rollout_ref.actor.optim.lr_scheduler_type=cosine # code
  actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1 # code
  actor_rollout_ref.actor.optim.weight_decay=0.0001 # code
  actor_rollout_ref.rollout.name=vllm # code
  actor_rollout_ref.rollout.n=16 # paper and code
  actor_rollout_ref.rollout.gpu_memory_utilization=0.65 # code
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 # code
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True # code
  critic.enable=False
  reward.custom_reward_function.path=pkg://cppo.integrations.verl_rewards
  "+reward.custom_reward_function.reward_kwargs.rewards=[gsm8k,think_answer_format]"
  trainer.logger=[console]
  trainer.project_name=cppo
  trainer.experiment_name=gsm8k_qwen2.5_1.5b
  trainer.nnodes=1
  trainer.n_gpus_per_node=2 # code
  trainer.val_before_train=False # code
  trainer.test_freq=50 # code
  trainer.save_freq=-1 # code
  trainer.total_epochs=1 # code
)
python3 -m verl.trainer.main_ppo "${options[@]}" "$@"
