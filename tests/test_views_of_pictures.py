"""Views of pictures, prepared anew by a processor: the same picture, whatever it comes as."""

import copy
import functools
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import config, fixed_batch, fixed_rollouts, question
from vision_families import tiny_vision
from vision_pictures import picture

from cppo.model.image_views import views_need_pictures
from cppo.rollouts.rollout import take_questions
from cppo.train.balance import balanced
from cppo.train.views import perturbed_images
from cppo.views import cuts_patches, differ_in_pixels_alone
from cppo.views.pictures import prepared_views, seen_size

_built = functools.cache(tiny_vision)


def unchanged(pixels, generator):
    return pixels


def half_transparent():
    image = picture(60, 32, 1)
    image.putalpha(Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (32, 1))))
    return image


def turned_by_exif():
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    picture(56, 56, 1).save(file, "PNG", exif=exif)
    return Image.open(file)


PICTURES = {
    "colours": lambda: picture(60, 32, 1),
    "grey": lambda: picture(60, 32, 1).convert("L"),
    "palette": lambda: picture(60, 32, 1).convert("P"),
    "transparent": half_transparent,
    "grey and transparent": lambda: half_transparent().convert("LA"),
    "16 bits": lambda: Image.fromarray(np.arange(56 * 28, dtype=np.uint16).reshape(28, 56) * 7),
    "EXIF": turned_by_exif,
    "one pixel high": lambda: picture(400, 4, 1).resize((400, 1)),
}


@pytest.mark.parametrize("family", ["llava", "gemma3", "smolvlm"])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_view_is_of_the_picture_that_the_processor_sees(family, kind):
    image_processor = _built(family)[1].image_processor
    image = PICTURES[kind]()

    def prepare(images):
        return torch.as_tensor(
            image_processor(images=[images], return_tensors="pt")["pixel_values"]
        )

    view = prepared_views(
        [image], [unchanged], seeds=[0], image_processor=image_processor, prepare=prepare
    )
    torch.testing.assert_close(view, prepare([image]), rtol=0, atol=0.02)


def test_what_a_processor_does_is_found_out_anew_when_its_settings_change():
    image_processor = copy.deepcopy(_built("llava")[1].image_processor)
    assert seen_size(image_processor, (60, 32)) == (52, 28)
    image_processor.size = {"shortest_edge": 56}
    assert seen_size(image_processor, (60, 32)) == (105, 56)
    image_processor.do_resize = False
    assert seen_size(image_processor, (60, 32)) == (60, 32)
    patches = copy.deepcopy(_built("qwen2_5_vl")[1].image_processor)
    assert cuts_patches(patches)
    patches.image_mean = None
    assert not cuts_patches(patches)


def test_views_may_differ_in_all_that_are_pixels():
    own = {"pixel_values": torch.zeros(1, 3), "pixel_values_local": torch.zeros(4, 3)}
    own["image_sizes"] = torch.ones(2)
    view = {name: value + 1 for name, value in own.items()} | {"image_sizes": torch.ones(2)}
    assert differ_in_pixels_alone(view, own) and not differ_in_pixels_alone(
        view | {"image_sizes": torch.zeros(2)}, own
    )


class OneOfTwo:
    """A process, run by a thread beside the other."""

    size = 2

    def __init__(self, rank, told, meet):
        self.rank, self._told, self._meet = rank, told, meet

    def gather(self, value):
        self._told[self.rank] = pickle.dumps(value)
        self._meet.wait(60)
        found = [pickle.loads(own) for own in self._told]
        self._meet.wait(60)
        return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_questions_that_move_to_another_process_keep_what_their_views_are_made_of(family):
    model, processor = _built(family)
    asked = [question("How many?", [picture(60, 32, i)], answer=str(i)) for i in range(4)]
    whole = fixed_rollouts(model, processor, asked)
    batches = [fixed_batch(take_questions(whole, own)) for own in ([0, 1, 2], [3])]
    needed = views_need_pictures(processor)
    told, meet = [None, None], threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        even = list(
            threads.map(
                lambda rank: balanced(batches[rank], OneOfTwo(rank, told, meet), pictures=needed),
                range(2),
            )
        )
    moved = even[1].rollouts.prompts.questions[-1]
    assert len(even[1].advantages) == 4 and not moved.columns
    assert bool(moved.images) == needed == (family == "llava")
    # Views that no seed changes: a question has another number there.
    options = config(positive_views=[unchanged], negative_views=[unchanged])
    view, _ = perturbed_images(even[1], [0, 1], options, processor)
    for found, own in zip(view.prepared, even[1].rollouts.prompts.images.prepared, strict=True):
        torch.testing.assert_close(found["pixel_values"], own["pixel_values"], rtol=0, atol=0.02)
