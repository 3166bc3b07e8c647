"""Equations of numbers in an answer: "20 eggs - 2 eggs = 18 eggs" says its last side."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

LONGEST_SUM = 300  # characters

# Sums, differences, products and ratios of numbers, at the end of a text.
_ONE = r"[-(]*(?:\d[\d,]*(?:\.\d+)?|\.\d+)\)*"
_SUM = re.compile(rf"{_ONE}(?: ?[-+*/] ?{_ONE})+ ?$", re.ASCII)
_UNIT_WORD = r"(?![xX](?![A-Za-z]))[A-Za-z]+"
_IN_SUMS = (
    (re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}"), r"(\1/\2)"),
    (re.compile(r"\\(?:times|cdot) ?"), "*"),
    (re.compile(r"(\d[\d,.]*) ?\\?%(?: of )?(?= ?\d)"), r"(\1/100)*"),
    (re.compile(r"(\d[\d,.]*) ?\\?%"), r"(\1/100)"),
    (re.compile(r"\\?\$"), ""),
    # units, and not the "x" of a product
    (re.compile(rf"(?<=[\d)]) ?(?:/ ?)?{_UNIT_WORD}(?:[ /]{_UNIT_WORD}){{0,3}}"), ""),
    (re.compile(r"(?<=[\d)]) ?[xX] ?(?=[\d(.])"), "*"),
    (re.compile(r"(?<=\() | (?=\))"), ""),
    (re.compile(r"(?<=[\d)])(?=\()"), "*"),
)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def worths_before(equation: str) -> tuple[str, set[Fraction | None]] | None:
    """Return the words before an equation, and what all its sides but the last are worth.

    None if its first side is no sum of numbers; a side that is none is worth None.
    """
    first, *sides = equation.split("=")[:-1] or [""]
    first, *sides = (_in_numbers(side) for side in (first, *sides))
    found = _SUM.search(first)
    if found is None:
        return None
    worths = {_worth(side.strip()) for side in (found[0].strip(), *sides)}
    return re.split(r"[.,;:]", first[: found.start()])[-1], worths


def _in_numbers(side: str) -> str:
    """A side of an equation with its numbers and operators as Python has them, without units."""
    for pattern, spelled in _IN_SUMS:
        side = pattern.sub(spelled, side)
    return side


def _worth(side: str) -> Fraction | None:
    """What a sum of numbers is worth; None for anything else."""

    def worth(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return Fraction(_OPERATORS[type(node.op)](worth(node.left), worth(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -worth(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return Fraction(repr(node.value))
        raise ValueError("no sum of numbers")

    try:
        numbers = re.sub(r"\b0+(?=\d)", "", side.replace(",", ""))
        return worth(ast.parse(numbers, mode="eval").body) if len(side) <= LONGEST_SUM else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
