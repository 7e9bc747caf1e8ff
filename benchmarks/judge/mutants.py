"""Deliberately wrong solutions: one operator, constant or comparison of a right one changed."""

import ast
import copy
import random
from collections.abc import Iterator

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.FloorDiv,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(program: str, seed: str) -> Iterator[tuple[str, str]]:
    """Yield different mutants of a program, in an order that the seed draws.

    Yields:
        The kind of change, and the mutant's code.
    """
    tree = ast.parse(program)
    places = [(number, change) for number, node in enumerate(ast.walk(tree)) for change in _changes(node)]
    random.Random(seed).shuffle(places)
    for number, change in places:
        mutant = copy.deepcopy(tree)
        node = next(node for position, node in enumerate(ast.walk(mutant)) if position == number)
        _change(node, change)
        yield change, ast.unparse(ast.fix_missing_locations(mutant))


def _changes(node: ast.AST) -> list[str]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        return ["operator"]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        return ["comparison"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return ["one more", "one less"]
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return ["negation"]
    return []


def _change(node: ast.AST, change: str) -> None:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Compare):
        node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.Constant):
        node.value += 1 if change == "one more" else -1  # type: ignore[operator]
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        node.test = ast.UnaryOp(ast.Not(), node.test)
