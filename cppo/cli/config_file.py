"""Reading a YAML file into a tree of dataclasses, with errors that a user can act on.

Nothing here knows the keys: they are the fields of the dataclass that is asked for. Every mistake
is a ConfigError naming the dotted key, the value, what is allowed, and the file or command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

_T = TypeVar("_T")
_MOST_VALUES = 100_000
_DEEPEST_KEY = 20
# What PyYAML lets through where a text is not what its tag says.
_WRONG = (ValueError, OverflowError, IndexError, KeyError, TypeError, AttributeError)


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
        tree = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None
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
            value = _load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {_problem(error)}, got {text!r}") from None
        *parents, last = key.split(".")
        branch = tree
        for part in parents:
            if not isinstance(branch.get(part), dict):
                branch[part] = {}
            branch = branch[part]
        branch[last] = value
        keys.append(key)
    return keys


def build(cls: type[_T], tree: Any, key: str = "") -> _T:
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
    if not isinstance(tree, dict):
        raise ConfigError(f"{key} must be a mapping of keys, got {tree!r} ({_kind(tree)})", key)
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
    values = {name: _coerce(value, hints[name], _join(key, name)) for name, value in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        # "CPPOConfig.prune_rate must be ..." becomes "trainer.prune_rate must be ..."
        message = str(error).replace(f"{cls.__name__}.", f"{key}." if key else "")
        raise ConfigError(message, message.split(" ")[0]) from None


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


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once and 1e-4 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # `!!set [1]`: said below
        for key_node, _ in pairs:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text, got a list or a mapping", key_node.start_mark
                )
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _WRONG as error:  # `2026-13-45`, or a tag on something else: `!!int ""`, `!!bool q`
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.60} is no {tag} ({error})", node.start_mark
            ) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _load(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for one that aliases make huge."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _count(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    except _WRONG as error:  # an escape for no character, for example
        raise yaml.MarkedYAMLError(problem=str(error)) from None
    finally:
        loader.dispose()


def _count(root: yaml.Node | None) -> None:
    """Counts every value as often as it will be read: an alias counts as what it stands for."""
    left, waiting = _MOST_VALUES, [root]
    while waiting:
        node = waiting.pop()
        left -= 1
        if left < 0:
            raise yaml.MarkedYAMLError(problem=f"it has more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{getattr(error, 'problem', None) or 'not YAML'}"


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
    near = [_join(key, n) for n in difflib.get_close_matches(name, allowed, n=1, cutoff=0.7)]
    near += [below[n] for n in difflib.get_close_matches(name, below, n=1, cutoff=0.7)]
    hint = f"; did you mean {near[0]}?" if near else "."
    full = _join(key, name)
    return ConfigError(
        f"{full} is not a key (its value: {value!r:.60}){hint} Allowed: {', '.join(allowed)}", full
    )


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` of a field, or an error that says what was expected."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _coerce_union(value, typing.get_args(hint), key)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    if _is_list(hint) and isinstance(value, (list, tuple)):
        args = typing.get_args(hint)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(_coerce(v, t, f"{key}[{i}]") for i, (v, t) in enumerate(pairs))
    elif hint in (int, float) and isinstance(value, (int, float, str)):
        number = _number(value)
        if isinstance(number, hint) or (hint is float and number is not None):
            return hint(number)
    elif hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    elif hint is str and isinstance(value, str):
        return value
    elif _is_mapping(hint) and isinstance(value, dict):
        return _coerce_mapping(value, hint, key)
    raise ConfigError(f"{key} must be {_expected(hint)}, got {value!r} ({_kind(value)})", key)


def _coerce_union(value: Any, choices: Sequence[Any], key: str) -> Any:
    """`value` as the first of several types that takes it: lists and mappings as such alone."""
    kinds = [t for t in choices if t is not type(None)]
    if len(kinds) < len(choices) and value in (None, "none", "None"):
        return None
    is_list, is_mapping = isinstance(value, (list, tuple)), isinstance(value, dict)
    fitting = [t for t in kinds if (_is_list(t), _is_mapping(t)) == (is_list, is_mapping)] or kinds
    for kind in fitting:
        try:
            return _coerce(value, kind, key)
        except ConfigError as error:
            if len(fitting) == 1 or error.key != key:  # inside: it was of the right kind
                raise
    expected = " or ".join(dict.fromkeys(_expected(kind) for kind in fitting))
    raise ConfigError(f"{key} must be {expected}, got {value!r} ({_kind(value)})", key)


def _coerce_mapping(value: dict[Any, Any], hint: Any, key: str) -> dict[Any, Any]:
    """A dict[str, T] with its values as T."""
    names, values = typing.get_args(hint) or (Any, Any)
    for name in value:
        if names is str and not isinstance(name, str):
            raise ConfigError(f"{key} must have text as its keys, got {name!r}", key)
    return {name: _coerce(item, values, _join(key, str(name))) for name, item in value.items()}


def _number(value: int | float | str) -> int | float | None:
    """The number that a value or its text stands for, whole ones as int; None if it is none."""
    if isinstance(value, (bool, int)):
        return None if isinstance(value, bool) else value
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_mapping(hint: Any) -> bool:
    return dict in (hint, typing.get_origin(hint)) or dataclasses.is_dataclass(hint)


def _expected(hint: Any) -> str:
    if _is_list(hint):
        args = typing.get_args(hint)
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "a mapping of keys")


def _kind(value: Any) -> str:
    words = {
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return "nothing" if value is None else words.get(type(value), "a mapping")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
