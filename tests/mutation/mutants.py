"""The mutants of a source text: small changes of what it does, each in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: the bytes ``start`` to ``end`` of the source become ``after``."""

    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: str) -> str:
        """The source with the change."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
#: calls of a method that are left out, and names of which one stands for the other
_DROPPED = ("detach", "clone", "contiguous", "clamp", "float", "unsqueeze")
_SWAPPED = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "no_grad": "enable_grad", "enable_grad": "no_grad",
            "zeros": "ones", "zeros_like": "ones_like", "ones": "zeros", "all": "any", "any": "all"}  # fmt: skip

#: expressions that may need parentheses where they stand
_LOOSE = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp)


def mutants_of(source: str) -> list[Mutant]:
    """All mutants, in the order of the text. Messages (of ``raise``, and f-strings), annotations and docstrings have none."""
    found: dict[tuple, Mutant] = {}
    data, starts = source.encode(), [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, kind, after in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = data[start:end].decode()
        found.setdefault((start, end, after), Mutant(node.lineno, kind, before, after, start, end))
    return sorted((m for m in found.values() if m.after != m.before), key=lambda m: (m.start, m.end, m.after))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """What is replaced, how that is called, and by what."""
    for node in _walk(tree):
        if isinstance(node, ast.expr):
            for kind, changed in _of_expression(node):
                yield node, kind, f"({ast.unparse(changed)})" if isinstance(node, _LOOSE) else ast.unparse(changed)
        elif isinstance(node, ast.stmt):
            yield from _of_statement(node)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes whose change can matter."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _says_nothing(child):
                yield from _walk(child)


def _says_nothing(node: object) -> bool:
    """A text: a docstring, an f-string, or imports for annotations."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _copy(node: ast.AST, **fields) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                yield "comparison", _copy(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in _OPERATORS:
        yield "operator", _copy(node, op=_OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield "operator", node.operand
    elif isinstance(node, ast.IfExp):
        yield "condition", _copy(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield "constant", ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in _DROPPED:
            yield "call dropped", node.func.value
        if node.func.attr in _SWAPPED:
            yield "name", _copy(node, func=_copy(node.func, attr=_SWAPPED[node.func.attr]))
    elif isinstance(node.func, ast.Name) and node.func.id in _SWAPPED:
        yield "name", _copy(node, func=ast.Name(_SWAPPED[node.func.id]))
    for i in range(len(node.keywords)):
        yield "argument", _copy(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if len(node.args) > 1 and not isinstance(node.args[-1], ast.Starred):
        yield "argument", _copy(node, args=node.args[:-1])


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, str, str]]:
    stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    if stored or isinstance(node, (ast.Expr, ast.Raise, ast.AugAssign, ast.Break, ast.Continue)):
        yield node, "statement", "pass"
    if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield node, "operator", ast.unparse(_copy(node, op=_OPERATORS[type(node.op)]()))
    if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield node.test, "condition", f"not ({ast.unparse(node.test)})"
    if isinstance(node, ast.Return) and node.value is not None:
        yield node, "return", "return None"
