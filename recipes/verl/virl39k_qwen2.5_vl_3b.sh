#!/usr/bin/env bash
# Contrastive perception on ViRL39K with Qwen2.5-VL-3B-Instruct: the setting of Rezaei et al. 2026
# (arXiv 2601.00501) in verl >= 0.9, on 8 GPUs of 80 GB. Further options of verl go behind it.
#
#   cppo data to-verl virl39k data/ViRL39K data/verl/virl39k_train.parquet
#   cppo data to-verl geometry3k data/geometry3k data/verl/geometry3k_test.parquet --split test
#   bash recipes/verl/virl39k_qwen2.5_vl_3b.sh
#
# Its configuration is checked here, no run was made. "code" is vbdi/cppo's
# verl/examples/cppo/run_qwen2_5_vl-3b_virl39k.sh. Questions of one image, images enlarged to a side of
# 28 pixels and the instruction behind each question, as there, are in the files that to-verl writes.
# Completion pruning is off, as in the paper: trainer.v1.trainer_mode=cppo
# +trainer.v1.cppo.prune_rate=0.5 turns it on.
set -euo pipefail

loss=actor_rollout_ref.actor.policy_loss
options=(
  data.train_files=data/verl/virl39k_train.parquet
  data.val_files=data/verl/geometry3k_test.parquet # code
  data.train_batch_size=512 # code
  data.max_prompt_length=512 # code
  data.max_response_length=4096 # code
  data.filter_overlong_prompts=True # code
  data.truncation=right # code
  algorithm.adv_estimator=cppo # code: grpo, which it equals
  actor_rollout_ref.model.path=Qwen/Qwen2.5-VL-3B-Instruct
  actor_rollout_ref.model.use_fused_kernels=True # ours
  actor_rollout_ref.model.fused_kernel_options.impl_backend=cppo # ours
  actor_rollout_ref.actor.strategy=fsdp2 # ours; code: fsdp
  actor_rollout_ref.actor.ppo_mini_batch_size=64 # code
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 # code
  $loss._target_=cppo.integrations.verl.PolicyLossConfig
  $loss.loss_mode=cppo
  +$loss.cpl_coef=0.01 # paper and code
  +$loss.tau=0.1 # paper and code
  +$loss.fraction=0.5 # paper and code
  +$loss.gating=True # code
  +$loss.cpl_reduction=token # code: mean over the selected tokens of a micro-batch
  actor_rollout_ref.actor.use_kl_loss=True # code
  actor_rollout_ref.actor.kl_loss_coef=0.01 # code
  actor_rollout_ref.actor.kl_loss_type=low_var_kl # code
  actor_rollout_ref.actor.optim.lr=1e-6 # code
  actor_rollout_ref.rollout.name=vllm # code
  actor_rollout_ref.rollout.n=5 # code
  actor_rollout_ref.rollout.tensor_model_parallel_size=2 # code
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 # code
  actor_rollout_ref.rollout.enable_chunked_prefill=False # code
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=20 # code
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=20 # code
  actor_rollout_ref.ref.fsdp_config.param_offload=True # code
  critic.enable=False
  reward.custom_reward_function.path=pkg://cppo.integrations.verl_rewards
  # paper and code: 0.9 accuracy + 0.1 format
  "+reward.custom_reward_function.reward_kwargs.rewards=[{accuracy:{},weight:0.9},{format:{},weight:0.1}]"
  trainer.logger=[console,tensorboard] # code
  trainer.project_name=cppo
  trainer.experiment_name=virl39k_qwen2.5_vl_3b
  trainer.nnodes=1
  trainer.n_gpus_per_node=8 # code
  trainer.val_before_train=False # code
  trainer.test_freq=31 # code
  trainer.save_freq=31 # code
  trainer.total_epochs=2 # code
)
python3 -m verl.trainer.main_ppo "${options[@]}" "$@"
