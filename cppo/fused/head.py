"""The LM head on tiles of rows: logits = hidden @ weight^T + bias, perhaps capped; its gradients.

A tile is (rows, V) and lives as long as its statistics and gradients take: `TILE_BYTES` is the one
number that bounds the memory of the fused head. Every product is a vendor GEMM. The gradient of
the weight is accumulated over the tiles in fp32 and cast once, that of a hidden row is one product
over the whole vocabulary.

A CPU has no product of bf16 with an fp32 result, and many have none of bf16: there a slice of the
weight at a time is copied to fp32; the weight is never copied whole. Each slice is multiplied with
hidden^T, and the product, transposed, becomes a part of the logits, in fp32. With the few rows of a
tile that is faster than one product with the whole weight^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# On a GPU 1 GiB is 3500 rows of a vocabulary of 150,000 in bf16: enough that a product costs more
# than the pass over the fp32 gradient of the weight that it is added to (twice V D 4 bytes; at the
# rates of an H200 as long as the product of 750 rows). In fp32, with a gradient in bf16 beside it,
# it is 1170 rows. A tile for the L2 cache would have 150 rows.
# On a CPU 128 MiB are 208 rows in fp32: nearly as fast as a larger product.
TILE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# What a call of `linear_token_stats` keeps until its backward, which then computes three products
# and not four: on a GPU 8800 rows of a vocabulary of 150,000 in bf16 and 2900 in fp32, of which the
# products need a copy in bf16; on a CPU one tile. Calls whose backward is still to come add up.
KEPT_BYTES = {"cpu": 128 << 20, "cuda": 5 << 29}
SLICE_BYTES = 4 << 20  # of a part of the weight in fp32
# Floats of AVX-512: with a number of rows that is no multiple of it a CPU's product in fp32 takes a
# sixth longer, and with 2 to 15 rows twice as long as with 16.
VECTOR = 16


def multiplies_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GEMM in this dtype is fast here."""
    if device.type != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def dtype_of_logits(
    weight: Tensor, bias: Tensor | None, softcap: float | None, logits_dtype: str
) -> torch.dtype:
    """That of a tile: the weight's where logits are rounded to it and not changed any more."""
    rounded = logits_dtype == "input" and bias is None and softcap is None
    if rounded and multiplies_natively(weight.dtype, weight.device):
        return weight.dtype
    return torch.promote_types(weight.dtype, torch.float32)


def keeps_logits(
    rows: int, weight: Tensor, bias: Tensor | None, softcap: float | None, logits_dtype: str
) -> bool:
    """Whether the logits of so many rows may stay until their gradient is written into them."""
    dtype = dtype_of_logits(weight, bias, softcap, logits_dtype)
    # A GPU multiplies a copy of the gradient in the weight's dtype.
    beside = weight.itemsize if weight.is_cuda and dtype != weight.dtype else 0
    needed = rows * len(weight) * (dtype.itemsize + beside)
    budget = KEPT_BYTES.get(weight.device.type, KEPT_BYTES["cuda"])
    return softcap is None and needed <= budget  # a cap has a second tile, its slope


def even(count: int, room: int) -> int:
    """The size of the fewest pieces that hold `count` rows, none of which has more than `room`:
    as equal as can be, since a piece reads the whole weight however small it is."""
    pieces = math.ceil(count / room)
    size = math.ceil(count / max(1, pieces))
    return max(1, min(room, math.ceil(size / VECTOR) * VECTOR))


