"""What vLLM is asked, and what of its answers may be trusted: the same in process and over HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from cppo.model.prompts import Prompts
from cppo.options.vllm import LOWEST_TEMPERATURE
from cppo.rollouts.engine import EngineError
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.seeds import seed_from

# vLLM allows no other sign for "never": e^-100 of a token's weight is left.
_NEVER = -100.0
# Rounding may bring a log-probability above 0.
_HIGHEST = 1e-2


class Request(NamedTuple):
    """One question.

    token_ids: of its prompt as the chat template writes it: vLLM expands the images by itself, and
        would expand each placeholder of an expanded prompt again.
    expanded: what vLLM must make of them.
    images: in their order.
    seed: of its completions.
    """

    token_ids: list[int]
    expanded: list[int]
    images: list[Image.Image]
    seed: int


class Choice(NamedTuple):
    """One completion of an answer, its closing token included."""

    token_ids: Sequence[int]
    logps: Sequence[float]


def requests(prompts: Prompts, sampling: Sampling, draws: Draws) -> list[Request]:
    """A request for each question."""
    rows = zip(prompts.questions, prompts.unexpanded, prompts.token_ids(), strict=True)
    found = []
    for number, (question, ids, expanded) in enumerate(rows):
        row = draws.own.start + number * sampling.group_size
        # vLLM adds the number of the completion to it.
        seed = seed_from(draws.seed, row) % 2**62
        found.append(Request(ids, expanded, question.images, seed))
    return found


def check_prompt(theirs: list[int], request: Request, name: str, image_token: int | None) -> None:
    """Raises EngineError unless vLLM made the prompt that the trainer has.

    Args:
        theirs: the ids that vLLM sampled behind.
        name: of the engine, for the error.
        image_token: the placeholder of a patch; None: of a text model.
    """
    ours = request.expanded
    if theirs == ours:
        return
    images = ""
    if image_token is not None:
        counts = (ids.count(image_token) for ids in (theirs, ours))
        images = " ({} and {} of them of images)".format(*counts)
    pairs = enumerate(zip(theirs, ours, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    raise EngineError(
        f"cppo.rollouts: {name} made a prompt of {len(theirs)} tokens of ours of "
        f"{len(ours)}{images}, which is another prompt from token {first} on: has it the same "
        "model, image processor and vLLM >= 0.32, and does it expand the images of this family "
        "as transformers does?"
    )


def sampling_arguments(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams`: the plain softmax, whatever the checkpoint says.

    Log-probabilities are those of the sampled tokens alone. A greedy completion is asked for once,
    because its copies are equal.
    """
    is_greedy = sampling.temperature is None
    temperature = sampling.temperature or 0.0
    if not is_greedy and temperature < LOWEST_TEMPERATURE:
        raise EngineError(
            f"cppo.rollouts: vLLM samples at temperatures of {LOWEST_TEMPERATURE:g} and more, got "
            f"{temperature:g}; a lower one is nearly greedy (temperature=None)"
        )
    return {
        "n": 1 if is_greedy else sampling.group_size,
        "temperature": temperature,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0,
        "stop_token_ids": list(sampling.closing),
        "ignore_eos": True,  # an end that is none of `closing`
        "logit_bias": {token: _NEVER for token in sampling.suppressed} or None,
        "detokenize": False,
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    }


def collected(
    answers: Sequence[Sequence[Choice]], asked: Sequence[Request], sampling: Sampling, vocab: int
) -> Sampled:
    """The completions of all requests, in their order.

    Args:
        vocab: ids below it are tokens.
    Raises: EngineError for an answer that is not what was asked for: nothing may be trained on it.
    """
    count = 1 if sampling.temperature is None else sampling.group_size
    if len(answers) != len(asked):
        raise EngineError(
            f"cppo.rollouts: vLLM answered {len(answers)} of {len(asked)} questions; "
            "nothing of them is used"
        )
    rows: list[Choice] = []
    for question, choices in enumerate(answers):
        if len(choices) != count:
            raise EngineError(
                f"cppo.rollouts: vLLM returned {len(choices)} of {count} completions of a "
                f"question (number {question} of {len(asked)}); nothing of them is used"
            )
        for choice in choices:
            wrong = _wrong(choice, sampling, vocab)
            if wrong:
                raise EngineError(
                    f"cppo.rollouts: a completion of vLLM {wrong} (question {question} of "
                    f"{len(asked)}); nothing of them is used"
                )
            rows += [choice] * (sampling.group_size // count)
    return _padded(rows, sampling.pad)


def _wrong(choice: Choice, sampling: Sampling, vocab: int) -> str:
    """What is wrong with a completion; nothing: empty."""
    ids, logps = choice
    if not 1 <= len(ids) <= sampling.max_new_tokens:
        return f"has {len(ids)} tokens, asked for 1 to {sampling.max_new_tokens}"
    if len(logps) != len(ids):
        return f"has {len(ids)} tokens and {len(logps)} log-probabilities"
    outside = [token for token in ids if not (isinstance(token, int) and 0 <= token < vocab)]
    if outside:
        return f"has the token {outside[0]!r}, and the model has {vocab}"
    never = set(sampling.suppressed) & set(ids)
    if never:
        return f"has the token {min(never)}, which is never to be sampled"
    strange = [value for value in logps if not (math.isfinite(value) and value <= _HIGHEST)]
    if strange:
        return f"has a log-probability of {strange[0]}"
    closing = [token in sampling.closing for token in ids]
    if any(closing[:-1]):
        return f"goes on behind the token {ids[closing.index(True)]} that ends it"
    if not closing[-1] and len(ids) < sampling.max_new_tokens:
        return (
            f"breaks off after {len(ids)} of {sampling.max_new_tokens} tokens without an end: the "
            "longest that vLLM takes (max_model_len) is shorter than prompt and completion, or the "
            "request was aborted"
        )
    return ""


def _padded(rows: Sequence[Choice], pad: int) -> Sampled:
    width = max((len(row.token_ids) for row in rows), default=0)
    tokens = torch.full((len(rows), width), pad)
    logps = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        tokens[number, : len(row.token_ids)] = torch.tensor(list(row.token_ids))
        logps[number, : len(row.token_ids)] = torch.tensor(list(row.logps))
    return Sampled(tokens, logps)
