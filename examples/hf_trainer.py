"""cppo's loss in `Trainer.compute_loss`: python examples/hf_trainer.py [QUESTIONS]

Completions are sampled and scored beforehand; Trainer does what it does for any dataset.
"""

import sys
import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import cppo
from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.warmup import CHECKPOINTS

group_size, prune_rate = 16, 0.75


def loss_of(model, input_ids, attention_mask, completion_mask, rewards, old_logps):
    """Advantages, pruning, packing, one forward, the loss."""
    advantages, kept = cppo.advantages_and_prune(rewards, group_size, prune_rate)
    per_token = {"old_logps": old_logps}
    masks = (attention_mask, completion_mask)
    batch = cppo.pack_completions(input_ids, *masks, kept, per_token=per_token)
    return cppo.linear_cppo_loss(
        cppo.packed_hidden(model, batch),
        model.lm_head.weight,
        batch.targets,
        advantages[kept],
        old_logps=batch.per_token["old_logps"],
        cu_seqlens=batch.row_cu_seqlens,
    )


class GRPOTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = loss_of(model, **inputs)
        return (output.loss, {"logps": output.logps}) if return_outputs else output.loss


@torch.no_grad()
def sampled(model, tokenizer, row):
    """One row of the dataset: a question's completions, rewards and old log-probabilities."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    input_ids = model.generate(
        **prompt, do_sample=True, top_k=0, max_new_tokens=40, num_return_sequences=group_size
    )
    start = prompt.input_ids.shape[1]
    texts = tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
    is_end = input_ids == tokenizer.eos_token_id
    is_end[:, :start] = False
    attention_mask = (is_end.cumsum(1) - is_end.long() == 0).long()
    completion_mask = attention_mask.clone()
    completion_mask[:, :start] = 0
    batch = cppo.pack_completions(input_ids, attention_mask, completion_mask)
    stats = cppo.linear_token_stats(
        cppo.packed_hidden(model, batch), model.lm_head.weight, batch.targets
    )
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "rewards": torch.tensor(arithmetic_accuracy(texts, answer=[row["answer"]] * group_size)),
        "old_logps": batch.unpack(stats.logps),
    }


def collate(rows):
    """Questions side by side, padded to the longest."""
    tokens = ("input_ids", "attention_mask", "completion_mask", "old_logps")
    batch = {name: [each for row in rows for each in row[name]] for name in tokens}
    padded = {name: pad_sequence(each, batch_first=True) for name, each in batch.items()}
    return {**padded, "rewards": torch.cat([row["rewards"] for row in rows])}


if __name__ == "__main__":
    num_questions = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.manual_seed(0)
    path = CHECKPOINTS / "arithmetic"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    cppo.set_attention(model, "sdpa")
    problems = ArithmeticProblems("train", num_questions)
    rows = [sampled(model, tokenizer, problems[i]) for i in range(num_questions)]
    trainer = GRPOTrainer(
        model,
        TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=2,
            per_device_train_batch_size=8,  # questions
            remove_unused_columns=False,  # the columns are the loss's, not the model's
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=rows,
    )
    trainer.train()
    heldout = ArithmeticProblems("heldout", num_questions // 2)
    after = [sampled(model.eval(), tokenizer, heldout[i])["rewards"] for i in range(len(heldout))]
    before = torch.cat([row["rewards"] for row in rows]).mean()
    print(f"reward {before:.3f} before, {torch.cat(after).mean():.3f} after")
