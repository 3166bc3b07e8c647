"""Rewards and perturbations that ship here, as a configuration names them.

"boxed"    {"rotation": {"degrees": 5}}    {"length": {"unit": "tokens"}, "weight": 0.5}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.options.values import unknown


def require_entries(where: str, what: str, entries: Any) -> None:
    """Raise TypeError for entries that are not a list, ValueError for an empty one."""
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise TypeError(f"{where}: entries must be a list, got {entries!r}")
    if not entries:
        raise ValueError(f"{where}: entries must name at least one {what}")


def name_and_parameters(where: str, entry: Any, option: str | None = None) -> tuple[Any, Any]:
    """Return the name and the parameters of an entry; None for parameters left out.

    Args:
        where: the beginning of messages.
        entry: a name, or a mapping of one name to its parameters.
        option: a further key that a mapping may have ("weight").
    Raises: TypeError for anything else.
    """
    if isinstance(entry, str):
        return entry, None
    names = [key for key in entry if key != option] if isinstance(entry, Mapping) else []
    if len(names) != 1:
        form = "{name: parameters" + (f", {option!r}: number" if option else "") + "}"
        raise TypeError(f"{where}: an entry is a name or {form}, got {entry!r}")
    return names[0], entry[names[0]]


def check_parameters(where: str, name: str, given: Any, allowed: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a name as a dictionary, empty for None.

    Raises: TypeError for something else than a mapping, ValueError for an unknown parameter, with
        the nearest one that there is.
    """
    if not isinstance(given, (Mapping, type(None))):
        raise TypeError(f"{where}: the parameters of {name!r} must be a mapping, got {given!r}")
    given = dict(given or {})
    if given and not allowed:
        raise ValueError(f"{where}: {name!r} takes no parameters, got {given!r}")
    for key in given:
        if key not in allowed:
            raise ValueError(f"{where}: {unknown(f'parameter of {name!r}', key, allowed)}")
    return given


def build(where: str, kind: Any, name: str, parameters: Any) -> Any:
    """Return an instance of a dataclass; lists become tuples, as its fields have them."""
    allowed = [field.name for field in dataclasses.fields(kind)]
    values = check_parameters(where, name, parameters, allowed)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
