"""Which of TRL's GRPO examples accept `CPPO(prune_rate=0.75)`: the table of tests/run_trl_suite.sh.

    python examples.py HUB TRL_CHECKOUT

Each example's GRPOConfig and what it hands the trainer are read off its syntax tree; arguments have
their defaults, or the values of the command line that the example documents. A CPPOGRPOTrainer is
then made with them, with a tiny model of HUB and stand-ins for the rewards, the tools, the
environment and vLLM. Nothing of the example runs but the expressions of its configuration.
"""

from __future__ import annotations

import ast
import json
import math
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.integrations.trl_options import check_run
from cppo.options.trainer import LossConfig

TRAINERS = ("GRPOTrainer", "AsyncGRPOTrainer")
FIELDS = {field.name for field in fields(GRPOConfig)}
# Where it runs and what it writes: nothing that the adapter looks at.
HERE: dict[str, Any] = dict(
    use_cpu=True, bf16=False, fp16=False, report_to="none", push_to_hub=False, hub_model_id=None,
    optim="adamw_torch", model_init_kwargs=None, save_strategy="no",
)  # fmt: skip
NOT_HERE = {"output_dir", "trackio_space_id", "run_name", "project", "trackio_bucket_id"}
# The tiny model that stands in for the first that its name holds; text models: Qwen3.
MODELS = {
    "Qwen3.5": "Qwen3_5ForConditionalGeneration-NoThink",
    "gemma-4": "Gemma4ForConditionalGeneration",
    "gemma-3": "Gemma3ForConditionalGeneration",
    "VL": "Qwen2_5_VLForConditionalGeneration",
    "Ministral-3": "LlavaNextForConditionalGeneration",  # images cut otherwise than Qwen-VL's
    "": "Qwen3ForCausalLM",
}


class Example:
    """What an example hands its trainer."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(_source(path))
        self.names: dict[str, Any] = {"args": SimpleNamespace(**self._arguments())}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                self._note(node.targets[0], self._value(node.value))
        call = next(self._calls(*TRAINERS))
        self.trainer = _name(call)
        self.handed = {keyword.arg: keyword.value for keyword in call.keywords}
        self.config = self._documented() | self._written()
        model = self._value(self.handed["model"]) or self.names.get("model_name")
        self.model = str(self.config.pop("model_name_or_path", None) or model)

    def _calls(self, *names: str) -> Iterator[ast.Call]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node) in names:
                yield node

    def _note(self, target: ast.expr, value: Any) -> None:
        """`name = value`, or `name, name = value, value`; the first of several counts."""
        if isinstance(target, ast.Tuple) and isinstance(value, tuple):
            for one, its in zip(target.elts, value, strict=True):
                self._note(one, its)
        elif isinstance(target, ast.Name):
            self.names.setdefault(target.id, value)

    def _value(self, node: ast.expr) -> Any:
        """What an expression of the example is, None if that cannot be known here."""
        code = compile(ast.Expression(node), "example", "eval")
        try:
            return eval(code, {"__builtins__": {"len": len, "str": str, "dict": dict}}, self.names)
        except Exception:
            return None

    def _arguments(self) -> dict[str, Any]:
        """The defaults of the example's own command line."""
        self.names, found = {}, {}
        for call in self._calls("add_argument"):
            options = {keyword.arg: self._value(keyword.value) for keyword in call.keywords}
            name = str(self._value(call.args[0])).lstrip("-").replace("-", "_")
            is_flag = str(options.get("action")).startswith("store_")
            default = options.get("default", False if is_flag else None)
            if options.get("nargs") == "+":
                default = [""] * 2  # addresses, one per completion, of which TRL wants two
            found[options.get("dest") or name] = default
        return found

    def _documented(self) -> dict[str, Any]:
        """GRPOConfig as in the first command line of the docstring, where TrlParser reads it."""
        if not any(self._calls("TrlParser")):
            return {}
        first = str(ast.get_docstring(self.tree)).split(".py", 1)[1]
        words = shlex.split(first.split("\n\n")[0].split("```")[0].replace("\\\n", " "))
        chosen = [word.rstrip(",") for word in words]
        parsed, _ = HfArgumentParser([GRPOConfig]).parse_known_args(chosen)
        given = {word.lstrip("-") for word in chosen if word.startswith("--")}
        config = {name: getattr(parsed, name) for name in given & FIELDS}
        config["model_name_or_path"] = chosen[chosen.index("--model_name_or_path") + 1]
        if "use_peft" in given:
            self.handed["peft_config"] = ast.Constant(value=True)
        return config

    def _written(self) -> dict[str, Any]:
        """The arguments of GRPOConfig in the code, and what is assigned to its fields."""
        written: dict[str, Any] = {}
        for call in self._calls("GRPOConfig", "AsyncGRPOConfig"):
            for keyword in call.keywords:
                if keyword.arg:
                    written[keyword.arg] = self._value(keyword.value)
                elif isinstance(keyword.value, ast.Name):
                    written |= self._dictionary(keyword.value.id)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                target = node.targets[0]
                if isinstance(target.value, ast.Name) and target.value.id == "training_args":
                    written[target.attr] = self._value(node.value)
        return {name: value for name, value in written.items() if value is not None}

    def _dictionary(self, name: str) -> dict[str, Any]:
        """The keywords of `name: dict = dict(...)`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
                assert isinstance(node.value, ast.Call)
                return {str(word.arg): self._value(word.value) for word in node.value.keywords}
        raise ValueError(f"{name} is not assigned")


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def _source(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("!", "%")))


def examples(checkout: Path) -> list[Path]:
    """The scripts and notebooks that make a GRPOTrainer, or its asynchronous sibling."""
    paths = sorted((checkout / "examples").rglob("*.py"))
    paths += sorted((checkout / "examples").rglob("*.ipynb"))
    return [path for path in paths if "GRPOTrainer(" in _source(path)]


class Environment:
    """In the place of an example's environment."""

    def reset(self, **columns: Any) -> str:
        return "Start."

    def look(self, where: str) -> str:
        """Looks somewhere.

        Args:
            where: The place.

        Returns:
            What is there.
        """
        return where


