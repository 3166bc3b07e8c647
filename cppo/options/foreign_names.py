"""Options of TRL, verl and transformers, answered with ours: what a key of theirs is called here.

    num_generations -> trainer.group_size       actor_rollout_ref.rollout.n -> trainer.group_size

The command line looks names up here, and so does CPPOConfig in Python. An answer is a key, or a
sentence where no key means the same. A name with a dot includes its section in verl's
configuration, without which it could be anything ("rollout.n").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_FULL_DISTRIBUTION = (
    "completions are sampled from the whole distribution, because the importance ratios are to "
    "what was sampled; trainer.loss.temperature is the one knob"
)
_BATCH = (
    "trainer.batch_size is the completions of a step over all processes, trainer.optimizer_steps "
    "how many updates they are dealt to, and trainer.max_tokens_per_microbatch, in tokens, what "
    "fits in memory at once"
)
_FUSED = "there is nothing to switch on: the head and its loss are always fused"
_SHARDING = (
    "the trainer does not shard a model: every process holds the whole of it; for ZeRO or FSDP "
    "call the ops from TRL or verl (docs/trl.md, docs/verl.md)"
)
_LORA = "trainer.lora is there or null: `trainer.lora.r=16` trains adapters"

# (their names, ours)
_TABLE = (
    # the rollout
    ("num_generations rollout.n n num_samples", "trainer.group_size"),
    (
        "max_completion_length max_new_tokens max_response_length response_length",
        "trainer.max_completion_tokens",
    ),
    ("max_prompt_length", "trainer.max_prompt_tokens"),
    ("mask_truncated_completions", "trainer.mask_overlong"),
    ("temperature rollout.temperature", "trainer.loss.temperature"),
    ("top_p top_k min_p repetition_penalty", _FULL_DISTRIBUTION),
    ("use_vllm vllm_mode rollout.name", "trainer.engine"),
    ("vllm_gpu_memory_utilization gpu_memory_utilization", "trainer.vllm.memory_share"),
    (
        "vllm_tensor_parallel_size tensor_model_parallel_size tensor_parallel_size",
        "an engine in the trainer's processes has one GPU each; `vllm serve "
        "--tensor-parallel-size` has several, with trainer.engine=vllm_server",
    ),
    ("vllm_max_model_length vllm_max_model_len max_model_len", "trainer.vllm.max_model_len"),
    ("vllm_server_base_url vllm_server_host", "trainer.vllm.address"),
    ("vllm_server_timeout", "trainer.vllm.start_timeout"),
    ("vllm_enable_sleep_mode", "trainer.vllm.sleep"),
    ("enforce_eager", "trainer.vllm.enforce_eager"),
    (
        "vllm_importance_sampling_correction vllm_importance_sampling_mode",
        "trainer.importance_correction",
    ),
    ("vllm_importance_sampling_cap", "trainer.loss.correction_max"),
    ("chat_template_kwargs", "trainer.chat_template_kwargs"),
    # rewards and advantages
    ("reward_funcs reward_functions custom_reward_function", "rewards"),
    ("reward_weights", "trainer.reward_weights"),
    ("scale_rewards norm_adv_by_std_in_grpo", "trainer.scale_rewards"),
    ("filter_groups", "trainer.drop_zero_variance"),
    # the loss
    ("beta kl_coef kl_loss_coef init_kl_coef", "trainer.loss.kl_coef"),
    ("use_kl_loss", "trainer.loss.kl_coef > 0 is what adds the KL term"),
    ("use_kl_in_reward", "the KL term is in the loss, with trainer.loss.kl_coef"),
    ("kl_loss_type", "the KL term is the k3 estimate (verl's low_var_kl) of trainer.loss.kl_coef"),
    (
        "epsilon",
        "here it is trainer.loss.clip_low, and trainer.loss.clip_high where "
        "epsilon_high is not given",
    ),
    ("clip_ratio_low", "trainer.loss.clip_low"),
    ("epsilon_high clip_ratio_high", "trainer.loss.clip_high"),
    (
        "clip_ratio clip_eps cliprange",
        "here there are two, trainer.loss.clip_low and trainer.loss.clip_high",
    ),
    ("delta clip_ratio_c", "trainer.loss.dual_clip"),
    ("loss_type loss_agg_mode", "trainer.loss.reduction"),
    ("loss_mode importance_sampling_level", "trainer.loss.importance"),
    ("entropy_coeff ent_coef", "trainer.loss.entropy_coef"),
    (
        "top_entropy_quantile",
        "no loss is masked by a token's entropy; trainer.loss.perception=vppo keeps it "
        "on the tokens that depend on the image",
    ),
    (
        "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha",
        "the reference of trainer.loss.kl_coef is the policy at the start and stays so",
    ),
    # batches and length
    (
        "per_device_train_batch_size gradient_accumulation_steps train_batch_size "
        "gen_batch_size ppo_mini_batch_size ppo_micro_batch_size_per_gpu "
        "steps_per_generation ppo_micro_batch_size micro_batch_size mini_batch_size "
        "log_prob_micro_batch_size_per_gpu log_prob_micro_batch_size",
        _BATCH,
    ),
    ("ppo_max_token_len_per_gpu", "trainer.max_tokens_per_microbatch"),
    ("per_device_eval_batch_size", "trainer.generation_batch_size"),
    ("num_train_epochs total_epochs epochs", "trainer.num_epochs"),
    ("total_training_steps train_steps", "trainer.max_steps"),
    ("ppo_epochs num_ppo_epochs", "trainer.num_iterations"),
    # the optimizer
    ("lr optim.lr", "trainer.learning_rate"),
    ("warmup_ratio lr_warmup_steps_ratio", "here it is trainer.warmup_steps, in optimizer steps"),
    ("lr_scheduler_type warmup_style", "trainer.lr_scheduler"),
    ("optim optimizer", "the optimizer is AdamW: trainer.learning_rate, betas, weight_decay"),
    ("adam_beta1 adam_beta2", "trainer.betas"),
    ("adam_epsilon", "AdamW's epsilon is 1e-8; trainer.betas and trainer.weight_decay can be set"),
    ("grad_clip clip_grad", "trainer.max_grad_norm"),
    # the model
    ("model_name_or_path model_name model.path model_path", "model.path"),
    ("attn_implementation attention_implementation", "trainer.attention"),
    ("bf16 fp16 torch_dtype dtype mixed_precision", "trainer.precision"),
    ("use_peft peft_config", _LORA),
    ("lora_rank lora_r rank", "trainer.lora.r"),
    ("lr_warmup_steps", "trainer.warmup_steps"),
    ("lora_alpha", "trainer.lora.alpha"),
    ("lora_dropout", "trainer.lora.dropout"),
    ("lora_target_modules target_modules", "trainer.lora.target_modules"),
    ("load_in_4bit load_in_8bit", "no quantised weights are trained; trainer.lora trains adapters"),
    ("enable_gradient_checkpointing grad_checkpointing", "trainer.gradient_checkpointing"),
    ("freeze_vision_modules", "trainer.freeze_vision_tower"),
    ("use_liger_kernel use_liger_loss use_liger use_fused_kernels", _FUSED),
    (
        "use_remove_padding padding_free",
        "completions are packed without padding wherever that is right for the model",
    ),
    ("deepspeed fsdp fsdp_config strategy", _SHARDING),
    (
        "nnodes n_gpus_per_node",
        'several processes are started by `accelerate launch "$(which cppo)" train CONFIG.yaml`',
    ),
    ("ddp_timeout", "trainer.process_timeout"),
    # the data
    ("dataset_name dataset_path train_files train_file", "data.train.path"),
    ("val_files test_files eval_files", "data.eval.path"),
    ("dataset_train_split", "data.train.split"),
    ("dataset_test_split", "data.eval.split"),
    ("image_key image_column", "data.train.images_key"),
    ("question_key prompt_column", "data.train.prompt_key"),
    ("label_key solution_key answer_column", "data.train.answer_key"),
    ("train_max_samples", "data.train.limit"),
    ("val_max_samples max_eval_samples", "data.eval.limit"),
    # what is written
    ("report_to logger", "trainer.trackers"),
    (
        "default_local_dir output save_dir run_name experiment_name project_name",
        "trainer.output_dir",
    ),
    ("logging_steps", "trainer.log_every"),
    ("num_completions_to_print", "trainer.log_completions"),
    ("save_steps save_freq", "trainer.save_every"),
    ("eval_steps test_freq", "trainer.eval_every"),
    ("save_total_limit max_actor_ckpt_to_keep", "trainer.keep_checkpoints"),
    ("metric_for_best_model", "trainer.best_metric"),
    (
        "resume_from_checkpoint resume_mode",
        "`cppo train CONFIG.yaml --resume` goes on from the newest checkpoint",
    ),
    ("overwrite_output_dir", "`cppo train CONFIG.yaml --overwrite` starts anew"),
    (
        "push_to_hub hub_model_id",
        "nothing is uploaded; a checkpoint is a folder that transformers reads and `hf "
        "upload` takes",
    ),
    ("data_seed", "trainer.seed"),
)
KEYS = {name: words for names, words in _TABLE for name in names.split()}

# Values of theirs that need a word: (name, value) -> what to write.
_VALUES = {
    ("loss_type", "grpo"): "trainer.loss.reduction=grpo",
    ("loss_type", "dapo"): "trainer.loss.reduction=dapo",
    (
        "loss_type",
        "bnpo",
    ): "here it is trainer.loss.reduction=dapo, whose mean is over the tokens of the whole "
    "batch, not of each micro-batch",
    ("loss_type", "dr_grpo"): "trainer.loss.reduction=dr_grpo",
    ("loss_agg_mode", "token-mean"): "trainer.loss.reduction=dapo",
    ("loss_agg_mode", "seq-mean-token-mean"): "trainer.loss.reduction=grpo",
    ("loss_agg_mode", "seq-mean-token-sum-norm"): "trainer.loss.reduction=dr_grpo",
    ("loss_mode", "vanilla"): "trainer.loss.importance=token",
    ("loss_mode", "gspo"): "trainer.loss.importance=sequence",
    ("report_to", "none"): "trainer.trackers=[]",
    ("bf16", True): "trainer.precision=bf16",
    ("bf16", False): "trainer.precision=fp32",
    ("fp16", True): "here it is trainer.precision=bf16; there is no fp16",
    ("norm_adv_by_std_in_grpo", True): "trainer.scale_rewards=group",
    ("norm_adv_by_std_in_grpo", False): "trainer.scale_rewards=none",
    ("use_vllm", True): "trainer.engine=vllm",
    ("use_vllm", False): "trainer.engine=builtin",
    ("vllm_mode", "colocate"): "trainer.engine=vllm",
    ("vllm_mode", "server"): "trainer.engine=vllm_server",
    ("rollout.name", "vllm"): "trainer.engine=vllm",
    ("warmup_style", "constant"): "trainer.lr_scheduler=constant_with_warmup",
}


def answer(key: str, value: Any) -> tuple[str, str] | None:
    """Return what an option of TRL's or verl's is called here.

    Args:
        key: dotted, at whatever place it was written; the longest end that is known counts.
        value: what was given; of a mapping, the first option inside that is known.
    Returns: (the dotted key that is meant, words that say what it is here); None for a name that is
        not theirs.
    """
    for place, one in _leaves(key, value):
        parts = place.split(".")
        for name in (".".join(parts[start:]) for start in range(len(parts))):
            if name in KEYS:
                special = _VALUES.get((name, one)) if isinstance(one, (str, bool)) else None
                words = special or KEYS[name]
                return place, words if " " in words else f"here it is {words}"
    return None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The keys inside of a mapping with their values, then the key itself."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    yield key, value
