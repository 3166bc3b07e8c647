"""A plugin of pytest: TRL's tests, with a GRPOTrainer of ours in place of TRL's.

    pytest -p plugin --variant pruned --outcomes FILE TRL_CHECKOUT/tests/test_grpo_trainer.py

FILE gets what became of each test and, where it trained, a digest of what it ended with: every
number that was logged and every parameter.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before pytest puts the checkout in front: the TRL that is tested is the one that is installed.
import trl
from text_models import QWEN_3_5_FIRST, QWEN_FIRST, numbers
from trl import GRPOTrainer, import_utils

from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.options.trainer import LossConfig

ALONE = LossConfig(cpl_coef=0)
VARIANTS: dict[str, CPPO | None] = {
    "plain": None,
    "off": CPPO(trim=False, loss=ALONE),
    "pruned": CPPO(prune_rate=0.5, loss=ALONE),
    "late": CPPO(prune_rate=0.5, early=False, loss=ALONE),
    "contrast": CPPO(loss=LossConfig(cpl_coef=1.0)),
}
# Of a training that sets no number itself; most of TRL's have 51. The one test that counts its
# steps has several iterations.
STEPS = 6
TIMES = ("time", "runtime", "per_second")  # logged, and never the same twice


def _lacks(name: str) -> Callable[[], bool]:
    """A checkout older than the installed TRL may ask for a package that TRL has given up."""
    if not name.startswith("is_") or not name.endswith("_available"):
        raise AttributeError(name)
    return lambda: False


import_utils.__getattr__ = _lacks  # type: ignore[method-assign]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--variant", choices=VARIANTS, default="plain")
    parser.addoption("--outcomes", type=Path)


class Translated:
    """torch, for tests that write completions as token numbers of Qwen's tokenizers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, data: Any, **options: Any) -> torch.Tensor:
        here = numbers()
        rows = [[here.get(token, token) for token in row] for row in data]
        return torch.tensor(rows, **options)


def trainer_class(options: CPPO | None, digests: list[str]) -> type:
    """TRL's trainer with these options, which notes what its runs end with."""
    bases: Any = (GRPOTrainer,) if options is None else (CPPOMixin, GRPOTrainer)

    class Trainer(*bases):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            more = {} if options is None else {"cppo": options}
            config = kwargs.get("args")
            is_short = config is None or config.max_steps > 0 or config.num_iterations > 1
            if not is_short and kwargs.get("train_dataset") is not None:
                config.max_steps = STEPS
            super().__init__(*args, **kwargs, **more)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            digests.append(digest(self))
            return result

    Trainer.__name__ = Trainer.__qualname__ = "GRPOTrainer"
    return Trainer


def digest(trainer: Any) -> str:
    sha = hashlib.sha256()
    for row in trainer.state.log_history:
        sha.update(repr([x for x in row.items() if not any(t in x[0] for t in TIMES)]).encode())
    for name, value in trainer.model.named_parameters():
        sha.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


@pytest.fixture(autouse=True)
def replaced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    digests: list[str] = []
    options = VARIANTS[request.config.getoption("--variant")]
    monkeypatch.setattr(request.module, "GRPOTrainer", trainer_class(options, digests))
    source = inspect.getsource(request.function)
    if any(str(number) in source for number in (QWEN_FIRST + 2, QWEN_3_5_FIRST + 2)):
        monkeypatch.setattr(request.module, "torch", Translated())
    if "EOS token is extremely low" in source:
        monkeypatch.chdir("whole")
    yield
    request.node.user_properties.append(("digests", digests))


class Outcomes:
    """What became of each test; with several processes, the first gets all reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.of: dict[str, dict[str, Any]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        mine = self.of[report.nodeid.split("::", 1)[1]]
        if report.when == "call" or report.outcome != "passed":
            mine["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                words = crash.message if crash else str(report.longrepr)
                mine["why"] = next(line for line in words.splitlines() if line.strip())
            elif report.skipped and isinstance(report.longrepr, tuple):
                mine["why"] = report.longrepr[2]
        if report.when == "teardown":
            mine |= dict(report.user_properties)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.of, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path))
    folder = Path(trl.__file__).parent
    assert folder.parent != config.rootpath, f"the installed TRL is wanted, not that of {folder}"
