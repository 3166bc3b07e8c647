"""`vllm serve --worker-extension-cls cpu_worker.OnACpu`: a worker that takes weights on a CPU."""

import cpu_transport
import vllm._custom_ops

cpu_transport.install()
# vLLM's plain weights, for TRL to write into; it would pack them.
vllm._custom_ops._supports_onednn = False


class OnACpu:
    """Adds nothing: vLLM imports this module with it, before it makes the worker."""
