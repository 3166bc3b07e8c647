"""The YAML file of `cppo train`: one tree of frozen dataclasses, read, checked, overridden, dumped.

    model:   {path: folder or hub name} or {builder: a shipped demo checkpoint, or a place}
    data:    {train: {loader, path, split, skip, limit, prompt_key, ...}, eval, system_prompt}
    rewards: [name or place, {name: {parameters}, weight: 0.9}, ...]
    trainer: CPPOConfig, with `loss:` (LossConfig) and `lora:` (LoraConfig) inside

A place names a function of the user's: "my_code.py:function", relative to the working directory,
or "package.module:function" (`cppo.options.places`). `extends: other.yaml` (relative to the file)
starts from another file.

Every mistake is a ConfigError that names the dotted key, the value, what is allowed, and the file
or the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cppo.cli.config_file import (
    ConfigError,
    all_keys,
    apply_overrides,
    build,
    plain,
    read,
    unknown_keys,
)
from cppo.options import foreign_names
from cppo.options.places import is_place, load_object
from cppo.options.trainer import WRITTEN_BY_A_RUN, CPPOConfig
from cppo.options.values import CheckedFields, one_of
from cppo.questions.columns import KEYS, named, shared_column

CONFIG_NAME = "config.yaml"  # the configuration of a run, in its folder
# Names for what ships with the package: loaders by their place, and folders of models.
LOADERS = {
    "gsm8k": "cppo.questions:load_gsm8k",
    "math": "cppo.questions:load_math",
    "geometry3k": "cppo.questions:load_geometry3k",
    "virl39k": "cppo.questions:load_virl39k",
    "math500": "cppo.questions:load_math500",
    "amc23": "cppo.questions:load_amc",
    "aime24": "cppo.questions:load_aime",
    "aime25": "cppo.questions:load_aime",
    "mathvista": "cppo.questions:load_mathvista",
    "mathverse": "cppo.questions:load_mathverse",
    "mathvision": "cppo.questions:load_mathvision",
    "logicvista": "cppo.questions:load_logicvista",
    "wemath": "cppo.questions:load_wemath",
    "mmmu_pro": "cppo.questions:load_mmmu_pro",
    "rows": "cppo.questions:load_rows",
    "digits": "cppo.demo.digits:load_digit_sums",
    "arithmetic": "cppo.demo.arithmetic:load_arithmetic",
}
_CHECKPOINTS = Path(__file__).parents[1] / "demo" / "checkpoints"
BUILDERS = {"tiny_digits": _CHECKPOINTS / "digits", "tiny_arithmetic": _CHECKPOINTS / "arithmetic"}


def _one_of_or_place(names: Iterable[str], example: str) -> str:
    return f"{one_of(names)}, or a function's place such as {example!r}"


@dataclass(frozen=True)
class ModelConfig(CheckedFields):
    """Which model is trained."""

    path: str | None = None
    """Folder written by save_pretrained, or a hub name."""
    builder: str | None = None
    """Instead of path: a demo checkpoint that ships with the package, or the place of a function
    that is called without arguments and returns (model, processor)."""
    architecture: dict[str, Any] | None = None
    """Keys of a hub model's config.json, for `--dry-run` where the model is not downloaded."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.builder is None):
            raise ValueError(
                "ModelConfig.path or ModelConfig.builder must be given, not both: "
                f"got path {self.path!r} and builder {self.builder!r}"
            )
        if self.builder not in (None, *BUILDERS) and not is_place(self.builder):
            self._fail("builder", _one_of_or_place(BUILDERS, "my_model.py:build"))
        if self.architecture is not None and "model_type" not in self.architecture:
            self._fail("architecture", "a mapping with a model_type, like a model's config.json")


