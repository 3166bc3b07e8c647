"""A folder that stands in for the hub in TRL's tests: tiny random models and TRL's own data sets.

    python hub.py FOLDER TRL_CHECKOUT

Models and data sets lie under the hub's names. Tests that run in FOLDER find them there:
`from_pretrained` and `load_dataset` look for a folder of that name first. The data sets are what
TRL's scripts write. The models' weights are random and their vocabularies small; in FOLDER/whole
Qwen2.5 has as many tokens as the real one, for a test that wants no completion to end by chance.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import models
import numpy as np
from datasets import DatasetDict

NAME = "trl-internal-testing"
DATA = ("zen", "zen_image", "zen_multi_image")


def write_data(hub: Path, checkout: Path) -> None:
    """Run TRL's scripts that make its data sets; what they would upload is written here."""
    configs: dict[Path, list[str]] = defaultdict(list)

    def write(dataset: DatasetDict, repo_id: str, config_name: str = "default") -> None:
        folder = hub / repo_id
        configs[folder].append(config_name)
        for split, rows in dataset.items():
            path = folder / config_name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)

    upload, DatasetDict.push_to_hub = DatasetDict.push_to_hub, write
    for name in DATA:
        np.random.seed(0)
        script = _module(checkout / "scripts" / f"generate_{name}_dataset.py")
        script.main(0.1, True, f"{NAME}/{name.replace('_', '-')}")
    DatasetDict.push_to_hub = upload
    for folder, names in configs.items():
        lines = ["---", "configs:"]
        for config in names:
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in ("train", "test"):
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _module(path: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_hubs(folder: Path, checkout: Path) -> None:
    """FOLDER, and FOLDER/whole, which differs in Qwen2.5."""
    write_data(folder, checkout)
    models.write_all(folder / NAME)
    whole = folder / "whole" / NAME
    models.write_whole(whole)
    for path in (folder / NAME).iterdir():
        if not (whole / path.name).exists():
            (whole / path.name).symlink_to(path.absolute())


if __name__ == "__main__":
    write_hubs(Path(sys.argv[1]), Path(sys.argv[2]))
