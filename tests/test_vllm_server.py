"""A vLLM server that goes wrong: each fault ends in words, or in a bounded retry."""

from __future__ import annotations

import base64
import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import CLOSING, GENERATE, IMAGE, VOCAB, FakeVLLM, hangs_up, is_silent, restarts, says
from PIL import Image
from vllm_cases import engine, sample, synced, vllm, weights

from cppo.rollouts.engine import EngineError, StaleWeights

__all__ = ["vllm"]


def test_all_completions_come_in_the_order_of_the_questions(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    many = 150  # more than are in flight at once
    sampled = sample(found, questions=many)
    firsts = {
        len(body["token_ids"]): body["sampling_params"]["seed"] % 10 + 10
        for path, body in vllm.requests
        if path == GENERATE
    }
    assert len(firsts) == many
    wanted = [[firsts[q + 1], 10 + n, CLOSING] for q in range(many) for n in range(2)]
    assert sampled.tokens.tolist() == wanted
    assert sampled.logps.tolist() == [[-0.5 * (n + 1)] * 3 for _ in range(many) for n in range(2)]
    assert torch.equal(sample(found, questions=many).tokens, sampled.tokens)


def test_images_are_sent_without_a_loss_and_once_each(vllm: FakeVLLM, tmp_path: Path) -> None:
    sample(synced(vllm, tmp_path), questions=1, images=2)
    (body,) = [body for path, body in vllm.requests if path == GENERATE]
    assert body["token_ids"] == [4, IMAGE, IMAGE, 5]
    for number, part in enumerate(body["content_parts"]):
        data = part["url"].removeprefix("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert part["type"] == "image_url" and image.getpixel((3, 3)) == (number, 0, 0)


def test_nothing_is_sampled_before_the_first_sync(vllm: FakeVLLM) -> None:
    with pytest.raises(StaleWeights, match="sync them first"):
        sample(engine(vllm))


# 1
def test_no_server() -> None:
    vllm = FakeVLLM()
    with pytest.raises(EngineError) as caught:
        engine(vllm, start_timeout=0.1)
    words = str(caught.value)
    assert f"no vLLM server at {vllm.address} within start_timeout = 0.1 s" in words
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL" in words and f"--port {vllm.port}" in words


def test_a_server_that_comes_up_late_is_waited_for() -> None:
    vllm = FakeVLLM()
    threading.Timer(0.2, vllm.start).start()
    try:
        found = engine(vllm)
        assert "waiting for the vLLM server" in found.said[0]  # type: ignore[attr-defined]
    finally:
        vllm.stop()


# 2
def test_a_broken_connection_is_made_again(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    wanted = sample(found)
    vllm.faults[GENERATE].extend([hangs_up, hangs_up])
    assert torch.equal(sample(found).tokens, wanted.tokens)
    assert "breaks off" in found.said[-1]  # type: ignore[attr-defined]


def test_a_server_that_dies_and_stays_away(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path, start_timeout=0.3)
    vllm.faults[GENERATE].append(restarts(after=20))
    with pytest.raises(EngineError, match="no vLLM server at .* within start_timeout = 0.3 s"):
        sample(found)


# 3, 12
def test_a_refusal_is_not_repeated_and_says_what_the_server_says(
    vllm: FakeVLLM, tmp_path: Path
) -> None:
    found = synced(vllm, tmp_path)
    vllm.faults[GENERATE].append(says(400, "The decoder prompt (length 9) is too long"))
    with pytest.raises(EngineError, match=r"refuses .* \(400\): The decoder prompt \(length 9\)"):
        sample(found, questions=1)
    assert vllm.paths == [GENERATE]


def test_a_prompt_that_is_too_long_is_not_sent(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    with pytest.raises(EngineError, match="197 tokens and 4 new ones .* 200 .*--max-model-len"):
        sample(found, questions=197)
    assert vllm.paths == []


# 4
def test_a_late_answer(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path, request_timeout=0.2, retries=1)
    vllm.faults[GENERATE].append(is_silent)
    assert len(sample(found).tokens) == 6
    vllm.faults[GENERATE].extend([is_silent] * 6)
    with pytest.raises(EngineError, match="does not answer within request_timeout = 0.2 s .* 2 tr"):
        sample(found)


# 5
def test_an_error_of_the_server_may_pass(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    vllm.faults[GENERATE].extend([says(503, "busy"), says(500, "oops")])
    assert len(sample(found, questions=1).tokens) == 2
    assert vllm.paths == [GENERATE] * 3
    vllm.faults[GENERATE].extend([says(500, "oops")] * 3)
    with pytest.raises(EngineError, match="answers 500: oops .*in 3 tries"):
        sample(found, questions=1)


# 6, 7, 11 and answers of another vLLM
def _drop_choice(answer: Any) -> Any:
    return {**answer, "choices": answer["choices"][:1]}


def _in_choice(**changes: Any) -> Any:
    def change(answer: Any) -> Any:
        first, *others = answer["choices"]
        return {**answer, "choices": [{**first, **changes}, *others]}

    return change


def _logps(*values: float) -> Any:
    return _in_choice(logprobs={"content": [{"token_id": 1, "logprob": v} for v in values]})


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop_choice, "returned 1 of 2 completions"),
        (_in_choice(token_ids=[]), "has 0 tokens"),
        (_in_choice(logprobs=None), "another form than vLLM 0.32"),
        (_logps(-1, -1), "3 tokens and 2 log-probabilities"),
        (_logps(-1, float("nan"), -1), "log-probability of nan"),
        (_logps(-1, -9999.0, -1), "log-probability of nan"),
        (_logps(-1, "none", -1), "another form than vLLM 0.32 does .ValueError"),
        (_logps(-1, 0.5, -1), "log-probability of 0.5"),
        (_in_choice(token_ids=[VOCAB, 11, CLOSING]), "the token 50, and the model has 50"),
        (_in_choice(token_ids=[10.5, 11, CLOSING]), "the token 10.5, and the model has 50"),
        (_in_choice(token_ids=["10", 11, CLOSING]), "the token '10', and the model has 50"),
        (_in_choice(weight_versions=[{"version": None}]), "sampled with the weights 'None', not"),
        (_in_choice(token_ids=[3, 11, CLOSING]), "the token 3, which is never to be sampled"),
        (_in_choice(token_ids=[10, 11, 12]), "breaks off after 3 of 4 tokens"),
        (_in_choice(token_ids=[CLOSING, 11, 12]), "goes on behind the token 2"),
        (_in_choice(weight_versions=None), "another form than vLLM 0.32"),
        (lambda answer: [answer], "another form than vLLM 0.32"),
        (
            lambda answer: {**answer, "prompt_token_ids": [4, 4]},
            "a prompt of 2 tokens of ours of 1",
        ),
    ],
)
def test_an_answer_that_was_not_asked_for_is_never_used(
    vllm: FakeVLLM, tmp_path: Path, change: Any, words: str
) -> None:
    found = synced(vllm, tmp_path)
    vllm.changes[GENERATE] = change
    with pytest.raises(EngineError, match=words):
        sample(found, questions=1)
    assert vllm.paths == [GENERATE]


def test_an_image_that_is_expanded_otherwise(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    vllm.changes[GENERATE] = lambda answer: {
        **answer,
        "prompt_token_ids": answer["prompt_token_ids"] + [IMAGE],
    }
    with pytest.raises(EngineError, match=r"of 6 tokens of ours of 5 \(4 and 3 of them of images"):
        sample(found, questions=1, images=1)


# 8
def test_other_weights_are_stale(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    wanted = sample(found)
    engine(vllm, tmp_path).sync(weights(5.0))  # another trainer takes the server
    with pytest.raises(StaleWeights, match="not with those of the last sync"):
        sample(found)
    with pytest.raises(StaleWeights, match="sync them first"):
        sample(found)
    found.sync(weights())
    assert torch.equal(sample(found).tokens, wanted.tokens)


def test_a_completion_of_two_versions_or_of_none_is_stale(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    for names, said in (((found.version, "other"), "'other'"), ((), "''")):
        spans = [{"version": name, "start": 0, "end": 1} for name in names]
        vllm.changes[GENERATE] = _in_choice(weight_versions=spans)
        with pytest.raises(StaleWeights, match=f"the weights {said}, not"):
            sample(found)
        vllm.changes.clear()
        found.sync(weights())


def test_a_server_that_restarts_in_a_rollout_has_stale_weights(
    vllm: FakeVLLM, tmp_path: Path
) -> None:
    found = synced(vllm, tmp_path)
    wanted = sample(found)
    vllm.faults[GENERATE].append(restarts(after=0.1))
    with pytest.raises(StaleWeights, match="'default'"):
        sample(found, questions=1)
    found.sync(weights())
    assert torch.equal(sample(found).tokens, wanted.tokens)


# 10
def test_garbage_may_pass(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    vllm.faults[GENERATE].extend([lambda _: (200, b"<html>proxy</html>")] * 2)
    assert len(sample(found, questions=1).tokens) == 2
    vllm.faults[GENERATE].extend([lambda _: (200, b'{"choices": [')] * 3)
    with pytest.raises(EngineError, match=r"something that is not JSON: \{\"choices\": \["):
        sample(found, questions=1)


# 13
def test_a_server_without_its_options(vllm: FakeVLLM) -> None:
    info = "/server_info?config_format=json"
    vllm.faults[info].append(lambda _: (404, b'{"detail": "Not Found"}'))
    with pytest.raises(EngineError, match=r"(?s)\(404\): Not Found.*VLLM_SERVER_DEV_MODE=1 vllm s"):
        engine(vllm)
    vllm.faults[info].append(lambda _: (200, b'{"vllm_config": "a text"}'))
    with pytest.raises(EngineError, match="does not describe itself as vLLM 0.32 does"):
        engine(vllm)


def test_a_server_that_takes_no_tokens(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    vllm.faults[GENERATE].append(says(403, "Scale-out endpoints are disabled."))
    with pytest.raises(EngineError, match=r"(?s)Scale-out endpoints .* --enable-scale-out"):
        sample(found)


# 14
@pytest.mark.parametrize(
    "part, name, value, words",
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "--logprobs-mode raw_logprobs, not pro"),
        ("parallel_config", "worker_extension_cls", "", "not cppo.rollouts.vllm_worker.FileW"),
        ("model_config", "max_model_len", 32, "max_model_len is 40, .* takes 32"),
    ],
)
def test_a_server_with_other_options(
    vllm: FakeVLLM, part: str, name: str, value: Any, words: str
) -> None:
    vllm.options[part][name] = value  # type: ignore[index]
    with pytest.raises(EngineError, match=words):
        engine(vllm, max_model_len=40)


def test_what_the_server_has_is_said(vllm: FakeVLLM) -> None:
    said = engine(vllm).said  # type: ignore[attr-defined]
    assert "has tiny in float32, 200 tokens at most" in said[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_rollout_at_once(vllm: FakeVLLM, tmp_path: Path, number: int) -> None:
    found = synced(vllm, tmp_path, request_timeout=30)
    vllm.faults[GENERATE].extend([is_silent] * 3)
    threads = {thread for thread in threading.enumerate() if not thread.daemon}

    def end(*_: Any) -> None:
        raise SystemExit(1)

    before = signal.signal(signal.SIGTERM, end)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.daemon = True
    start = time.monotonic()
    try:
        timer.start()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            sample(found)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 1.3
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads


def test_sleep_is_asked_for_only_if_it_is_wanted(vllm: FakeVLLM) -> None:
    for wanted in (False, True):
        found = engine(vllm, sleep=wanted)
        vllm.requests.clear()
        found.sleep()
        found.wake()
        found.close()
        assert vllm.paths == (["/sleep?level=1", "/wake_up"] if wanted else [])
