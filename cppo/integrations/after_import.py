"""Hooks that wait until somebody else's module is imported, and look before they reach into it.

A plugin that imports what it patches slows down every process that loads it, and decides too early
which device another plugin was about to provide. A hook here costs nothing until its module is
imported, and then runs on it only if what it calls there has the parameters that it knows.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from cppo.integrations.fit import Fit, parameters

_logger = logging.getLogger(__name__)


class Hook(NamedTuple):
    """One thing to do to a module.

    part: what it is, in words. module: dotted name. expected: {attribute of the module, dotted for
    a method: its first parameters, separated by spaces}. install: called with the module, once.
    """

    part: str
    module: str
    expected: dict[str, str]
    install: Callable[[Any], None]

    def fit(self) -> Fit:
        """Whether the imported module has what is expected."""
        for attribute, wanted in self.expected.items():
            try:
                found = parameters(attrgetter(attribute)(sys.modules[self.module]))
            except AttributeError:
                return Fit(self.part, False, f"{self.module} has no {attribute}")
            if found[: len(wanted.split())] != wanted.split():
                why = f"{attribute}: expected ({wanted}), found ({' '.join(found)})"
                return Fit(self.part, False, why)
        return Fit(self.part, True, self.module)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs each hook right after the code of its module has run, or at once if it already has.

    Args: hooks: in the order in which they run.
    """

    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = hooks
        self.results: dict[str, Fit] = {}
        self._finding = False
        sys.meta_path.insert(0, self)
        for name in {hook.module for hook in hooks} & set(sys.modules):
            self._run(name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The ordinary spec of `name`, whose loader also runs the hooks."""
        if self._finding or all(hook.module != name for hook in self.hooks):
            return None
        self._finding = True
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:
            self._finding = False
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
        """Import every module and return how its hooks fit."""
        fits = []
        for hook in self.hooks:
            try:
                importlib.import_module(hook.module)
            except Exception as error:  # an optional part, or something that it needs
                fits.append(Fit(hook.part, False, f"{hook.module} cannot be imported: {error}"))
            else:
                fits.append(self.results[hook.part])
        return fits
