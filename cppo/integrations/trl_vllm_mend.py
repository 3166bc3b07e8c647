"""What goes wrong between TRL and vLLM on the way of weights and images, mended where it does."""

from __future__ import annotations

import warnings
from typing import Any


def mend(trainer: Any) -> None:
    """Mend the vLLM of a trainer, if it has one. Its server is known to the main process alone."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        return
    client, llm = (getattr(generation, name, None) for name in ("vllm_client", "llm"))
    if client is not None and hasattr(generation.model, "peft_config"):
        mend_adapters(generation)
    token = getattr(trainer.processing_class, "image_token_id", None)
    token = getattr(trainer, "_image_pad_token_id", None) if token is None else token
    if token is None:
        return
    mend_features(generation)
    if llm is not None:
        mend_tokens(llm, token)
    if client is not None:
        mend_logprobs(client)


def mend_adapters(generation: Any) -> None:
    """Send a server the weights that LoRA's are merged into.

    vLLM packs up to 1 GiB of them after the last was taken, when TRL (1.16) has undone the merge in
    place: it sends those of the checkpoint, in silence. A copy keeps what was taken.
    """
    iterate = getattr(generation, "_iter_named_params", None)  # older TRL sends one by one
    if iterate is not None:
        generation._iter_named_params = lambda: (
            (name, weight.clone()) for name, weight in iterate()
        )


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
