"""What vLLM is asked, and what of its answers may be trusted: the same in process and over HTTP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from cppo.model.prompts import Prompts
from cppo.rollouts.engine import EngineError
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.seeds import seed_from

# vLLM allows no other sign for "never": e^-100 of a token's weight is left.
_NEVER = -100.0
# Rounding may bring a log-probability above 0.
_HIGHEST = 1e-2


class Request(NamedTuple):
    """One question.

    token_ids: of its prompt, with one token for each image: vLLM writes as many as an image has
        patches by itself, and would write them for each placeholder of an expanded prompt.
    images: in their order.
    seed: of its completions.
    """

    token_ids: list[int]
    images: list[Image.Image]
    seed: int


class Choice(NamedTuple):
    """One completion of an answer, its closing token included."""

    token_ids: Sequence[int]
    logps: Sequence[float]


def requests(
    prompts: Prompts, sampling: Sampling, draws: Draws, image_token: int | None
) -> list[Request]:
    """A request for each question.

    Args:
        image_token: the placeholder of a patch; None: of a text model.
    Raises: EngineError where the images of a prompt cannot be told apart.
    """
    found = []
    for number, question in enumerate(prompts.questions):
        ids = prompts.input_ids[number][prompts.attention_mask[number]].tolist()
        if question.images and image_token is not None:
            ids = _one_per_image(ids, image_token, len(question.images))
        row = draws.own.start + number * sampling.group_size
        # vLLM adds the number of the completion to it.
        found.append(Request(ids, question.images, seed_from(draws.seed, row) % 2**62))
    return found


def _one_per_image(ids: list[int], image_token: int, images: int) -> list[int]:
    runs = itertools.groupby(ids, lambda token: token == image_token)
    parts = [[image_token] if is_image else list(run) for is_image, run in runs]
    short = [token for part in parts for token in part]
    if short.count(image_token) != images:
        raise EngineError(
            f"cppo.rollouts: a prompt with {images} images has {short.count(image_token)} runs of "
            "the image's token: vLLM cannot tell them apart; put text between the images"
        )
    return short


def sampling_arguments(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams`: the plain softmax, whatever the checkpoint says.

    Log-probabilities are those of the sampled tokens alone. A greedy completion is asked for once,
    because its copies are equal.
    """
    is_greedy = sampling.temperature is None
    return {
        "n": 1 if is_greedy else sampling.group_size,
        "temperature": 0.0 if is_greedy else sampling.temperature,
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
    outside = [token for token in ids if not 0 <= token < vocab]
    if outside:
        return f"has the token {outside[0]}, and the model has {vocab}"
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