@dataclass(frozen=True)
class DatasetConfig(CheckedFields):
    """Where the questions of one dataset come from."""

    loader: str = "rows"
    """A name of LOADERS, or the place of a function that returns rows (a list, or anything with
    len() and [i]); it is called with those of `path` and `split` that are given."""
    path: str | None = None
    """File or folder, relative to the working directory. A demo task has none, and a
    function of your own need not have one."""
    split: str | None = None
    """Split of the dataset: "train", "test", ...; of a demo task "train" or "heldout". None: the
    training split, or everything with loader "rows"."""
    skip: int = 0
    """Leave out the first `skip` questions. `data.train: {path: my.jsonl, skip: 100}` and
    `data.eval: {path: my.jsonl, limit: 100}` hold 100 questions of one file out of training. Rows
    are numbered from the first that is taken."""
    limit: int | None = None
    """Use only the first `limit` of the questions that `skip` leaves. None: all, or 100,000 of a
    demo task."""
    prompt_key: str | None = None
    """The column that holds the question, a text or messages. "extra_info.question" reads a
    mapping. For loader "rows" and functions of your own. None: `prompt`."""
    answer_key: str | None = None
    """The column that holds the right answer, whatever the rewards compare with. None: `answer`,
    else `reward_model.ground_truth`, else `solution`."""
    images_key: str | None = None
    """The column that holds an image or a list of images: paths, relative to the data file's folder
    or else to the working directory, or the encoded bytes. None: `image` or `images`."""

    @property
    def is_demo(self) -> bool:
        """Whether a demo task makes the questions: these need no file and no check."""
        return LOADERS.get(self.loader, "").startswith("cppo.demo.")

    @property
    def keys(self) -> dict[str, str]:
        """The columns that `prompt_key`, `answer_key` and `images_key` name."""
        return named(**{key: getattr(self, key) for key in KEYS})

    def __post_init__(self) -> None:
        if self.loader not in LOADERS and not is_place(self.loader):
            self._fail("loader", _one_of_or_place(LOADERS, "my_loader.py:load"))
        self._integer("skip", at_least=0)
        if self.limit is not None:
            self._integer("limit", at_least=1)
        self._check_keys()
        if self.loader == "virl39k" and self.split not in (None, "train"):
            self._fail("split", "'train', the only one that ViRL39K has")
        if self.is_demo and self.path is not None:
            self._fail("path", f"left out: loader {self.loader!r} makes its own questions")
        if not (self.is_demo or is_place(self.loader)) and self.path is None:
            self._fail("path", f"a file or folder for loader {self.loader!r}")

    def _check_keys(self) -> None:
        for key, name in self.keys.items():
            if self.loader != "rows" and not is_place(self.loader):
                self._fail(key, f"left out: loader {self.loader!r} knows its columns")
            if not isinstance(name, str) or not name.strip():
                self._fail(key, "the name of a column")
        if shared := shared_column(self.keys):
            self._fail(shared[1], f"another column than {shared[0]}")


@dataclass(frozen=True)
class DataConfig:
    """Training questions, held-out questions, and their system prompt."""

    train: DatasetConfig
    """Questions to train on."""
    eval: DatasetConfig | None = None
    """Held-out questions. None: no evaluation."""
    system_prompt: str | None = None
    """Replaces each question's system message. None: the loader's."""


