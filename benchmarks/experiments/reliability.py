"""What it costs to be able to go on: checksums, the journal of a step, fingerprints.

    python benchmarks/experiments/reliability.py            this machine
    python benchmarks/experiments/reliability.py --smoke    toy size, writes nothing

A checkpoint of a model of 135 M parameters with AdamW's state is written with and without its
checksums, in turns, and compared with them; a row holds the median, in seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.model.load import quiet
from cppo.train import checkpoint, fingerprint, sealed
from cppo.train.journal import Journal

_ROWS = 7473  # of GSM8K's training data


def model_of(smoke: bool) -> PreTrainedModel:
    """A random model: of toy size, or of SmolLM2-135M's."""
    width, layers, vocabulary = (64, 2, 256) if smoke else (576, 30, 49152)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=1,
        )
    )


def seconds(call: Callable[[], object]) -> float:
    """The time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def checkpoints(smoke: bool, repeats: int) -> dict[str, list[float]]:
    """Times of writing a checkpoint with and without checksums, and of comparing it with them."""
    model = model_of(smoke)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()}

    def write_model(folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)

    hashed = sealed._hash
    times: dict[str, list[float]] = {"save": [], "save without checksums": [], "check": []}
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, 2 * repeats + 3):
            has_checksums = step % 2 == 0
            written = (folder, step, write_model, state, {"metric": None}, 1)
            with patch.object(sealed, "_hash", hashed if has_checksums else lambda path: ""):
                took = seconds(partial(checkpoint.write_checkpoint, *written))
            if step > 2:  # the first of each makes the files' pages
                times["save" if has_checksums else "save without checksums"].append(took)
            if has_checksums:
                newest = Path(folder) / f"checkpoint-{step:06d}"
                times["check"].append(seconds(partial(checkpoint.check_files, newest)))
        size = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    print(f"{size / 1e9:.2f} GB")
    return times


def main() -> None:
    parser = experiment_parser(__doc__, "toy size, writes nothing")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    times = checkpoints(options.smoke, options.repeats)
    journal = Journal()
    times["piece of a step"] = [seconds(lambda: journal.once(int)) for _ in range(1000)]
    rows = [{"prompt": f"What is {i} + {i}? " * 12, "answer": str(2 * i)} for i in range(_ROWS)]
    times["fingerprint of 7,473 rows"] = [
        seconds(lambda: fingerprint.of_dataset(rows)) for _ in range(5)
    ]
    here = environment()
    table = [
        {"what": what, "median_s": f"{statistics.median(values):.3g}", "calls": len(values), **here}
        for what, values in times.items()
    ]
    for row in table:
        print(f"{row['what']:<28} {row['median_s']:>9} s  ({row['calls']})")
    if not options.smoke:
        report.write(results_folder(options.record) / "reliability.csv", table)


if __name__ == "__main__":
    main()
