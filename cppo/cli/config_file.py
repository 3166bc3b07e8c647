"""Reading a YAML file into a tree of dataclasses, with errors that a user can act on.

Nothing here knows the keys: they are the fields of the dataclass that is asked for. Every mistake
is a ConfigError that names the dotted key, the value and what is allowed.

OmegaConf, jsonargparse and draccus do the same conversion, but of the 65 messages that
tests/test_config.py asks for they give 6, 3 and none, they refuse `1e3` or `none`, and draccus
takes `batch_size=true`. Repeated keys, `extends`, suggestions and limits of size would be ours all
the same, so a library would leave more code here, not less.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cppo.cli.strict_yaml import parse, problem
from cppo.options.values import nearest

_T = TypeVar("_T")
_DEEPEST_KEY = 20
_UNFIT = object()  # what `_as` returns for a value of another type
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_KINDS = {
    **_EXPECTED,
    bool: "true/false",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


class ConfigError(ValueError):
    """A mistake in a configuration file or an override; its text is for the user.

    `key` is the dotted key that it is about, "" for the file as a whole.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


def read(path: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over the file that its `extends:` names.

    Args:
        path: the file; `extends` is relative to its folder.
        seen: the files that extend this one.
    Raises: ConfigError if it cannot be read, is not YAML, repeats a key or is no mapping.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends leads back to the file itself")
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {problem(error)}") from None
    if tree is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, got {_kind(tree)}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must be the name of a file, got {parent!r}")
    return _merge(read(path.parent / parent, (*seen, path.resolve())), tree)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set "key.sub=value" pairs in a tree, values parsed as YAML, and return their keys.

    Raises: ConfigError for an override of another form.
    """
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"an override must be key.sub=value, got {override!r}")
        if key.count(".") >= _DEEPEST_KEY:
            parts = f"at most {_DEEPEST_KEY} parts, got {key.count('.') + 1}: {key:.40}..."
            raise ConfigError(f"the key of an override must have {parts}")
        try:
            value = parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {problem(error)}, got {text!r}") from None
        *parents, last = key.split(".")
        branch = tree
        for part in parents:
            if not isinstance(branch.get(part), dict):
                branch[part] = {}
            branch = branch[part]
        branch[last] = value
        keys.append(key)
    return keys


def build(cls: type[_T], tree: dict[str, Any], key: str = "") -> _T:
    """Return the dataclass `cls` from a mapping, nested dataclasses included.

    Specification: a value is taken as the annotated type of its field: numbers may stand as text
    ("1e-4"), a whole number may be written 1e3, a list becomes a tuple, "none" is None where the
    field allows it. Nothing else is converted.
    Args:
        cls: a dataclass; its own checks raise ValueError("Class.field must be ...").
        tree: the mapping.
        key: dotted place of the mapping in the file.
    Raises: ConfigError for an unknown or missing key, a wrong type or an impossible value.
    """
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in hints:
            raise _unknown(cls, str(name), key, tree[name])
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        given = tree.get(spec.name)
        if spec.name not in tree:
            if spec.default is spec.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{_join(key, spec.name)} is missing", key)
        elif isinstance(given, dict) and spec.default_factory is not dataclasses.MISSING:
            # Keys left out keep the values of the field's default, not those of its class.
            tree = {**tree, spec.name: {**plain(spec.default_factory()), **given}}
    values = {name: _convert(value, hints[name], _join(key, name)) for name, value in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        # "CPPOConfig.prune_rate must be ..." becomes "trainer.prune_rate must be ..."
        message = str(error).replace(f"{cls.__name__}.", f"{key}." if key else "")
        raise ConfigError(message, message.split(" ")[0]) from None


def unknown_keys(cls: type, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the dotted keys of a tree that are none of a dataclass or those in it, with values."""
    known = all_keys(cls)
    parents = {key.rpartition(".")[0] for key in known}

    def unknown(tree: dict[str, Any], key: str) -> list[tuple[str, Any]]:
        found = []
        for name, value in tree.items():
            full = _join(key, str(name))
            if full not in known:
                found.append((full, value))
            elif full in parents and isinstance(value, dict):
                found += unknown(value, full)
        return found

    return unknown(tree, "")


def all_keys(cls: Any, key: str = "") -> list[str]:
    """Return every dotted key of a tree of dataclasses."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        choices: tuple[Any, ...] = (hint, *typing.get_args(hint))
        nested = [t for t in choices if dataclasses.is_dataclass(t)]
        keys += [_join(key, name), *(k for t in nested for k in all_keys(t, _join(key, name)))]
    return keys


def plain(value: Any) -> Any:
    """Return a tree of dataclasses as mappings and lists, which YAML can write."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **over, **both}


def _unknown(cls: type, name: str, key: str, value: Any) -> ConfigError:
    allowed = list(typing.get_type_hints(cls))
    # A key may also be right but one level too high: prune_rate=0.5 for trainer.prune_rate=0.5.
    below = {k.rpartition(".")[2]: k for k in reversed(all_keys(cls, key))}
    full, close = _join(key, name), nearest(name, allowed, cutoff=0.7)
    meant = _join(key, close) if close else below.get(nearest(name, below, cutoff=0.7) or "")
    hint = f"; did you mean {meant}?" if meant else "."
    return ConfigError(
        f"{full} is not a key (its value: {value!r:.60}){hint} Allowed: {', '.join(allowed)}", full
    )


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` of a field, or an error that says what was expected."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if is_union else (hint,)
    if type(None) in choices and value in (None, "none", "None"):
        return None
    kinds = [kind for kind in choices if kind is not type(None)]
    for kind in kinds:
        converted = _as(kind, value, key)
        if converted is not _UNFIT:
            return converted
    expected = " or ".join(dict.fromkeys(map(_expected, kinds)))
    raise ConfigError(f"{key} must be {expected}, got {value!r} ({_kind(value)})", key)


def _as(kind: Any, value: Any, key: str) -> Any:
    """`value` as one type, _UNFIT if it is of another; mistakes inside of it raise ConfigError."""
    args = typing.get_args(kind)
    outer = typing.get_origin(kind) or kind
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build(typing.cast(type, kind), value, key)
    if outer is dict and isinstance(value, dict):
        return _as_mapping(args or (Any, Any), value, key)
    if outer is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(_convert(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(pairs))
    if kind in (int, float):
        number = _number(value)
        if isinstance(number, (kind, int)):
            try:
                return kind(number)
            except OverflowError:  # a whole number that no float holds
                return number
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    return value if kind is str and isinstance(value, str) else _UNFIT


def _as_mapping(kinds: tuple[Any, Any], value: dict[Any, Any], key: str) -> dict[Any, Any]:
    for name in value:
        if kinds[0] is str and not isinstance(name, str):
            raise ConfigError(f"{key} must have text as its keys, got {name!r}", key)
    return {name: _convert(item, kinds[1], _join(key, str(name))) for name, item in value.items()}


def _number(value: Any) -> int | float | None:
    """The number that a value or its text stands for, whole ones as int; None if it is none."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    try:
        number = float(value)
    except (ValueError, TypeError):
        return None
    return int(number) if number.is_integer() else number


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    return _EXPECTED.get(kind, "a mapping of keys")


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")  # YAML knows dates and sets


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
