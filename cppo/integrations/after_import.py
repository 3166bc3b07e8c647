"""Hooks that wait until another project's module is imported, and check it before they patch it.

A plugin that imports what it patches slows down every process that loads it, and may fix the device
before another plugin provides one. A hook costs nothing until its module is imported, and patches
it only if the functions that it uses there have the parameters that it knows.

wrapt's import hooks would replace `find_spec`, 20 lines. verl loads this plugin wherever cppo is
installed, so wrapt would have to be a dependency of every cppo.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Callable
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from cppo.integrations.fit import Fit, mismatch

_logger = logging.getLogger(__name__)


class Hook(NamedTuple):
    """One patch of a module.

    part: what it is, in words. module: its dotted name. expected: {attribute of the module, dotted
    for a method: its first parameters, separated by spaces}. install: called once, with the module.
    """

    part: str
    module: str
    expected: dict[str, str]
    install: Callable[[Any], None]

    def fit(self) -> Fit:
        """Return whether the imported module has what is expected."""
        for attribute, wanted in self.expected.items():
            try:
                why = mismatch(attrgetter(attribute)(sys.modules[self.module]), wanted)
            except AttributeError:
                return Fit(self.part, False, f"{self.module} has no {attribute}")
            if why:
                return Fit(self.part, False, f"{attribute}: {why}")
        return Fit(self.part, True, self.module)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs each hook right after its module is imported, or at once if it already is.

    Args: hooks: in the order in which they run.
    """

    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = hooks
        self.results: dict[str, Fit] = {}
        sys.meta_path.insert(0, self)
        for name in {hook.module for hook in hooks} & set(sys.modules):
            self._run(name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the ordinary spec of `name`, with a loader that also runs the hooks."""
        if all(hook.module != name for hook in self.hooks):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs: Any = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._run(name)

            spec.loader.exec_module = exec_module
        return spec

    def _run(self, name: str) -> None:
        for hook in self.hooks:
            if hook.module != name or hook.part in self.results:
                continue
            fit = self.results[hook.part] = hook.fit()
            if fit.fits:
                hook.install(sys.modules[name])
            else:
                _logger.warning("cppo: %s", fit)

    def check(self) -> list[Fit]:
        """Import every module and return how the hooks fit."""
        fits = []
        for hook in self.hooks:
            try:
                importlib.import_module(hook.module)
            except Exception as error:  # an optional part of verl, or something that it needs
                fits.append(Fit(hook.part, False, f"{hook.module} cannot be imported: {error}"))
            else:
                fits.append(self.results[hook.part])
        return fits
