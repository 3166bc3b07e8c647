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
    broken_by: str | None = None

    def load_weights_of_file(self, path: str) -> int:
        """Takes over the weights of a safetensors file, named as on the hub; returns their number.

        vLLM's caches are not reset here: that is the caller's part (`vllm_server`).
        Raises: RuntimeError for weights that vLLM does not take, and ever after: it had taken a
            part of them and has packed others, from which it does not find back.
        """
        if self.broken_by is not None:
            raise RuntimeError(
                f"restart the server: it took a part of the weights; {self.broken_by}"
            )
        weights = load_file(path)
        try:
            self.reload_weights(weights_iterator=list(weights.items()))
        except BaseException as error:
            self.broken_by = f"{type(error).__name__}: {error}"
            raise
        return len(weights)
