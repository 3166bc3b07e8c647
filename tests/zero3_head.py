"""What test_heads runs on two processes where DeepSpeed is installed: torchrun tests/zero3_head.py.

An SGD step of rate 1 under ZeRO-3 moves the weights by the mean gradient of the processes.
"""

from __future__ import annotations

import os

import deepspeed
import torch

import cppo
from cppo import LossConfig, Views
from cppo.testing import make_inputs

CONFIGS = (
    LossConfig(cpl_reduction="sequence", cpl_coef=0.5),
    LossConfig(divergence="full", cpl_coef=0.5),
)
ENGINE = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
}


class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 37, bias=False)

    def forward(self, inputs):
        views = Views(*(self.body(view) for view in inputs["hidden"]))
        given = {**inputs, "hidden": views, "weight": self.head.weight, "bias": None}
        return cppo.linear_cppo_loss(**given, config=self.config).loss


def main() -> None:
    rank = int(os.environ["RANK"])
    batches = [make_inputs("linear_cppo_loss", layout="packed", seed=r) for r in range(2)]
    for config in CONFIGS:
        torch.manual_seed(0)
        model = Model(config)
        (sum(model(inputs) for inputs in batches) / 2).backward()
        expected = [p.detach() - p.grad for p in model.parameters()]
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ENGINE)
        loss = engine(batches[rank])
        assert model.head.weight.shape == (0,)
        engine.backward(loss)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            for parameter, moved in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.detach(), moved)
    print("ZeRO-3: all held")


if __name__ == "__main__":
    main()
