"""Names say what they stand for: placeholder words are kept out of the package."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
BANNED = set(
    "found there told wanted own made some how what kept asked taken given gone mine whole others "
    "these those".split()
)


def names(tree: ast.AST):
    """Every variable, argument, attribute and function, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno


def test_placeholder_names_are_fewer_than_one_in_a_thousand_lines():
    lines, placeholders = 0, []
    for folder in ("tda", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            lines += text.count("\n")
            placeholders += [
                f"{path.relative_to(ROOT)}:{line}: {name}"
                for name, line in names(ast.parse(text))
                if name.strip("_") in BANNED
            ]
    assert len(placeholders) < lines / 1000, "\n".join(placeholders)
