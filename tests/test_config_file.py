"""Values of a YAML file as the types of the fields that they are for: mappings and choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cppo.cli.config_file import ConfigError, apply_overrides, build, read


@dataclass(frozen=True)
class Part:
    rank: int = 1


@dataclass(frozen=True)
class Toy:
    arguments: dict[str, Any] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    bare: dict | None = None
    part: Part | None = None
    words: str | tuple[str, ...] | None = None
    either: dict[str, float] | tuple[float, ...] | None = None
    scale: float | str = 1.0
    limit: int | bool = 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("arguments={enable_thinking: false, depth: {a: [1, none]}}", {"arguments": 0}),
        ("arguments={}", {"arguments": {}}),
        ("arguments=null", {"arguments": None}),
        ("arguments=none", {"arguments": None}),
        ("arguments.enable_thinking=false", {"arguments": {"enable_thinking": False}}),
        ("arguments.a.b=1e-3", {"arguments": {"a": {"b": 0.001}}}),
        ("made.x=[1, 2]", {"made": {"x": [1, 2]}}),
        ("weights={boxed: 1, format: '1e-1'}", {"weights": {"boxed": 1.0, "format": 0.1}}),
        ("bare={1: 2}", {"bare": {1: 2}}),
        ("part={rank: 4}", {"part": Part(4)}),
        ("part=none", {"part": None}),
        ("words=all", {"words": "all"}),
        ("words=[q, k]", {"words": ("q", "k")}),
        ("either={a: 1}", {"either": {"a": 1.0}}),
        ("either=[1, '2']", {"either": (1.0, 2.0)}),
        ("scale=2", {"scale": 2.0}),
        ("scale=group", {"scale": "group"}),
        ("limit=true", {"limit": True}),
        ("limit=3", {"limit": 3}),
    ],
)
def test_values_become_what_their_field_takes(override, expected):
    tree = {}
    apply_overrides(tree, [override])
    built = build(Toy, tree)
    if expected == {"arguments": 0}:
        expected = {"arguments": {"enable_thinking": False, "depth": {"a": [1, "none"]}}}
    assert built == Toy(**expected)
    assert [type(v) for v in vars(built).values()] == [
        type(v) for v in vars(Toy(**expected)).values()
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arguments=5", r"arguments must be a mapping of keys, got 5 \(a whole number\)"),
        ("arguments=[a]", r"arguments must be a mapping of keys, got \['a'\] \(a list\)"),
        ("arguments={1: 2}", "arguments must have text as its keys, got 1"),
        ("weights={boxed: high}", r"weights.boxed must be a number, got 'high' \(text\)"),
        ("weights.boxed=[1]", r"weights.boxed must be a number, got \[1\]"),
        ("part={rnak: 4}", "part.rnak is not a key .*; did you mean part.rank"),
        ("part=4", "part must be a mapping of keys, got 4"),
        ("words={a: 1}", r"words must be text or a list, got {'a': 1} \(a mapping\)"),
        ("words=[1]", r"words\[0\] must be text, got 1"),
        ("either=5", "either must be a mapping of keys or a list, got 5"),
        ("either={a: x}", "either.a must be a number, got 'x'"),
        ("scale=true", "scale must be a number or text, got True"),
        ("limit=0.5", "limit must be a whole number or true or false, got 0.5"),
    ],
)
def test_other_values_are_refused_by_their_key(override, words):
    tree = {}
    apply_overrides(tree, [override])
    with pytest.raises(ConfigError, match=words):
        build(Toy, tree)


def test_an_override_of_too_many_parts():
    key = ".".join("a" * 20_000)
    with pytest.raises(ConfigError, match="must have at most 20 parts, got 20000: a.a.a"):
        apply_overrides({}, [f"{key}=1"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n"
         for b, c in zip("abcdefghij", "bcdefghijk", strict=True)), "more than 100,000 values"),
        ("a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [{', '.join([f'*{b}'] * 9)}]}}\n"
         for b, c in zip("abcdefghij", "bcdefghijk", strict=True)), "more than 100,000 values"),
        ("a: &a [*a]\n", "more than 100,000 values"),
        ("[" * 50_000, "nested too deeply|not YAML|expected"),
        ("a: 2026-13-45\n", "line 1, column 4: '2026-13-45' is no timestamp .month must be in"),
        ("? [1,2]\n: 3\n", "line 1, column 3: a key must be text, got a list"),
        ("? {a: 1}\n: 3\n", "a key must be text, got a list or a mapping"),
        ("a: &a [1]\nb:\n  ? [*a,*a]\n  : 3\n", "line 3, column 5: a key must be text"),
        ('a: !!int ""\n', "line 1, column 4: '' is no int"),
        ("a: [!!bool q]\n", "'q' is no bool"),
        ("a: !!float x\n", "'x' is no float"),
        ("a: !!timestamp x\n", "'x' is no timestamp"),
        ("a: !!binary x\n", "failed to decode base64"),
        ("a: !!set [1]\n", "expected a mapping node"),
        ('a: "\\UFFFFFFFF"\n', "range|too large"),
    ],
    ids=["lists", "merges", "itself", "deep", "date", "list key", "mapping key", "alias key",
         "int", "bool", "float", "timestamp", "binary", "set", "character"],
)  # fmt: skip
def test_what_a_file_must_not_hold(tmp_path, text, words):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"bomb.yaml: .*({words})"):
        read(path)
