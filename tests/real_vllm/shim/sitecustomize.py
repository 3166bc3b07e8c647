"""torchvision beside a CPU torch, in vLLM's processes: on PYTHONPATH, Python imports it first.

torchvision's wheel on PyPI is built for CUDA: beside a CPU torch its C library does not load, and
the fake kernels of its operators have no schema to belong to. The schemas are declared here; what
processors use of torchvision is plain torch.
"""

import importlib.abc
import importlib.util
import os
import runpy
import sys

_OPERATORS = ("nms", "qnms")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision.extension":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            if not module._has_ops():
                import torch

                module._schemas = torch.library.Library("torchvision", "DEF")
                for operator in _OPERATORS:
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    module._schemas.define(operator + schema)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())

# Another file of this name, which this one hides, has its turn, too.
_own = os.path.dirname(os.path.abspath(__file__))
_others = [os.path.join(place, "sitecustomize.py") for place in sys.path]
_others = [file for file in _others if os.path.dirname(os.path.abspath(file)) != _own]
for _file in [file for file in _others if os.path.isfile(file)][:1]:
    runpy.run_path(_file)
