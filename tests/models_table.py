"""The tables of docs/models.md, from what the tiny models of the tests show.

python tests/models_table.py            # writes them into docs/models.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import transformers
from families import FAMILIES as TEXT_FAMILIES
from families import is_known, tiny_family
from vision_families import FAMILIES, tiny_vision

from cppo.model.ways import choose_ways, shown_picture
from cppo.views import cuts_patches

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_5": "Qwen3.5",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "smolvlm": "SmolVLM2",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "paligemma": "PaliGemma",
    "mistral3": "Mistral 3, Pixtral",
    "glm4v": "GLM-4V",
}
# Whose processor class transformers has only with torchvision, and whose needs another package.
NEEDS = {"mistral3": "needs torchvision", "smolvlm": "needs num2words"}


QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def tested_in(file: str) -> set[str]:
    """The families that a file of tests names in its FAMILIES; it may import what is not here."""
    source = (PAGE.parents[1] / "tests" / file).read_text("utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES":
            return {*eval(ast.unparse(node.value), {}), *QWEN_VL}
    raise AssertionError(file)


def text_families() -> dict[str, list[str]]:
    """The text families by how they are run."""
    found: dict[str, list[str]] = {"packed": [], "padded": [], "refused": []}
    for family in filter(is_known, TEXT_FAMILIES):
        try:
            ways = choose_ways(tiny_family(family, window=5), "sdpa")
        except ValueError:
            found["refused"].append(family)
        else:
            found["packed" if ways.text else "padded"].append(family)
    return found


def row(family: str) -> str:
    """What is found out about one family that takes images."""
    model, processor = tiny_vision(family)
    ways = choose_ways(model, "sdpa", shown=shown_picture(model, processor))
    way = {True: "packed", False: "padded"}
    views = "patches" if cuts_patches(processor.image_processor) else "pictures"
    cells = [NAMES[family], f"`{family}`", way[ways.text], way[ways.images], views]
    in_vllm = family in tested_in("real_vllm/test_image_families.py")
    in_trl = family in tested_in("test_integrations_trl_pictures.py")
    cells += ["tested" if in_vllm else "[which](rollouts.md#models-that-take-images)"]
    cells += ["tested" if in_trl else "no"]
    return " | ".join([*cells, NEEDS.get(family, "")])


def tables() -> dict[str, str]:
    """What stands between each pair of marks in the page."""
    names = ["", "`model_type`", "text", "with images", "views made of"]
    names += ["vLLM", "contrast in TRL", "processor"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    rows = "\n".join(f"| {row(family)} |" for family in FAMILIES)
    listed = {how: ", ".join(f"`{one}`" for one in names) for how, names in text_families().items()}
    text = "\n".join(f"| {how} | {names} |" for how, names in listed.items())
    return {
        "images": f"{head}\n{rows}",
        "text": f"| | `model_type` |\n|---|---|\n{text}",
        "version": f"(transformers {transformers.__version__})",
    }


def rendered(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in tables().items():
        marks = rf"(<!-- models: {name} -->\n).*?(\n<!-- /models -->)"
        page, count = re.subn(marks, lambda m, t=table: m[1] + t + m[2], page, flags=re.S)
        assert count == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text("utf-8")), "utf-8")
