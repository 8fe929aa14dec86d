"""House rules: short files and functions, docstrings that name their subject, unique names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("negtome_fast", "kernels", "bench", "docs", "examples")
ALL = (*CODE, "tests")
MOST_LINES, MOST_FUNCTION_LINES = 500, 60
#: Beginnings that make a reader wait for the subject.
WAITING = re.compile(r"(Of|What|Those|That|Whether|Where|How)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_kernel(node: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_table_of_options(node: Function) -> bool:
    """Return True if the function only adds options to a parser."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    added = [n for n in calls if getattr(n.func, "attr", "").startswith("add_")]
    branches = (ast.For, ast.While, ast.Try, ast.If, ast.With)
    return len(added) >= 8 and sum(isinstance(n, branches) for n in ast.walk(node)) <= 2


def code_lines(node: Function) -> int:
    """Lines of a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def functions(path: Path) -> Iterator[Function]:
    return (n for n in ast.walk(parsed(path)) if isinstance(n, Function))


def test_files_are_short() -> None:
    lines = {named(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files(*ALL)}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_functions_are_short() -> None:
    lines = {
        f"{named(path)}:{node.name}": code_lines(node)
        for path in files(*ALL)
        for node in functions(path)
        if not is_kernel(node) and not is_table_of_options(node)
    }
    assert not {name: count for name, count in lines.items() if count > MOST_FUNCTION_LINES}


def test_docstrings_name_their_subject() -> None:
    waiting = [
        f"{named(path)}: {text.splitlines()[0]}"
        for path in files(*ALL)
        for node in ast.walk(parsed(path))
        if isinstance(node, Function | ast.ClassDef | ast.Module)
        and WAITING.match(text := ast.get_docstring(node) or "")
    ]
    assert not waiting


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in files("negtome_fast", "kernels", "bench"):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(named(path))
    assert not {name: where for name, where in places.items() if len(where) > 1}