@dataclass(frozen=True)
class RunConfig:
    """One run: what is trained, on what, with which rewards and how."""

    model: ModelConfig
    """The policy."""
    data: DataConfig
    """The questions."""
    rewards: tuple[Any, ...]
    """Names or places, or mappings {name: {parameters}, weight: number}; see `cppo.rewards`."""
    trainer: CPPOConfig = field(default_factory=CPPOConfig)
    """Options of the trainer."""

    def __post_init__(self) -> None:
        options, loss = self.trainer, self.trainer.loss
        weighted = any(isinstance(r, dict) and "weight" in r for r in self.rewards)
        weights = options.reward_weights
        mistakes = [
            (not self.rewards, "rewards must name at least one reward"),
            (
                bool(options.eval_every) and self.data.eval is None,
                f"trainer.eval_every must be 0 without held-out questions (data.eval), got "
                f"{options.eval_every}",
            ),
            (
                weights is not None and weighted,
                "trainer.reward_weights must be left out where `rewards` has a weight",
            ),
            (
                weights is not None and len(weights) != len(self.rewards),
                f"trainer.reward_weights must have a number for each of the {len(self.rewards)} "
                f"rewards, got {len(weights or ())}",
            ),
            (
                loss.contrasts and not (options.positive_views and options.negative_views),
                "trainer.positive_views and negative_views must name a perturbation each while "
                "trainer.loss.cpl_coef > 0; for plain GRPO set that to 0",
            ),
            (
                loss.perturbed_views == ("negative",) and not options.negative_views,
                "trainer.negative_views must name a perturbation with trainer.loss.perception = "
                f"{loss.perception!r}",
            ),
        ]
        for wrong, message in mistakes:
            if wrong:
                raise ValueError(message)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file into a RunConfig.

    Args:
        path: the file.
        overrides: "trainer.loss.tau=0.2" and the like, values parsed as YAML, set after the file.
    Returns: the checked configuration, whose rewards, perturbations and places exist.
    Raises: ConfigError for a file that cannot be read or holds an unknown, repeated, mistyped or
        impossible key.
    """
    tree = read(path)
    given: list[str] = []
    source = "command line"
    try:
        given = apply_overrides(tree, overrides)
        source = str(path)
        _check_foreign(tree)
        config = build(RunConfig, tree)
        _check_names(config)
    except ConfigError as error:
        if any(f"{error.key}.".startswith(f"{key}.") for key in given) or _is_good(path, given):
            source = "command line"
        raise ConfigError(f"{source}: {error}", error.key) from None
    return config


def _check_foreign(tree: dict[str, Any]) -> None:
    """Raise ConfigError for a key of TRL's or verl's, or of ours in another place, with ours."""
    known = all_keys(RunConfig)
    for key, value in unknown_keys(RunConfig, tree):
        last = key.rpartition(".")[2]
        place, words = foreign_names.answer(key, value) or (key, "")
        ours = [one for one in known if one.endswith(f".{last}")]
        if (
            not words
            and ours
            and len({one.replace("data.eval", "data.train") for one in ours}) == 1
        ):
            words = f"did you mean {ours[0]}?"
        if words:
            given = "" if isinstance(value, dict) else f" (its value: {value!r:.60})"
            raise ConfigError(f"{place} is not a key{given}; {words}", key)


def _is_good(path: str | Path, given: Sequence[str]) -> bool:
    """Whether the file alone is right, so that the mistake is in the overrides."""
    try:
        return bool(given) and load(path) is not None
    except ConfigError:
        return False


def dump(config: RunConfig) -> str:
    """Return the YAML text of a configuration, every default written out; `load` reads it back."""
    tree = plain(config)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return f"{WRITTEN_BY_A_RUN}\n{text}"


def _check_names(config: RunConfig) -> None:
    """Import places and build rewards and perturbations, so that a misspelt name is found now."""
    from cppo import rewards, views

    evaluated = config.data.eval and config.data.eval.loader
    for key, place in (
        ("model.builder", config.model.builder),
        ("data.train.loader", config.data.train.loader),
        ("data.eval.loader", evaluated),
    ):
        try:
            if is_place(place):
                load_object(str(place), key.rpartition(".")[2])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}: {error}", key) from error
    for key, from_names, names in (
        ("rewards", rewards.from_names, config.rewards),
        ("trainer.positive_views", views.views_from_names, config.trainer.positive_views),
        ("trainer.negative_views", views.views_from_names, config.trainer.negative_views),
    ):
        try:
            if names:
                from_names(list(names))
        except ImportError:
            pass  # `check_packages` says so if a run depends on it
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}: {error}", key) from None
