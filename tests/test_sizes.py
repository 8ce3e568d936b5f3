"""Files, functions and parameter lists that a reader can hold in the head, with real types.

A function that is better whole says so in a comment, `# whole: WHY`, anywhere inside it.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "vidjax").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
FILE_LINES, FUNCTION_LINES, PARAMETERS, ANY_SHARE = 400, 60, 8, 0.03
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source):
    """Returns the numbers of lines with code, and of those with a comment `# whole: WHY`."""
    code, reasons = set(), set()
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.string.startswith("# whole: "):
                reasons.add(token.start[0])
        elif token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # docstrings are no code
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return code, reasons


def parameters(function):
    """Returns the parameters of a function but for self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [one for one in every if one and one.arg not in ("self", "cls")]


def large_functions(source):
    """Returns `line NAME: size` of functions that are too large and do not say why."""
    code, reasons = code_lines(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTION):
            span = set(range(node.lineno, (node.end_lineno or 0) + 1))
            lines, count = len(code & span), len(parameters(node))
            if (lines > FUNCTION_LINES or count > PARAMETERS) and not reasons & span:
                found.append(f"{node.lineno} {node.name}: {lines} lines, {count} parameters")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_the_head(path):
    source = path.read_text()
    large = large_functions(source)
    if (count := len(source.splitlines())) > FILE_LINES:
        large.append(f"{count} lines")
    assert not large


def test_large_functions_would_be_seen():
    long = "def f():\n" + "    x = 1\n" * 60
    assert large_functions(long) == ["1 f: 61 lines, 0 parameters"]
    assert not large_functions(long.replace("\n", "\n    # whole: one table\n", 1))
    assert not large_functions(
        "def f():\n    '''Text.\n" + "\n" * 70 + "    '''\n" + "    # x\n" * 70
    )
    wide = "def f(self, a, b, c, d, *e, f, g, h, **i): pass"
    assert large_functions(wide) == ["1 f: 1 lines, 9 parameters"]


def test_parameters_have_types():
    """Any, or an alias of it, or no annotation: fewer than 3 % of all parameters."""
    aliases = {"Any"} | {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and node.value is not None
        and ast.unparse(node.value) == "Any"
    }
    untyped, count = [], 0
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, FUNCTION):
                continue
            for parameter in parameters(node):
                count += 1
                words = ast.unparse(parameter.annotation or ast.Name("Any")).split(" | ")
                if aliases & set(words):
                    place = f"{path.relative_to(ROOT)}:{parameter.lineno}"
                    untyped.append(f"{place} {node.name}({parameter.arg})")
    assert len(untyped) < ANY_SHARE * count, (f"{len(untyped)} of {count}", untyped)
