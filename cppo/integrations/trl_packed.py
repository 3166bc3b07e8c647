"""TRL's forward without padding: a model that takes TRL's padded batch and runs it packed.

    padded   TRL: model(input_ids (B, L), attention_mask, images, ...)
    packed   every row's own tokens, one row after the other, in one stream
    shared   the rows of a question have their prompt, and its images, in common

TRL builds the arguments of the model and reads its outputs; `Packed` stands between the two. What
runs is the model that TRL has, wrapped as it is, with TRL's own LM head.
"""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.integrations.trl_rows import Batch, joined, take_rows
from cppo.model.check import check_model
from cppo.model.forward import set_attention, stream_arguments
from cppo.model.images import image_token_mask, rotary_positions
from cppo.model.limits import PositionLimit, position_limit
from cppo.model.shared_prompts import share_prompts
from cppo.model.ways import shown_picture
from cppo.ops.pack import pack_completions
from cppo.ops.packed_batch import PackedBatch

# Arguments of the model that packing does not change.
_SAME = ("fused_lm_head",)
# They say where the images are, which is read off the ids here.
_DROPPED = ("mm_token_type_ids",)

IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_sizes",
    "image_position_ids",
    "spatial_shapes",
)
Image = dict[str, Tensor]  # arguments of the model; of all images of a row, if they have no grid
Images = list[list[Image]]  # those of each row


def prepare(trainer: Any) -> PositionLimit | None:
    """Give the trainer's models the attention of packed sequences, and check that they are right.

    Returns: how long a sequence may be; None: as long as it likes.
    Raises: ValueError for a model that cannot be packed.
    """
    if any(hasattr(p, "ds_id") for p in trainer.model.parameters()):
        raise ValueError(
            "cppo.integrations.trl: pack and share_prompts compare the packed forward with the "
            "model's own, which DeepSpeed ZeRO-3 has cut into shards already: load the model "
            "before the GRPOConfig is made"
        )
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            # FSDP and DeepSpeed leave it on the CPU until training begins.
            plain, device = trainer.accelerator.unwrap_model(model), trainer.accelerator.device
            set_attention(plain, "auto", device)
    has_images = _has_images(trainer)
    shown = shown_picture(trainer.model, trainer.processing_class) if has_images else None
    try:
        check_model(trainer.model, shares=trainer.cppo.share_prompts, shown=shown)
    except ValueError as error:
        raise ValueError(
            "cppo.integrations.trl: pack and share_prompts are not for this model, leave them off: "
            + str(error).removeprefix("cppo: ")
        ) from error
    return position_limit(trainer.model)