class Head:
    """One LM head during one call, and the sums of its gradients.

    Args:
        weight: (V, D).
        bias: (V,) or None.
        suppressed: (K,) int64, tokens whose logits are -inf, or None.
        softcap: c of c * tanh(logits / c), or None. A capped tile has a second one beside it for
            the slope of the cap, and therefore half the rows.
        logits_dtype: "input" rounds logits to the dtype of the weight, "fp32" does not.
        wants_weight, wants_bias: whether their gradients are accumulated; a frozen head costs no
            product for them.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        suppressed: Tensor | None = None,
        softcap: float | None = None,
        logits_dtype: str = "fp32",
        wants_weight: bool = False,
        wants_bias: bool = False,
    ) -> None:
        self.weight, self.bias, self.suppressed, self.softcap = weight, bias, suppressed, softcap
        self.never = None
        if bias is not None and softcap is not None:
            self.never = bias.isneginf().nonzero()[:, 0]
        self.accumulator = torch.promote_types(weight.dtype, torch.float32)
        self.rounds = logits_dtype == "input" and weight.dtype != self.accumulator
        self.on_cpu = weight.device.type == "cpu"
        native = self.rounds and multiplies_natively(weight.dtype, weight.device)
        self.sliced = self.on_cpu and not native
        self.dtype = dtype_of_logits(weight, bias, softcap, logits_dtype)
        self.wants_weight = wants_weight
        self.multiplies_once = False  # all rows are in one tile: its product is the gradient
        self._grad_weight: Tensor | None = None  # until the first product
        self.grad_bias = self._new_zeros(bias) if wants_bias and bias is not None else None

    def _new_zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape, dtype=self.accumulator)

    @property
    def grad_weight(self) -> Tensor | None:
        """(V, D), the sum so far; None where it is not wanted."""
        if self.wants_weight and self._grad_weight is None:
            self._grad_weight = self._new_zeros(self.weight)
        return self._grad_weight

    @property
    def rows_per_tile(self) -> int:
        """Rows whose logits fit the tile."""
        bytes_per_logit = self.dtype.itemsize
        if not self.sliced and self.dtype != self.weight.dtype:
            bytes_per_logit += self.weight.dtype.itemsize  # of a tile beside it, for the products
        budget = TILE_BYTES.get(self.weight.device.type, TILE_BYTES["cuda"])
        rows = budget // (self.weight.shape[0] * bytes_per_logit)
        rows = max(1, rows if self.softcap is None else rows // 2)
        return rows if rows < VECTOR else rows - rows % VECTOR

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(n,) in the fewest pieces whose logits fit a tile."""
        return rows.split(even(len(rows), self.rows_per_tile)) if len(rows) else ()

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the accumulator's dtype, a part of the vocabulary at a time."""
        step = max(1, SLICE_BYTES // (4 * max(1, self.weight.shape[1])))
        for first in range(0, self.weight.shape[0], step):
            part = slice(first, first + step)
            yield part, self.weight[part].to(self.accumulator)

    def _new_tile(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, V), every row at a multiple of 16 bytes: GPUs read and write others slowly."""
        size = self.weight.shape[0]
        if not self.weight.is_cuda:
            return self.weight.new_empty((rows, size), dtype=dtype)
        unit = 16 // dtype.itemsize
        return self.weight.new_empty(rows, -(-size // unit) * unit, dtype=dtype)[:, :size]

    def _product(self, hidden: Tensor) -> Tensor:
        """hidden @ weight^T in the dtype of the logits."""
        if self.sliced:
            return self._product_by_slices(hidden)
        tile = self._new_tile(len(hidden), self.dtype)
        if tile.dtype == hidden.dtype:  # asked of the tile: `DoublePrecision` makes both fp64
            return torch.mm(hidden, self.weight.t(), out=tile)
        if not self.rounds:
            return torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=tile)
        rounded = self._new_tile(len(hidden), hidden.dtype)
        return tile.copy_(torch.mm(hidden, self.weight.t(), out=rounded))

    def _product_by_slices(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        padded = rows if rows == 1 else math.ceil(rows / VECTOR) * VECTOR
        states = hidden.new_zeros(hidden.shape[1], padded, dtype=self.accumulator)
        states[:, :rows] = hidden.t()
        logits = self._new_tile(rows, self.accumulator)
        for part, weight in self._slices():
            product = torch.mm(weight, states)[:, :rows].t()
            logits[:, part] = product.to(self.weight.dtype) if self.rounds else product
        return logits

    def rows_of(self, tile: Tensor, places: Tensor) -> Tensor:
        """A copy of some rows."""
        return torch.index_select(tile, 0, places, out=self._new_tile(len(places), tile.dtype))

    def stacked(self, tiles: list[Tensor]) -> Tensor:
        """The rows of several tiles in one."""
        if len(tiles) == 1:
            return tiles[0]
        rows = sum(map(len, tiles))
        return torch.cat(tiles, out=self._new_tile(rows, tiles[0].dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) of (rows, D), in `dtype`."""
        logits = self._product(hidden)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        # The tokens that a bias of -inf rules out stay ruled out by a cap.
        for tokens in (self.never, self.suppressed):
            if tokens is not None:
                logits.index_fill_(1, tokens, -torch.inf)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the cap, from capped logits; None without a cap."""
        if self.softcap is None:
            return None
        # Not negative: at a logit of -inf no gradient arrives, and 0 * -inf would be NaN.
        return (logits / self.softcap).square_().neg_().add_(1).clamp_(min=0)

    def backward(self, grad_logits: Tensor, hidden: Tensor, wants_hidden: bool) -> Tensor | None:
        """The gradient of these rows of hidden, (rows, D) in fp32; adds to those of the head."""
        if self.suppressed is not None:
            # They are constants, also where one of them is a target.
            grad_logits.index_fill_(1, self.suppressed, 0)
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.accumulator)
        # Of a head with a bias or a cap they are in fp32, and a CPU multiplies them as they are:
        # in bf16 they would be less exact than those of eager now and then.
        if not self.on_cpu and grad_logits.dtype != self.weight.dtype:
            tile = self._new_tile(len(grad_logits), self.weight.dtype)
            grad_logits = tile.copy_(grad_logits)
        if self.wants_weight:
            self._add_weight_gradient(grad_logits, hidden)
        return self._gradient_of_hidden(grad_logits) if wants_hidden else None

    def _gradient_of_hidden(self, grad_logits: Tensor) -> Tensor:
        if grad_logits.is_cuda and grad_logits.dtype != self.accumulator:
            # Summed in fp32 throughout; rounded to bf16 between its parts a product would be less.
            return torch.mm(grad_logits, self.weight, out_dtype=self.accumulator)
        if grad_logits.dtype == self.weight.dtype:
            if self.sliced and len(grad_logits) % VECTOR == 0:
                # As the logits: faster with whole vectors of rows, and 30 times slower with two.
                return torch.mm(self.weight.t(), grad_logits.t()).t()
            return (grad_logits @ self.weight).to(self.accumulator)
        total = grad_logits.new_zeros(len(grad_logits), self.weight.shape[1])
        for part, weight in self._slices():
            total.addmm_(grad_logits[:, part], weight)
        return total

    def _add_weight_gradient(self, grad_logits: Tensor, hidden: Tensor) -> None:
        columns, is_first = grad_logits.t(), self._grad_weight is None
        if self._grad_weight is None:
            once = self.multiplies_once and grad_logits.dtype == self.weight.dtype
            dtype = self.weight.dtype if once else self.accumulator
            self._grad_weight = torch.empty_like(self.weight, dtype=dtype)
        total = self._grad_weight
        if grad_logits.dtype == self.accumulator:
            states = hidden.to(self.accumulator)
            torch.addmm(total, columns, states, beta=0 if is_first else 1, out=total)
        elif hidden.is_cuda:
            if total.dtype == hidden.dtype:
                torch.mm(columns, hidden, out=total)
            elif is_first:
                torch.mm(columns, hidden, out_dtype=self.accumulator, out=total)
            else:
                torch.addmm(total, columns, hidden, out_dtype=self.accumulator, out=total)
        else:
            # A part at a time, which is converted and added while it is in the cache.
            step = max(1, SLICE_BYTES // (4 * max(1, hidden.shape[1])))
            for first in range(0, len(total), step):
                part = slice(first, first + step)
                product = (columns[part] @ hidden).to(total.dtype)
                if is_first:
                    total[part] = product
                else:
                    total[part] += product
