"""What the package takes from PyTorch that PyTorch does not promise: all of it is in this table.

Each entry has a test of what is needed of it, so that a release that moves it fails here, by name,
and not in a training run. Those of Triton are in test_triton_launch.py.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import cppo

CHECKED_WITH = "2.13"
PACKAGE = Path(cppo.__file__).parent
# A private name of torch, however it was imported.
PRIVATE = re.compile(
    r"\b(?:torch|forward_ad)(?:\.\w+)*\.(_[A-Za-z]\w*(?:\.\w+)*)"
    r"|from torch(?:\.\w+)*\.(_\w+) import (\w+)|from torch(?:\.\w+)* import (_\w+)"
)


def a_call_below_autograd_makes_no_graph():
    """Why: register_autograd of torch.library takes longer than many kernels."""
    x = torch.ones(2, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        y = x * 2
    assert y.grad_fn is None and (x * 2).grad_fn is not None


def a_backward_knows_whether_its_graph_is_kept():
    """Why: the gradient of the head is scaled in place where nobody can ask for it again."""
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            found.append(torch._C._autograd._get_current_graph_task_keep_graph())
            return grad

    y = Look.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert found == [True, False]


def a_transform_of_functions_shows():
    """Why: the kernels have no derivative under torch.func, and say so."""
    seen = []

    def f(x):
        seen.append(torch._C._are_functorch_transforms_active())
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    assert seen == [True] and not torch._C._are_functorch_transforms_active()


def forward_mode_has_a_level():
    """Why: the same for forward mode; entering it costs nothing to ask for."""
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    assert forward_ad._current_level == -1


def a_cpu_says_how_it_multiplies_bf16():
    """Why: without that arithmetic the head multiplies slices in fp32."""
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def every_dropout_has_one_base():
    """Why: a policy's own dropout is off in the update, as it is in sampling."""
    kinds = (torch.nn.Dropout, torch.nn.Dropout2d, torch.nn.AlphaDropout)
    assert all(issubclass(kind, torch.nn.modules.dropout._DropoutNd) for kind in kinds)


def a_dispatch_mode_sees_every_op():
    """Why: a model's arithmetic in fp64 without a copy of the model."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Names():
        torch.ones(2).add(1)
    assert names == ["ones", "add"]


TABLE = {
    "_AutoDispatchBelowAutograd": a_call_below_autograd_makes_no_graph,
    "_get_current_graph_task_keep_graph": a_backward_knows_whether_its_graph_is_kept,
    "_are_functorch_transforms_active": a_transform_of_functions_shows,
    "_current_level": forward_mode_has_a_level,
    "_is_avx512_bf16_supported": a_cpu_says_how_it_multiplies_bf16,
    "_is_amx_tile_supported": a_cpu_says_how_it_multiplies_bf16,
    "_DropoutNd": every_dropout_has_one_base,
    "_python_dispatch.TorchDispatchMode": a_dispatch_mode_sees_every_op,
}
# A module that is looked for in sys.modules, and is not called.
NAMED = {"_dynamo"}


@pytest.mark.parametrize("holds", sorted(set(TABLE.values()), key=lambda f: f.__name__))
def test_what_is_needed_of_a_private_interface_holds(holds):
    try:
        holds()
    except (AttributeError, AssertionError, ImportError) as error:
        raise AssertionError(
            f"PyTorch {torch.__version__} moved a private interface (checked with {CHECKED_WITH}): "
            f"{holds.__doc__} {error}"
        ) from error


def test_every_private_interface_is_in_the_table():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for match in PRIVATE.finditer(path.read_text()):
            attribute, module, name, direct = match.groups()
            private = attribute or (f"{module}.{name}" if module else direct)
            found.setdefault(private, path.relative_to(PACKAGE))
    missing = {name: str(path) for name, path in found.items() if name not in {*TABLE, *NAMED}}
    assert not missing, f"private interfaces of torch without a test here: {missing}"
    assert set(TABLE) <= set(found), f"no longer used: {set(TABLE) - set(found)}"
