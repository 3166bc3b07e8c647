"""torchvision beside a CPU build of torch.

Its wheel is built for CUDA: its C library does not load, and the declaration of fake kernels then
fails for want of the operators. Only their schemas are declared here: what processors use of
torchvision is plain torch.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any

_MODULE = "torchvision.extension"
_OPERATORS = ("nms", "qnms")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            if not module._has_ops():
                import torch

                module._schemas = torch.library.Library("torchvision", "DEF")
                for operator in _OPERATORS:
                    arguments = "Tensor dets, Tensor scores, float iou_threshold"
                    module._schemas.define(f"{operator}({arguments}) -> Tensor")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
