"""What a vLLM server's workers need so that weights reach them by a file.

`vllm serve --worker-extension-cls cppo.rollouts.vllm_worker.FileWeights`: vLLM mixes the class into
its worker, in every process of the server. cppo must be installed there.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file


class FileWeights:
    """Mixed into vLLM's worker, whose `reload_weights` it calls."""

    reload_weights: Any

    def load_weights_of_file(self, path: str) -> int:
        """Takes over the weights of a safetensors file, named as on the hub; returns their number.

        vLLM's caches are not reset here: that is the caller's part (`vllm_server`).
        """
        weights = load_file(path)
        self.reload_weights(weights_iterator=list(weights.items()))
        return len(weights)
