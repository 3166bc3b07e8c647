"""YAML without its traps: a repeated key is an error, 1e-4 is a number, aliases cannot explode."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

_MOST_VALUES = 100_000
# What PyYAML raises where a text does not fit its tag.
_WRONG = (ValueError, OverflowError, IndexError, KeyError, TypeError, AttributeError)


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Raises: yaml.YAMLError, also for nesting or aliases that would exhaust memory.
    """
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


def problem(error: yaml.YAMLError) -> str:
    """Return an error's place and words: "line 2, column 1: key 'model' appears twice"."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{getattr(error, 'problem', None) or 'not YAML'}"


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once and 1e-4 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # `!!set [1]` fails below
        for key_node, _ in pairs:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise _wrong("a key must be text, got a list or a mapping", key_node)
            if key in seen:
                raise _wrong(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _WRONG as error:  # `2026-13-45`, or a tag on something else: `!!int ""`, `!!bool q`
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _wrong(f"{node.value!r:.60} is no {tag} ({error})", node) from None


def _wrong(words: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _count(root: yaml.Node | None) -> None:
    """Raise for too many values. An alias counts as many as what it stands for has."""
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


def scalar(text: str) -> str:
    """A text as YAML reads it back, in quotes where it needs them."""
    if re.fullmatch(r"\w[\w./-]*", text) and parse(text) == text:
        return text
    # Single quotes know no escapes, which characters that cannot be printed need.
    return "'" + text.replace("'", "''") + "'" if text.isprintable() else json.dumps(text)
