"""Writes the tiny models of TRL's tests to folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import vision_models
from text_models import QWEN_FIRST, llama, others, qwen2, qwens, text_model

REMOTE = {
    "configuration_remote.py": """
from transformers import LlamaConfig

class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """
from transformers import LlamaForCausalLM
from .configuration_remote import RemoteConfig

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}


def write_remote(folder: Path) -> None:
    """A model whose code lies beside its weights."""
    made = llama("llama3_2")
    write(folder, text_model("Llama", made), made)
    for name, code in REMOTE.items():
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="remote", architectures=["RemoteForCausalLM"])
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write(folder: Path, model: Any, processor: Any) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_all(folder: Path) -> None:
    torch.manual_seed(0)
    for name, pair in (qwens() | others() | vision_models.built()).items():
        write(folder / f"tiny-{name}", *pair)
    write_remote(folder / "tiny-RemoteForCausalLM")


def write_whole(folder: Path) -> None:
    """Qwen2.5 with as many tokens as the real one, of which no completion ends by chance."""
    torch.manual_seed(0)
    for name, pair in qwen2(QWEN_FIRST).items():
        write(folder / f"tiny-{name}", *pair)
