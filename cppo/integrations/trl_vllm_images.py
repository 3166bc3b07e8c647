"""Images that TRL sends to vLLM: what goes wrong between the two, mended where it does."""

from __future__ import annotations

import warnings
from typing import Any


def mend(trainer: Any) -> None:
    """Mend TRL's vLLM, if the trainer has one and its model sees images."""
    generation = getattr(trainer, "vllm_generation", None)
    token = getattr(trainer.processing_class, "image_token_id", None)
    token = getattr(trainer, "_image_pad_token_id", None) if token is None else token
    if generation is None or token is None:
        return
    mend_features(generation)
    if hasattr(generation, "llm"):
        mend_tokens(generation.llm, token)
    if hasattr(generation, "vllm_client"):  # of the main process
        mend_logprobs(generation.vllm_client)


def mend_features(generation: Any) -> None:
    """Make vLLM forget the features of images whenever it gets weights.

    It keeps them by the image, and TRL (1.7 to 1.16; huggingface/trl#7198) resets its cache of
    prefixes alone: an image that comes again is seen with an older vision tower.
    """
    sync = generation.sync_weights

    def mended() -> None:
        sync()
        if hasattr(generation, "llm"):
            reset = getattr(generation.llm.llm_engine, "reset_encoder_cache", None)
            done = reset is not None
            if reset is not None:
                reset()
        elif hasattr(generation, "vllm_client"):
            client = generation.vllm_client
            done = client.session.post(f"{client.base_url}/reset_encoder_cache").ok
        else:
            return
        if not done:
            generation.sync_weights = sync
            warnings.warn(
                "cppo.integrations.trl: this vLLM cannot be told to forget the features of images: "
                "one that comes again is seen with the vision tower of an older step "
                "(huggingface/trl#7198), unless that is frozen",
                stacklevel=2,
            )

    generation.sync_weights = mended


def mend_tokens(llm: Any, token: int) -> None:
    """Hand a colocated vLLM each image as one token, which it expands itself.

    TRL (1.7 to 1.16; huggingface/trl#6294) hands it over expanded already, and vLLM expands it once
    more: the model then samples from another prompt than it is trained on. A prompt that has one
    token per image is left alone.
    Raises (at generation): RuntimeError if what vLLM makes of it is not the prompt trained on.
    """
    generate = llm.generate

    def mended(prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        short = [_collapsed(prompt, token) for prompt in prompts]
        outputs = generate(short, *args, **kwargs)
        for prompt, given, output in zip(prompts, short, outputs, strict=True):
            ids = prompt["prompt_token_ids"]
            if given is not prompt and list(output.prompt_token_ids) != list(ids):
                raise RuntimeError(
                    "cppo.integrations.trl: vLLM samples from another prompt than TRL trains on: "
                    f"of an image prompt of {len(ids)} tokens it made "
                    f"{len(output.prompt_token_ids)} (huggingface/trl#6294); use "
                    "vllm_mode='server', or use_vllm=False"
                )
        return outputs

    llm.generate = mended


def _collapsed(prompt: Any, token: int) -> Any:
    """A prompt of vLLM with one token per image; the same object if it has that already."""
    images = prompt.get("multi_modal_data", {}).get("image")
    ids = prompt["prompt_token_ids"]
    count = len(images) if isinstance(images, list) else 1
    if images is None or ids.count(token) == count:
        return prompt
    one_each = [x for x, before in zip(ids, [None, *ids], strict=False) if not x == before == token]
    return {**prompt, "prompt_token_ids": one_each}


def mend_logprobs(client: Any) -> None:
    """Give the log-probabilities of a server's image prompts the names that TRL reads.

    vLLM 0.32 names a token there {"token_id": 7}; TRL 1.16 stops without {"token": "token_id:7"}.
    """
    post = client._post

    def mended(url: str, **kwargs: Any) -> Any:
        answer = post(url, **kwargs)
        if url.endswith("/inference/v1/generate"):
            for choice in answer["choices"]:
                for entry in (choice["logprobs"] or {}).get("content") or ():
                    for each in (entry, *(entry["top_logprobs"] or ())):
                        each.setdefault("token", f"token_id:{each.get('token_id')}")
        return answer

    client._post = mended
