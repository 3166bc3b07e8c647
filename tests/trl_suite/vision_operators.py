"""Lets PyPI's torchvision be imported beside a torch without CUDA.

Its operators then do not load, and the import fails at the first two that it describes. TRL's tests
call none of them: processors of images and videos only resize. tests/run_trl_suite.sh has its copy
of torchvision import this first, in every process.
"""

import torch

for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", arguments)
