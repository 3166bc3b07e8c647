"""A complete GRPO loop on a plain transformers model: python examples/own_loop.py [STEPS]

The lines with `cppo` in them are all there is to add to a loop of your own.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import cppo
from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.warmup import CHECKPOINTS

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
num_questions, group_size, prune_rate = 8, 16, 0.75

torch.manual_seed(0)
path = CHECKPOINTS / "arithmetic"  # or "Qwen/Qwen2.5-1.5B-Instruct"
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
sampling = GenerationConfig(
    do_sample=True,
    top_k=0,  # sample from the policy itself: the default of 50 would not
    max_new_tokens=40,
    num_return_sequences=group_size,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
problems = ArithmeticProblems("train", 4096)
cppo.set_attention(model, "sdpa")  # sequences in a packed stream do not see each other

for step in range(steps):
    # The rollout: group_size completions of each question.
    rows = [problems[step * num_questions + i] for i in range(num_questions)]
    chats = [row["prompt"] for row in rows]
    options = dict(add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    prompts = tokenizer.apply_chat_template(chats, **options)
    input_ids = model.eval().generate(**prompts, generation_config=sampling)
    start = prompts.input_ids.shape[1]
    is_end = input_ids[:, start:] == tokenizer.eos_token_id
    completion_mask = torch.zeros_like(input_ids)
    completion_mask[:, start:] = is_end.cumsum(1) - is_end.long() == 0
    attention_mask = completion_mask.clone()
    attention_mask[:, :start] = prompts.attention_mask.repeat_interleave(group_size, 0)

    # Rewards, advantages, and the quarter of the completions that is worth an update.
    texts = tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
    answers = [row["answer"] for row in rows for _ in range(group_size)]
    rewards = torch.tensor(arithmetic_accuracy(texts, answer=answers))
    advantages, kept = cppo.advantages_and_prune(rewards, group_size, prune_rate)

    # The update, on one stream without padding; no (T, V) logits on a fused backend.
    batch = cppo.pack_completions(input_ids, attention_mask, completion_mask, kept)
    output = cppo.linear_cppo_loss(
        cppo.packed_hidden(model.train(), batch),
        model.lm_head.weight,
        batch.targets,
        advantages[kept],
        cu_seqlens=batch.row_cu_seqlens,
        config=cppo.LossConfig(reduction="grpo"),
    )
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    entropy = output.metrics["entropy"].item()
    print(f"step {step + 1}: reward {rewards.mean():.3f}, entropy {entropy:.3f}", flush=True)
