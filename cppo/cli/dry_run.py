"""What a run will take, worked out before it starts: `cppo train CONFIG --dry-run`.

Nothing is trained and no weights are needed: the model is built on torch's meta device from its
config.json or from the recipe's `model.architecture`. What is not known is said, not guessed. All
byte counts are for one process; every process holds the whole model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from cppo.cli import run_config
from cppo.cli.config_file import ConfigError
from cppo.cli.datasets import CHECKED_ROWS, check_rows, load_questions, overlap
from cppo.cli.engines import engine_words
from cppo.cli.model_sizes import ModelSizes, model_sizes
from cppo.cli.run_config import RunConfig
from cppo.cli.run_parts import check_packages, model_path, trainer_options
from cppo.options.trainer import CPPOConfig
from cppo.questions import QuestionError
from cppo.questions.rows import question_at

_UNKNOWN_PROMPT = 512  # tokens per prompt where nothing tells


class StepSizes(NamedTuple):
    """One step over all processes; tokens are upper bounds, every completion at its limit."""

    questions: int
    sampled: int
    kept: int
    sampled_tokens: int
    trained_tokens: int
    microbatches: int
    microbatch_tokens: int
    microbatch_rows: int


def step_sizes(config: CPPOConfig, prompt_tokens: int) -> StepSizes:
    """Count one step: questions, completions, tokens, micro-batches.

    Specification: with dynamic allocation ceil(batch_size / kept per question) questions, else
    batch_size / group_size; kept per question = G - floor(round(G * prune_rate, 6)), or of all of
    them with prune_scope = "batch"; the surplus over batch_size is cut. A micro-batch holds as many
    of the longest completions as fit in max_tokens_per_microbatch, at least one.
    Args:
        config: the trainer's options.
        prompt_tokens: of the longest prompt.
    """
    group = config.group_size
    kept = config.completions_kept()
    questions = config.questions_per_step()
    longest = prompt_tokens + config.max_completion_tokens
    per_part = max(1, config.max_tokens_per_microbatch // longest)
    own = math.ceil(kept / config.optimizer_steps)
    return StepSizes(
        questions=questions,
        sampled=questions * group,
        kept=kept,
        sampled_tokens=questions * group * config.max_completion_tokens,
        trained_tokens=kept * longest,
        microbatches=math.ceil(own / per_part) * config.optimizer_steps * config.num_iterations,
        microbatch_tokens=min(per_part, own) * longest,
        microbatch_rows=min(per_part, own) * config.max_completion_tokens,
    )


def memory(
    config: CPPOConfig, model: ModelSizes, step: StepSizes, prompt_tokens: int
) -> dict[str, float]:
    """Estimate the bytes of one process, by part.

    Specification: P parameters, of which P_t are trained (all; without the vision tower; or the
    adapters). Weights 4 P, and 2 P for autocast's copies in bf16; gradients 4 P_t; AdamW 8 P_t;
    frozen reference 4 P if kl_coef > 0 without adapters. Activations of a micro-batch of S tokens,
    b = 4 bytes (2 in bf16), h hidden, i intermediate, n layers: b S n (8 h + 4 i), with
    checkpointing b S (n h + 8 h + 4 i); times 3 for the three views, an upper bound, as the
    perturbed ones run only where A > 0. KV cache: 2 b n kv_width (prompt + completion) tokens of
    generation_batch_size completions, fewer where that does not fit, of the built-in loop alone.
    vLLM in this process has weights of its own, in its dtype, and a cache that is not in here.
    Logits: R V 12 bytes for each
    view of a micro-batch's R rows, for themselves, their softmax and their gradient in fp32, but no
    more than a tile of the fused head; beside them its gradient in fp32, 4 V h.

    Args:
        config: the trainer's options.
        model, step: sizes.
        prompt_tokens: of the longest prompt.
    Returns: {part: bytes}.
    """
    import torch

    from cppo.fused.head import TILE_BYTES
    from cppo.train.engine import engine_dtype

    width = 2 if config.precision == "bf16" else 4
    trained = model.parameters
    if config.freeze_vision_tower:
        trained -= model.vision_parameters
    if config.lora is not None:
        trained = model.lora_parameters
    views = 1
    if model.vision_parameters:
        views = 3 if config.loss.contrasts else 1 + config.loss.penalises_removed
    layer = 8 * model.hidden + 4 * model.intermediate
    stored = layer * model.layers
    if config.gradient_checkpointing:
        stored = model.hidden * model.layers + layer
    generated = min(config.generation_batch_size, step.sampled)
    cached = generated * (prompt_tokens + config.max_completion_tokens)
    tile = max(TILE_BYTES.values())
    needs_copy = config.loss.kl_coef > 0 and config.lora is None
    cache = 2 * width * model.layers * model.kv_width * cached
    engine: dict[str, float] = {"KV cache of a rollout": cache if config.engine == "builtin" else 0}
    if config.engine == "vllm":
        engine["weights of vLLM"] = model.parameters * getattr(torch, engine_dtype(config)).itemsize
    return {
        "weights": model.parameters * (6 if width == 2 else 4),
        "gradients": 4 * trained,
        "AdamW state": 8 * trained,
        "reference copy": 4 * model.parameters if needs_copy else 0,
        "activations (rough)": width * step.microbatch_tokens * stored * views,
        **engine,
        "logits, a tile": min(3 * 4 * step.microbatch_rows * model.vocab * views, tile),
        "gradient of the LM head": 0 if config.lora else 4 * model.vocab * model.hidden,
    }


def report(config: RunConfig) -> str:
    """Return the text of a dry run: resolved options, data, step, model, memory."""
    sections = [f"# the resolved configuration\n{run_config.dump(config).rstrip()}"]
    try:
        check_packages(config)
    except ImportError as error:
        sections.append(f"# packages\na real run would stop: {error}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    data, measured, rows = _data(config)
    trainer = config.trainer
    if trainer.max_prompt_tokens:
        prompt, origin = trainer.max_prompt_tokens, "trainer.max_prompt_tokens"
    elif measured:
        prompt, origin = measured, f"the longest of the first {CHECKED_ROWS} prompts"
    else:
        prompt = _UNKNOWN_PROMPT
        origin = "assumed: no limit is set and no prompt could be measured"
    step = step_sizes(trainer, prompt)
    sections += [
        "\n".join(["# data", *data]),
        _table(
            "# one step, over all processes",
            {
                **_step_rows(trainer, step, f"{prompt} ({origin})"),
                "the run": _length(trainer, step, rows),
            },
        ),
    ]
    try:
        sizes, source = model_sizes(config.model, trainer)
    except ValueError as error:
        sections.append(f"# model\nsizes unknown, no memory estimate: {error}")
    else:
        title = f"# memory of one process, estimated, {trainer.precision}"
        sections += [
            _table("# model", _model_rows(sizes, source)),
            _table(title, _memory_rows(trainer, memory(trainer, sizes, step, prompt))),
        ]
    return "\n\n".join(sections)


def _step_rows(config: CPPOConfig, step: StepSizes, prompt: str) -> dict[str, str]:
    return {
        "prompt tokens": prompt,
        "questions": f"{step.questions}",
        "completions sampled": f"{step.sampled}, at most {step.sampled_tokens:,} tokens",
        "sampled by": engine_words(config),
        "corrected by": config.loss.importance_correction,
        "completions kept": f"{step.kept}, at most {step.trained_tokens:,} tokens with prompts",
        "micro-batches": (
            f"at most {step.microbatches} of up to {step.microbatch_tokens:,} tokens"
        ),
        "optimizer steps": f"{config.num_iterations * config.optimizer_steps}",
    }


def _length(config: CPPOConfig, step: StepSizes, rows: int | None) -> str:
    """The steps of a run on a number of questions, None where the data is not here."""
    if rows is None and config.num_epochs is not None:
        return f"{config.num_epochs:g} epochs of data that is not here"
    steps = config.steps(rows)
    seen = steps * step.questions
    epochs = f", {seen / rows:.3g} epochs" if rows else ""
    return f"{steps} steps, {seen:,} questions{epochs}"


def _model_rows(sizes: ModelSizes, source: str) -> dict[str, str]:
    return {
        "family": f"{sizes.family} (sizes from {source})",
        "parameters": f"{sizes.parameters:,}, {sizes.vision_parameters:,} of them vision tower",
        "layers": f"{sizes.layers} of width {sizes.hidden}, vocabulary {sizes.vocab:,}",
    }


def _memory_rows(config: CPPOConfig, parts: dict[str, float]) -> dict[str, str]:
    # A rollout and an update follow one another: the larger of the two counts.
    rollout = parts["KV cache of a rollout"]
    update = (
        parts["activations (rough)"] + parts["logits, a tile"] + parts["gradient of the LM head"]
    )
    peak = _bytes(sum(parts.values()) - min(rollout, update))
    rows = {name: _bytes(size) for name, size in parts.items()}
    if config.engine == "vllm":
        share = f"trainer.vllm.memory_share = {config.vllm.memory_share:g}"
        rows["cache of vLLM"] = f"what {share} of a GPU leaves beside its weights"
        return rows | {"peak": f"{peak} and the cache of vLLM"}
    return rows | {"peak": f"{peak} (the update and the KV cache are not there at once)"}


def _data(config: RunConfig) -> tuple[list[str], int | None, int | None]:
    """Lines about the datasets, the longest measured prompt in tokens, and the training rows."""
    lines, longest, count = [], None, None
    for name in ("train", "eval"):
        spec = getattr(config.data, name)
        if spec is None:
            lines.append(f"{name}: none")
            continue
        try:
            rows = load_questions(spec, config.data.system_prompt, f"data.{name}")
        except ConfigError as error:
            if spec.path is not None and Path(spec.path).expanduser().exists():
                raise  # the data is here: the file or a key is wrong
            lines.append(f"{name}: not here, a real run would stop: {error}")
            continue
        lines.append(f"{name}: {len(rows):,} questions ({spec.loader}, {spec.path or 'generated'})")
        try:
            skips = name == "train" and config.trainer.skip_bad_questions
            check_rows(rows, spec, _rewards(config), skip_bad=skips)
            if name == "train":
                count = len(rows)
                shown, longest = _first_question(config, rows)
                lines += ["first question:", *(f"  {line}" for line in shown.splitlines())]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"data.{name}: {error}", f"data.{name}") from error
    lines += filter(None, [overlap(config.data)])
    return lines, longest, count


def _rewards(config: RunConfig) -> list[Any]:
    """The reward functions; none if a package is missing, which the report says already."""
    try:
        return trainer_options(config)[0]
    except ImportError:
        return []


def _first_question(config: RunConfig, rows: Any) -> tuple[str, int | None]:
    """The first question as the model reads it, and the longest of the first prompts in tokens."""
    from cppo.model.load import load_processor
    from cppo.model.prompts import PromptEncoder, render

    path, kwargs = model_path(config.model), config.trainer.chat_template_kwargs or {}
    processor = load_processor(path) if Path(path).is_dir() else None
    encoder = PromptEncoder(processor, kwargs) if processor else None
    asked = []
    for index in range(min(CHECKED_ROWS, len(rows))):
        try:
            question = question_at(rows, index)
            asked.append((len(encoder(question).input_ids) if encoder else None, question))
        except QuestionError:
            if not config.trainer.skip_bad_questions:
                raise
    if not asked:
        return f"none of the first {CHECKED_ROWS} rows can be asked", None
    longest, first = max((n for n, _ in asked if n), default=None), asked[0][1]
    if processor:
        text = render(processor, first, kwargs)
    else:
        text = "\n".join(f"{m['role']}: {m['content']}" for m in first.messages)
    sizes = ", ".join(f"{w} x {h}" for w, h in (image.size for image in first.images))
    text += f"\nimages: {sizes} pixels" if sizes else ""
    return f"{text}\nanswer: {first.columns.get('answer')}", longest


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join([title, *(f"{name:<22} {value}" for name, value in rows.items())])


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
