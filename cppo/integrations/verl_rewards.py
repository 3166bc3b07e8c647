"""The rewards of `cppo.rewards` as verl's custom reward function.

reward.custom_reward_function.path=pkg://cppo.integrations.verl_rewards
+reward.custom_reward_function.reward_kwargs.rewards='[{accuracy: {}, weight: 0.9}, format]'
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.rewards import from_names
from cppo.rewards.registry import RewardFunction
from cppo.train.reward_functions import metric_name


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Any = None,
    *,
    rewards: Sequence[Any] = ("perception_reward",),
    **_: Any,
) -> dict[str, float]:
    """Return the weighted sum of named rewards of a completion, and each of them.

    Args:
        data_source, solution_str, ground_truth, extra_info: as verl calls it, for one completion.
            Rewards get the entries of `extra_info` as columns, and those of its JSON `columns`,
            which `cppo data to-verl` writes.
        rewards: what `cppo.rewards.from_names` reads: names, with parameters and weights.
    Returns: `score`, the reward; `acc`, the first of `rewards`, which verl's validation reports;
        and every reward by its name, unweighted. What does not apply (None) counts 0.
    Raises: as `cppo.rewards.from_names`; ValueError for a ground truth that cannot be read.
    """
    known = dict(answer=ground_truth, data_source=data_source, extra_info=extra_info, prompts="")
    columns = {name: [value] for name, value in {**_columns(extra_info), **known}.items()}
    found: dict[str, float] = {}
    score = 0.0
    for function, weight in zip(*_functions(json.dumps(_plain(rewards))), strict=True):
        (value,) = function(completions=[solution_str], **columns)
        name = metric_name(function)
        name = f"{name}_reward" if name in ("score", "acc") else name
        found[name] = float(value or 0.0)
        score += weight * found[name]
    return dict(score=score, acc=next(iter(found.values())), **found)


def _columns(extra_info: Any) -> dict[str, Any]:
    """The columns of a row that verl carries along."""
    if not isinstance(extra_info, Mapping):
        return {}
    found = {name: value for name, value in extra_info.items() if name != "columns"}
    text = extra_info.get("columns")
    try:
        more = json.loads(text) if isinstance(text, str) else text
    except ValueError:  # a column of that name which is none of ours
        more = None
    found.update(more if isinstance(more, Mapping) else {})
    return {name: value for name, value in found.items() if name != "completions"}


@functools.lru_cache(maxsize=16)
def _functions(rewards: str) -> tuple[list[RewardFunction], list[float]]:
    return from_names(json.loads(rewards))


def _plain(value: Any) -> Any:
    """Hydra's lists and mappings as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in value}
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return [_plain(one) for one in value] if is_list else value
