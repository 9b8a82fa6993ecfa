"""The calculator that the model can call, and the state machine that runs it inside a reply.

`calculator(text)` answers a bounded grammar by walking the syntax tree: + - * / // % ** and parentheses over whole
numbers and decimals (exact: they are rationals), thousands commas inside numbers, and 'word'.count('x'). It runs no
code, raises nothing, keeps no state (any thread may call it), and its work is bounded by the constants below.

`ToolState` follows one row's tokens: python_start, an expression, python_end make it queue output_start, the result and
output_end, which the engine feeds to the row in place of sampled tokens. A failed evaluation queues nothing.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 256  # of an expression
MAX_TOKENS = 256  # of an expression inside a reply
MAX_DEPTH = 130  # of the syntax tree: a sum of as many terms still passes
MAX_DIGITS = 100  # of a number's numerator and denominator, written, intermediate or result
EXACT_PLACES = 20  # a decimal that ends within so many places is shown exactly,
ROUNDED_PLACES = 10  # any other is rounded to so many places after its leading zeros

_LIMIT = 10**MAX_DIGITS
_LIMIT_BITS = _LIMIT.bit_length()
_STRING = re.compile(r"('[^'\\]*'|\"[^\"\\]*\")")  # a literal without escapes; "don't" may hold the other quote
_COUNT = re.compile(r"\s*\.\s*count\s*\(\s*")  # what stands between the two strings of a count
_ARITHMETIC = re.compile(r"[\d+\-*/%(). ]*", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)", re.ASCII)

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


class _Refused(Exception):
    """The expression is outside the grammar or its bounds."""


def calculator(text: str) -> str | None:
    """The value of `text` written out; None when it is outside the grammar, too large, or undefined (1/0)."""
    try:
        source = _screen(text)
        return _show(_value(ast.parse(source, mode="eval").body, source.encode(), 0))
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _screen(text: str) -> str:
    """The expression without thousands commas; refused if it holds a name or character unknown to the grammar."""
    text = text.strip()
    if not text or len(text) > MAX_CHARS or not text.isprintable():
        raise _Refused
    pieces = _STRING.split(text)  # gap, string, gap, string, ..., gap
    for i in range(0, len(pieces), 2):
        if 0 < i < len(pieces) - 1 and _COUNT.fullmatch(pieces[i]):
            continue
        gap = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), pieces[i])
        pieces[i] = _LEADING_ZEROS.sub("", gap)
        if not _ARITHMETIC.fullmatch(pieces[i]):
            raise _Refused
    return "".join(pieces)


def _value(node: ast.expr, source: bytes, depth: int) -> Fraction:
    """Walk one node. source: the expression in UTF-8, where numbers are read as written (0.1 is 1/10, no float)."""
    if depth > MAX_DEPTH:
        raise _Refused
    match node:
        case ast.Constant(value=int() | float()):
            value = Fraction(source[node.col_offset : node.end_col_offset].decode())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, source, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand, source, depth + 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left, source, depth + 1), _value(right, source, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left, source, depth + 1), _value(right, source, depth + 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            value = Fraction(text.count(part))
        case _:
            raise _Refused
    if abs(value.numerator) >= _LIMIT or value.denominator >= _LIMIT:
        raise _Refused
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent for whole exponents, refused before it is computed when the result could pass MAX_DIGITS."""
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length()) - 1  # 2**bits <= the larger part
    if exponent.denominator != 1 or bits * abs(exponent.numerator) > _LIMIT_BITS:
        raise _Refused
    return base**exponent.numerator


def _show(value: Fraction) -> str:
    """The value as a plain decimal: no exponent, no trailing zeros, whole numbers without a point."""
    places = _places(value)
    digits = str(abs(round(value * 10**places))).rjust(places + 1, "0")
    whole, part = digits[: len(digits) - places], digits[len(digits) - places :].rstrip("0")
    sign = "-" if value < 0 and (part or whole != "0") else ""
    return f"{sign}{whole}.{part}" if part else f"{sign}{whole}"


def _places(value: Fraction) -> int:
    """How many decimal places to show: all when the decimal ends soon enough, else ROUNDED_PLACES significant ones."""
    for places in range(EXACT_PLACES + 1):
        if 10**places % value.denominator == 0:
            return places
    zeros = 0
    while abs(value) * 10 ** (zeros + 1) < 1:
        zeros += 1
    return ROUNDED_PLACES + zeros


@dataclass(frozen=True)
class ToolTokens:
    """The ids of the four tool tokens and the way between ids and text: what a ToolState needs of a tokenizer."""

    tokenizer: object
    python_start: int
    python_end: int
    output_start: int
    output_end: int

    @classmethod
    def of(cls, tokenizer) -> ToolTokens:
        """Look the four up in a nanochat.tokenizer.Tokenizer."""
        names = ("python_start", "python_end", "output_start", "output_end")
        return cls(tokenizer, *(tokenizer.special(f"<|{name}|>") for name in names))


class ToolState:
    """One row's tool calls: give it every token of the reply by `feed`; `forced` holds the ids that must come next.

    The engine takes `forced.popleft()` in place of a sampled token while the queue is not empty.
    """

    def __init__(self, tokens: ToolTokens):
        self.tokens = tokens
        self.forced: deque[int] = deque()
        self.expression: list[int] | None = None  # the ids inside an open python block

    def feed(self, token: int) -> None:
        """Take the row's next token, sampled or forced."""
        if token == self.tokens.python_start:
            self.expression = []
        elif self.expression is None:
            return
        elif token == self.tokens.python_end:
            self._call(self.expression)
            self.expression = None
        elif len(self.expression) <= MAX_TOKENS:
            self.expression.append(token)

    def _call(self, expression: list[int]) -> None:
        if not expression or len(expression) > MAX_TOKENS:
            return
        result = calculator(self.tokens.tokenizer.decode(expression))
        if result is not None:
            answer = self.tokens.tokenizer.encode(result)
            self.forced.extend([self.tokens.output_start, *answer, self.tokens.output_end])
