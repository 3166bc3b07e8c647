"""The LM head on tiles of rows: logits = hidden @ weight^T + bias, and its gradients.

A tile is (rows, V) and lives as long as its statistics and gradients take: `TILE_BYTES` is the one
number that bounds the memory of the fused head. Every product is a vendor GEMM. The gradient of
the weight is accumulated over the tiles in fp32 and cast once, that of a hidden row is one product
over the whole vocabulary.

CPUs without bf16 arithmetic multiply bf16 and fp16 at a small fraction of the speed of fp32: there
a slice of the weight at a time is multiplied in fp32, and the weight is never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# On a GPU a tile of 1024 rows of a vocabulary of 150,000 keeps the GEMM at its full rate; on a CPU
# 128 MiB are 220 rows of it in fp32.
TILE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
SLICE_BYTES = 8 << 20  # of the fp32 copy of a part of the weight


def multiplies_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GEMM in this dtype is fast here."""
    if device.type != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


class Head:
    """One LM head during one call, and the sums of its gradients.

    Args:
        weight: (V, D).
        bias: (V,) or None.
        wants_weight, wants_bias: whether their gradients are accumulated; a frozen head costs no
            product for them.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        wants_weight: bool = False,
        wants_bias: bool = False,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.native = multiplies_natively(weight.dtype, weight.device)
        self.accumulator = torch.promote_types(weight.dtype, torch.float32)
        self.grad_weight = self._new_zeros(weight) if wants_weight else None
        self.grad_bias = self._new_zeros(bias) if wants_bias and bias is not None else None

    def _new_zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape, dtype=self.accumulator)

    @property
    def rows_per_tile(self) -> int:
        """Rows whose logits fit the tile."""
        bytes_per_logit = (
            self.weight if self.native else self.weight.new_empty(0).float()
        ).itemsize
        budget = TILE_BYTES.get(self.weight.device.type, TILE_BYTES["cuda"])
        return max(1, budget // (self.weight.shape[0] * bytes_per_logit))

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in fp32, a part of the vocabulary at a time."""
        step = max(1, SLICE_BYTES // (4 * max(1, self.weight.shape[1])))
        for first in range(0, self.weight.shape[0], step):
            part = slice(first, first + step)
            yield part, self.weight[part].float()

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) of (rows, D); fp32 where this CPU multiplies in fp32."""
        if self.native:
            logits = F.linear(hidden, self.weight)
            # A bias is added in fp32, as by the specification.
            return logits if self.bias is None else logits.to(self.accumulator) + self.bias
        wide = hidden.float()
        logits = wide.new_empty(len(hidden), self.weight.shape[0])
        for part, weight in self._slices():
            torch.mm(wide, weight.t(), out=logits[:, part])
        return logits if self.bias is None else logits.add_(self.bias)

    def backward(self, grad_logits: Tensor, hidden: Tensor, wants_hidden: bool) -> Tensor | None:
        """The gradient of these rows of hidden, (rows, D) in fp32; adds to those of the head."""
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.accumulator)
        if self.native:
            grad_logits = grad_logits.to(self.weight.dtype)
            if self.grad_weight is not None:
                self._add_weight_gradient(grad_logits, hidden)
            return (grad_logits @ self.weight).to(self.accumulator) if wants_hidden else None
        wide = hidden.float()
        grad_hidden = torch.zeros_like(wide) if wants_hidden else None
        for part, weight in self._slices():
            tile = grad_logits[:, part]
            if grad_hidden is not None:
                grad_hidden.addmm_(tile, weight)
            if self.grad_weight is not None:
                self.grad_weight[part].addmm_(tile.t(), wide)
        return grad_hidden

    def _add_weight_gradient(self, grad_logits: Tensor, hidden: Tensor) -> None:
        assert self.grad_weight is not None
        if grad_logits.dtype == self.accumulator:
            self.grad_weight.addmm_(grad_logits.t(), hidden)
            return
        step = max(1, (32 << 20) // (4 * max(1, hidden.shape[1])))
        for first in range(0, len(self.grad_weight), step):
            part = slice(first, first + step)
            columns = grad_logits[:, part].t()
            if hidden.is_cuda:
                self.grad_weight[part] += torch.mm(columns, hidden, out_dtype=self.accumulator)
            else:
                self.grad_weight[part] += columns @ hidden
