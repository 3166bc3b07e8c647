"""`cppo keys`: every key of a configuration file, from the dataclasses that hold them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cppo.cli.config_file import ConfigError
from cppo.cli.run_config import RunConfig
from cppo.options.values import suggestion

_WIDTH = 96
_NULL = "null"


class Key(NamedTuple):
    """A key: its dotted name, its type and default as text, and what it means."""

    name: str
    kind: str
    default: str
    text: str

    @property
    def short(self) -> str:
        """The key in a list of its group: "seed=0"."""
        last = self.name.rpartition(".")[2]
        return f"{last}: {self.kind}" if self.default in ("", _NULL) else f"{last}={self.default}"


class Group(NamedTuple):
    """The keys of one dataclass, which stand under one dotted name."""

    name: str
    text: str
    keys: list[Key]


def groups(cls: type = RunConfig, name: str = "") -> list[Group]:
    """Return the keys of a tree of dataclasses, group by group; of one class the first place.

    Args:
        cls: a dataclass whose fields have their documentation below them.
        name: dotted place of the class.
    """
    return list(_groups(cls, name, None, seen={cls}))


def _groups(cls: type, name: str, outer: Any, seen: set[type]) -> Iterator[Group]:
    """As `groups`. The defaults are the values of `outer`, or those of the class if it is None."""
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    annotations = {one.name: str(one.type) for one in dataclasses.fields(cls)}
    nested: list[tuple[type, str, Any]] = []
    keys = []
    for field in dataclasses.fields(cls):
        place = f"{name}.{field.name}" if name else field.name
        inner = _dataclass_in(hints[field.name])
        default = _default(field) if outer is None else getattr(outer, field.name)
        # A group that may be null is a key as well.
        if inner is None or default is None:
            kind = _in_yaml(annotations[field.name])
            keys.append(Key(place, kind, _in_words(default), texts[field.name]))
        # The keys of `data.eval` are those of `data.train`, which come first.
        if inner is not None and inner not in seen:
            seen.add(inner)
            nested.append((inner, place, None if default is dataclasses.MISSING else default))
    yield Group(name, inspect.getdoc(cls) or "", keys)
    for inner, place, default in nested:
        yield from _groups(inner, place, default, seen)


def field_texts(cls: type) -> dict[str, str]:
    """Return the documentation below each field of a dataclass; empty where there is none."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {field.name: "" for field in dataclasses.fields(cls)}
    previous = ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            previous = node.target.id
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
            texts[previous] = inspect.cleandoc(str(node.value.value))
        previous = ""
    return texts


def _dataclass_in(hint: Any) -> Any:
    choices = (hint, *typing.get_args(hint))
    return next((one for one in choices if dataclasses.is_dataclass(one)), None)


def _in_yaml(annotation: str) -> str:
    """A type as one writes its values in YAML."""
    words = re.sub(r"tuple\[.*?\]", "list", annotation)
    words = re.sub(r"dict\[.*?\]|\w+Config", "mapping", words)
    for name, word in (("str", "text"), ("bool", "true or false"), ("None", "null")):
        words = re.sub(rf"\b{name}\b", word, words)
    return words.replace(" | ", " or ")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _in_words(value: Any) -> str:
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return _NULL if value is None else str(value).lower()
    return str(value)


def summary() -> str:
    """The groups with their keys and defaults, for `cppo train --help`."""
    parts = []
    for group in groups():
        listed = ", ".join(key.short for key in group.keys)
        parts.append(f"{group.name or 'top level'}:\n{_wrapped(listed, 2)}")
    return "\n".join(parts)


def page() -> str:
    """docs/options.md: every key with its type, default and meaning."""
    lines = [
        "# Options",
        "",
        "Every key of a configuration file, as `cppo keys` prints them. On the command line a key",
        "is set by its full name: `cppo train my_data.yaml trainer.group_size=16`. In Python the",
        "keys of `trainer` are the fields of `cppo.CPPOConfig`, those of `trainer.loss`,",
        "`trainer.lora` and `trainer.vllm` the fields of `LossConfig`, `LoraConfig` and",
        "`VLLMConfig`. `data.eval` has the keys of `data.train`.",
    ]
    for group in groups():
        lines += ["", f"## {group.name or 'The file'}", "", group.text.split("\n\n")[0]]
        lines += ["", "| key | type | default | what it is |", "|---|---|---|---|"]
        for key in group.keys:
            text = " ".join(key.text.split()).replace("|", "\\|")
            lines.append(f"| `{key.name}` | {key.kind} | {_code(key.default)} | {text} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else "must be given"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the keys of a configuration file, or those below PREFIX, with what they mean."""
    arguments = _parser().parse_args(argv)
    if arguments.markdown:
        print(page(), end="")
        return 0
    every = [key for group in groups() for key in group.keys]
    prefix = arguments.prefix
    # `data.eval.path` is described under `data.train.path`.
    asked = prefix.replace("data.eval.", "data.train.")
    chosen = [key for key in every if not asked or f"{key.name}.".startswith(f"{asked}.")]
    if not chosen:
        known = [key.name for key in every] + [group.name for group in groups()]
        raise ConfigError(f"there is no key {prefix!r}{suggestion(prefix, known)}")
    for key in chosen:
        default = f" = {key.default}" if key.default else ""
        print(f"{key.name}{default}  ({key.kind})\n{_wrapped(key.text, 4)}")
    return 0


def _wrapped(text: str, indent: int) -> str:
    space = " " * indent
    return textwrap.fill(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=space,
        subsequent_indent=space,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo keys", description=main.__doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", nargs="?", default="", help="such as trainer.loss, or one key")
    add("--markdown", action="store_true", help="as docs/options.md has them")
    return parser