def _has_images(trainer: Any) -> bool:
    """Whether the dataset's columns or its first prompt have images; True if that is not known."""
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None) or ()
    if not columns or {"image", "images"} & {*columns} or not hasattr(dataset, "__len__"):
        return True
    prompt = dataset[0].get("prompt")
    contents = [own.get("content") for own in prompt if isinstance(own, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") == "image" for part in parts)


class Packed:
    """Stands for `model` in one call of TRL's `_get_per_token_logps_and_entropies`.

    Args:
        call: the arguments of that call. TRL may cut its rows into several calls of the model,
            in order.
        limit: how long a sequence may be.
    """

    def __init__(self, trainer: Any, call: Batch, limit: PositionLimit | None) -> None:
        self.model, self._limit = call["model"], limit
        self._plain = trainer.accelerator.unwrap_model(self.model)
        self._shares = trainer.cppo.share_prompts
        self._length = call["logits_to_keep"]
        self._counts = {
            name: list(call[name]) for name in ("num_images", "num_tiles") if call.get(name)
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Any:
        images, given = self._images(len(input_ids), given)
        attended, start = attention_mask.bool(), input_ids.shape[1] - self._length
        sizes = torch.stack([attended.sum(1), attended[:, start:].sum(1)]).tolist()
        order = list(range(len(input_ids)))
        # A completion that is masked as truncated is not in the stream, nor are a tool's images.
        images = first_images(self._plain, images, input_ids, attended)
        asked = first_images(self._plain, images, input_ids[:, :start], attended[:, :start])
        if self._shares:
            prompts = questions(input_ids[:, :start], attended[:, :start], asked)
            order.sort(key=prompts.__getitem__)
        lengths, responses = ([size[row] for row in order] for size in sizes)
        if self._limit is not None:
            self._limit.check(max(lengths))
        is_response = torch.zeros_like(attended)
        is_response[:, start:] = True
        kept = torch.tensor(order, device=input_ids.device)
        stream = pack_completions(
            input_ids, attended, is_response, kept, lengths=(lengths, responses)
        )
        shared = None
        if self._shares:
            # A row keeps the last token of its prompt, which predicts its first own token.
            own = lengths, [response + 1 for response in responses]
            shared = share_prompts(stream, [prompts[row] for row in order], own)
        grids = [image["image_grid_thw"] for own in images for image in own if _has_grid(image)]
        positions = rotary_positions(
            self._plain, input_ids, attention_mask, torch.cat(grids) if grids else None
        )
        if positions is not None:
            positions = positions.flatten(1)[:, stream.token_index]
        arguments, rows = stream_arguments(stream, positions, shared)
        # Where a prompt stands already, only what comes after it is new.
        brings = set(range(len(order)) if shared is None else shared.first)
        shown = [
            image
            for place, row in enumerate(order)
            for image in images[row][0 if place in brings else len(asked[row]) :]
        ]
        return self._run({**arguments, **_joined(shown)}, rows, stream, given)

    def _run(
        self, arguments: dict[str, Any], rows: Tensor, stream: PackedBatch, given: dict[str, Any]
    ) -> Any:
        """What TRL reads off the model's output, at the places where it reads it."""
        extra = {name: given[name] for name in _SAME if name in given}
        if "labels" in given:
            labels = torch.full_like(arguments["input_ids"], -100)
            labels[0, rows + 1] = stream.targets
            output = self.model(**arguments, **extra, labels=labels)
            found = {"log_probs": output.log_probs, "entropy": output.entropy}
            placed = {
                name: None if value is None else stream.unpack(value[0, rows])
                for name, value in found.items()
            }
            return SimpleNamespace(**placed, aux_loss=output.aux_loss)
        # Older TRL computes both from the logits of the completion and of the token before it.
        if "logits_to_keep" in given:
            logits = self.model(**arguments, **extra, logits_to_keep=rows).logits[0]
        else:
            logits = self.model(**arguments, **extra).logits[0, rows]
        count, length = stream.shape
        row, column = stream.target_index // length, stream.target_index % length
        column = column - (length - self._length)
        whole = logits.new_zeros(count, self._length + 1, logits.shape[-1])
        return SimpleNamespace(logits=whole.index_put((row, column), logits))

    def _images(self, count: int, given: dict[str, Any]) -> tuple[Images, dict[str, Any]]:
        """The images of the next `count` rows, and the other arguments.

        Raises: ValueError for an argument with something per token or image that is not known.
        """
        given = {name: value for name, value in given.items() if name not in _DROPPED}
        batch = {name: given.pop(name) for name in IMAGE_ARGUMENTS if name in given}
        unknown = [
            name for name, value in given.items() if isinstance(value, Tensor) and name != "labels"
        ]
        if unknown:
            raise ValueError(
                "cppo.integrations.trl: pack and share_prompts know input_ids, attention_mask and "
                f"{', '.join(IMAGE_ARGUMENTS)}, got {' and '.join(unknown)}"
            )
        for name, each in self._counts.items():
            batch[name], self._counts[name] = each[:count], each[count:]
        return row_images(batch, count), given


def questions(prompts: Tensor, mask: Tensor, images: Images) -> list[int]:
    """A number per row, equal for rows of the same prompt and the same images.

    Args:
        prompts, mask: (B, P).
        images: those of the prompts.
    """
    same = prompts.masked_fill(~mask.bool(), -1).unique(dim=0, return_inverse=True)[1].tolist()
    found: list[tuple[int, list[Image]]] = []
    numbers = []
    for text, own in zip(same, images, strict=True):
        number = next(
            (i for i, (other, image) in enumerate(found) if text == other and _equal(own, image)),
            len(found),
        )
        if number == len(found):
            found.append((text, own))
        numbers.append(number)
    return numbers


def row_images(batch: Batch, rows: int) -> Images:
    """The images of each row of a TRL batch: one by one if they have grids, else all of a row."""
    counts = batch.get("num_images")
    if not counts or batch.get("pixel_values") is None:
        return [[] for _ in range(rows)]
    grids = batch.get("image_grid_thw")
    if grids is not None:
        pixels = batch["pixel_values"].split(grids.prod(1).tolist())
        images = (
            {"pixel_values": own, "image_grid_thw": grid[None]}
            for own, grid in zip(pixels, grids, strict=True)
        )
        return [list(islice(images, count)) for count in counts]
    from trl.trainer.utils import split_pixel_values_by_grid

    names = (*IMAGE_ARGUMENTS, "num_images", "num_tiles")
    split = split_pixel_values_by_grid({n: batch[n] for n in names if batch.get(n) is not None})
    fields = {name: split[name] for name in IMAGE_ARGUMENTS if name in split}
    return [
        [{n: v[row] if isinstance(v, list) else v[row : row + 1] for n, v in fields.items()}]
        if count
        else []
        for row, count in enumerate(counts)
    ]


def first_images(model: Any, images: Images, ids: Tensor, mask: Tensor) -> Images:
    """The first images of each row, as many as stand in these columns of it.

    Images without grids are those of the prompt, which every row has whole.
    Args: ids, mask: (B, L); each image is one run of its token.
    """
    if not any(_has_grid(image) for own in images for image in own):
        return images
    stands = image_token_mask(model, ids) & mask.bool()
    counts = (stands & ~F.pad(stands, (1, 0))[:, :-1]).sum(1).tolist()
    return [own[:count] for own, count in zip(images, counts, strict=True)]


def together(model: Any, batches: list[Batch], window: int) -> list[Batch]:
    """The same micro-batches with rows dealt anew, so that the rows of a question meet.

    Args: window: micro-batches among which rows may change places, those of an optimizer step.
    """
    return [
        batch
        for first in range(0, len(batches), window)
        for batch in _dealt(model, batches[first : first + window])
    ]


def _dealt(model: Any, batches: list[Batch]) -> list[Batch]:
    whole = joined(batches, pad=0)
    ids, mask = whole["prompt_ids"], whole["prompt_mask"]
    images = row_images(whole, len(ids))
    numbers = torch.tensor(questions(ids, mask, first_images(model, images, ids, mask)))
    order = numbers.sort(stable=True).indices.to(ids.device)
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    return [take_rows(whole, rows) for rows in order.split(sizes)]


def _has_grid(image: Image) -> bool:
    return "image_grid_thw" in image


def _equal(ones: list[Image], others: list[Image]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(value, other[name])
        for one, other in zip(ones, others, strict=True)
        for name, value in one.items()
    )


def _joined(images: list[Image]) -> dict[str, Tensor]:
    """The model's arguments for these images, in the order of their places."""
    names = images[0] if images else ()
    return {name: torch.cat([image[name] for image in images]) for name in names}
