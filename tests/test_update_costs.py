"""What surrounds an update costs little: the clock, the exchange of gradients, the optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from trainer_cases import config, same, tiny, trainer_for, weights_of

from cppo.train import processes
from cppo.train.policy import Policy
from cppo.train.progress import PhaseTimer

GPU = torch.device("cuda:1")


class Stream:
    """A GPU that runs behind the host: what it was given is done `behind` seconds later."""

    def __init__(self) -> None:
        self.now, self.synchronized = 0.0, 0
        self.events: list[Any] = []


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    own = Stream()

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert device == GPU and enable_timing
            own.events.append(self)

        def record(self, stream: Any) -> None:
            assert stream is own  # of the timer's device, not of the current one
            self.at = own.now

        def synchronize(self) -> None:
            own.synchronized += 1

        def elapsed_time(self, end: Any) -> float:
            assert own.synchronized
            return 1e3 * float(end.at - self.at)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(
        torch.accelerator, "current_stream", lambda device: own if device == GPU else None
    )
    return own


def test_phases_of_a_gpu_are_what_its_stream_took(stream: Stream) -> None:
    timer = PhaseTimer({"forward": 1.0, "step": 10.0}, GPU)
    for seconds in (2.0, 3.0):
        with timer("forward"):
            stream.now += seconds
        stream.now += 100.0  # outside of every phase
    with pytest.raises(KeyError), timer("backward"):
        stream.now += 4.0
        raise KeyError
    assert len(stream.events) == 6 and stream.synchronized == 0  # nobody has waited yet
    assert timer.seconds == {"forward": 6.0, "backward": 4.0}
    found = timer.metrics()
    assert found["time/forward"] == 6.0 and found["time/backward"] == 4.0
    assert 10.0 < found["time/step"] < 11.0  # the host's


def test_phases_of_a_cpu_are_the_hosts(stream: Stream) -> None:
    timer = PhaseTimer(device=torch.device("cpu"))
    with timer("reward"):
        stream.now += 5.0
    assert stream.events == [] and 0 <= timer.seconds["reward"] < 1


def test_gradients_are_exchanged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def doubled(flat: torch.Tensor) -> None:  # the other process has the same gradients
        sizes.append(flat.nbytes)
        flat.mul_(2)

    def counted(_: processes.Processes, own: list[float]) -> list[float]:
        return [count + (number == 1) for number, count in enumerate(own)]

    monkeypatch.setattr(processes.dist, "all_reduce", doubled)
    monkeypatch.setattr(processes.Processes, "sum", counted)
    monkeypatch.setattr(processes, "BUCKET_BYTES", 100)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=2, is_main_process=True, is_local_main_process=True
    )
    accelerator.device = torch.device("cpu")
    shapes = [(3, 5), (10,), (4, 25), (2,), (1, 1), (7, 3), (5,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    expected: list[torch.Tensor] = []
    for number, p in enumerate(parameters):
        p.grad = torch.randn(p.shape) if number % 3 != 1 else None
        expected.append(torch.zeros_like(p) if p.grad is None else 2 * p.grad)
    skipped = parameters[4]  # no process has a gradient of it, where one process would not step
    parameters[2].grad = parameters[2].grad.T.contiguous().T  # type: ignore[union-attr]
    processes.Processes(accelerator, 1.0).sum_gradients(parameters)  # type: ignore[arg-type]
    found = [p.grad for p in parameters if p is not skipped]
    assert skipped.grad is None and all(map(torch.equal, found, expected[:4] + expected[5:]))
    assert sizes == [100, 400, 92, 20]  # a gradient larger than a bucket goes by itself


def adamw(policy: Policy, **options: Any) -> torch.optim.AdamW:
    own = policy.config
    return torch.optim.AdamW(
        policy.parameters,
        lr=own.learning_rate,
        betas=own.betas,
        weight_decay=own.weight_decay,
        **options,
    )


def stepped(policy: Policy, optimizer: Any, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in policy.parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return weights_of(policy.model)


def test_adamw_is_fused_and_steps_as_the_plain_one() -> None:
    policies = [Policy(*tiny("text"), config(), torch.device("cpu")) for _ in range(3)]
    assert policies[0].optimizer.param_groups[0]["fused"] is True
    first, again = (stepped(p, p.optimizer, range(4)) for p in policies[:2])
    plain = stepped(policies[2], adamw(policies[2], foreach=False), range(4))
    assert same(first, again)
    assert max((first[n] - plain[n]).abs().max().item() for n in plain) < 1e-7


def test_the_state_of_a_plain_adamw_is_taken_over() -> None:
    """Checkpoints from before the fused one go on as they would have."""
    old, new = (Policy(*tiny("text"), config(), torch.device("cpu")) for _ in range(2))
    plain = adamw(old)
    stepped(old, plain, range(2))
    new.model.load_state_dict(old.model.state_dict())
    new.optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert same(stepped(old, plain, range(2, 4)), stepped(new, new.optimizer, range(2, 4)))


def test_a_trainers_phases_are_timed_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Timer(PhaseTimer):
        def __init__(self, before: Any, device: torch.device) -> None:
            made.append(device)
            super().__init__(before, device)

    monkeypatch.setattr("cppo.train.trainer.PhaseTimer", Timer)
    trainer = trainer_for(tmp_path)
    trainer.train_step()
    assert made == [trainer.accelerator.device]
