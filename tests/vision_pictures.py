"""What the tests of models that take images have in common."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)


def prepared(processor, text, images):
    """What transformers' processor makes of a question."""
    parts = [{"type": "image", "image": one} for one in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    inputs.pop("labels", None)
    return inputs


def answer_logits(model, inputs, answer):
    """(L, V) logits of an answer's L tokens by transformers, after a question of `prepared`."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in more:  # an answer is text; to PaliGemma it is what follows the prefix
            value = int(model.config.model_type == "paligemma")
            more[name] = F.pad(more[name], (0, len(answer)), value=value)
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    return logits[0, -len(answer) - 1 : -1]