class Engine:
    """In the place of TRL's `VLLMGeneration`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.model = options.get("model", args[0] if args else None)
        self.llm = SimpleNamespace(generate=lambda prompts, *rest, **more: prompts)
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info, _post=lambda *_, **__: {})

    def sync_weights(self) -> None:
        """Nothing is trained here."""


def rewards(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def make(example: Example, hub: Path, **cppo: CPPO) -> None:
    """Make the example's trainer."""
    if example.trainer != "GRPOTrainer":
        from trl.experimental.async_grpo import AsyncGRPOTrainer

        type("Trainer", (CPPOMixin, AsyncGRPOTrainer), {})(**cppo)
    config = {name: x for name, x in example.config.items() if name not in NOT_HERE} | HERE
    config["output_dir"] = tempfile.gettempdir()
    stand_in = next(name for part, name in MODELS.items() if part in example.model)
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "Hi"}]}
    if (
        "VL" in stand_in
        or "Conditional" in stand_in
        and "environment_factory" not in example.handed
    ):
        row["image"] = Image.new("RGB", (64, 64))
    handed: dict[str, Any] = {}
    for name, value in example.handed.items():
        if name == "tools":
            handed[name] = [Environment().look]
        elif name == "environment_factory":
            handed[name] = Environment
        elif name == "peft_config" and not isinstance(value, ast.Call):
            handed[name] = LoraConfig(target_modules="all-linear")
    steps = config.get("gradient_accumulation_steps", 1)
    config["gradient_accumulation_steps"] = steps * processes(example)
    base = (CPPOMixin, GRPOTrainer) if cppo else (GRPOTrainer,)
    trainer: Any = type("Trainer", base, {})(
        model=str(hub / "trl-internal-testing" / f"tiny-{stand_in}"),
        reward_funcs=rewards,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_list([row] * 64),
        **handed,
        **cppo,
    )
    if cppo:  # as each of those processes would ask
        trainer.args.steps_per_generation //= processes(example)
        check_run(trainer)


def processes(example: Example) -> int:
    """The processes of which a batch of the example needs as many to hold whole groups."""
    size = example.config.get("per_device_train_batch_size", GRPOConfig.per_device_train_batch_size)
    steps = example.config.get("gradient_accumulation_steps", 1)
    group = example.config.get("num_generations", GRPOConfig.num_generations)
    rows = size * example.config.get("steps_per_generation", steps)
    return group // math.gcd(group, rows)


def outcome(example: Example, hub: Path, options: CPPO) -> str:
    """ "accepted", or the words that refuse the trainer."""
    try:
        make(example, hub, cppo=options)
    except ValueError as error:
        if "cppo" not in str(error):
            raise  # TRL's: the example was not read right
        return f"refused: {error}"
    return "accepted"


def what(example: Example) -> str:
    """What of an example's configuration concerns pruning."""
    names = ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
    shape = [str(example.config.get(name, "-")) for name in names]
    parts = [f"{example.model.split('/')[-1]}, {' x '.join(shape)}"]
    parts += [name for name in ("tools", "environment_factory") if name in example.handed]
    if example.config.get("use_vllm"):
        parts.append(f"vLLM {example.config.get('vllm_mode', GRPOConfig.vllm_mode)}")
    if example.trainer == "GRPOTrainer" and processes(example) > 1:
        parts.append(f"{processes(example)} processes or more")
    parts += [name for name in ("use_liger_kernel",) if example.config.get(name)]
    return ", ".join(parts)


def table(hub: Path, checkout: Path) -> Iterator[str]:
    grpo_trainer.VLLMGeneration = Engine  # type: ignore[misc]
    prune = CPPO(prune_rate=0.75)
    alone = CPPO(prune_rate=0.75, loss=LossConfig(cpl_coef=0))
    paths, accepted, accepted_alone = examples(checkout), 0, 0
    for path in paths:
        example = Example(path)
        words = outcome(example, hub, prune)
        accepted += words == "accepted"
        accepted_alone += outcome(example, hub, alone) == "accepted"
        yield f"{path.relative_to(checkout / 'examples')} ({what(example)}): {words}"
    yield f"{accepted} of {len(paths)} examples accept CPPO(prune_rate=0.75)"
    yield f"{accepted_alone} of {len(paths)} with loss=LossConfig(cpl_coef=0)"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in table(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()):
        print(line, flush=True)
