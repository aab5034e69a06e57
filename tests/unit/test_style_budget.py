"""The size budget: what every file and every function may take up. ruff, mypy and import-linter hold the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("seqaware", "launcher", "benchmarks", "demo", "examples")
FILE_LINES = 500
FUNCTION_LINES = 60
NESTING = 3
ARGUMENTS = 6
POSITIONAL = 3
# Called by torch and transformers, which fix the order of what they pass.
FOREIGN_SIGNATURES = {"forward", "backward", "attention", "flash"}
SHAPELESS_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class Function:
    """One function and what the budget asks about it."""

    name: str
    line: int
    lines: int
    nesting: int
    arguments: int
    positional: int
    compiled: bool
    kernel: bool

    def excesses(self) -> Iterator[str]:
        # numba compiles no keyword-only arguments.
        bound = self.compiled or self.name in FOREIGN_SIGNATURES
        free_to_choose = not bound and not self.name.startswith("_")
        limits = (
            ("lines", self.lines, FUNCTION_LINES),
            ("nested blocks", self.nesting, NESTING),
            # Triton's kernels take pointers, sizes and strides one by one.
            ("arguments", 0 if self.kernel else self.arguments, ARGUMENTS),
            ("positional arguments", self.positional if free_to_choose else 0, POSITIONAL),
        )
        for what, found, limit in limits:
            if found > limit:
                yield f"{self.line}: {self.name} has {found} {what}, the limit is {limit}"


def python_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(source: str) -> list[Function]:
    """Every function of a file, methods and inner functions too."""
    tree = ast.parse(source)
    methods = {id(node) for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for node in owner.body}
    return [measure(node, id(node) in methods) for node in ast.walk(tree) if isinstance(node, FunctionNode)]


def measure(node: FunctionNode, is_method: bool) -> Function:
    # The decorators belong to the function a reader sees; `self` and `cls` are not the caller's to give.
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    receiver = int(is_method and not static)
    positional = len(node.args.posonlyargs) + len(node.args.args) - receiver
    assert node.end_lineno is not None, "the parser gives every statement its end"
    return Function(
        name=node.name,
        line=node.lineno,
        lines=node.end_lineno - first + 1,
        nesting=max((depth(child) for child in node.body), default=0),
        arguments=positional + len(node.args.kwonlyargs),
        positional=positional,
        compiled=any(isinstance(d, ast.Name) and d.id == "compiled" for d in node.decorator_list),
        kernel=any(ast.unparse(d) == "triton.jit" for d in node.decorator_list),
    )


def depth(node: ast.AST) -> int:
    """Levels of blocks inside a statement. An `elif` is no level; an inner function counts for itself."""
    if isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
        return 0
    if not isinstance(node, BLOCKS):
        return max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    inner = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        inner = max(inner, depth(child) - int(is_elif))
    return 1 + inner


def is_command(function: Function, path: Path) -> bool:
    """A command's parameters are the options a person types; the command line fixes their form."""
    return path.parent.name == "launcher" and function.name in {path.stem, "main", "command"}


def test_there_is_something_to_hold_to_the_budget() -> None:
    assert len(python_files()) > 10


def test_files_and_functions_keep_to_the_budget() -> None:
    excesses = []
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT)
        if (lines := source.count("\n")) > FILE_LINES:
            excesses.append(f"{where}: {lines} lines, the limit is {FILE_LINES}")
        found = (function for function in functions(source) if not is_command(function, path))
        excesses.extend(f"{where}:{excess}" for function in found for excess in function.excesses())
    assert not excesses, "\n" + "\n".join(excesses)


def test_no_file_is_named_for_nothing() -> None:
    named = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.stem in SHAPELESS_NAMES]
    assert not named


def test_nothing_is_left_to_do() -> None:
    left = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*python_files(), *(ROOT / "tests").rglob("*.py")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert not left, "\n" + "\n".join(left)


# The budget is only as good as its measure.


@pytest.mark.parametrize(
    ("body", "nesting"),
    [
        ("return 1", 0),
        ("if a:\n  return 1", 1),
        ("if a:\n  b()\nelif c:\n  d()\nelif e:\n  f()\nelse:\n  g()", 1),
        ("if a:\n  b()\nelif c:\n  for x in y:\n    d()", 2),
        ("if a:\n  b()\nelse:\n  if c:\n    d()\n  e()", 2),
        ("for x in y:\n  with z:\n    try:\n      a()\n    except E:\n      b()", 3),
        ("for x in y:\n  with z:\n    try:\n      a()\n    except E:\n      if b:\n        c()", 4),
        ("match a:\n  case 1:\n    if b:\n      c()", 2),
        ("def inner():\n  if a:\n    if b:\n      c()\nreturn inner", 0),
    ],
)
def test_nesting_is_measured_as_a_reader_sees_it(body: str, nesting: int) -> None:
    source = "def f():\n" + "\n".join(f"    {line}" for line in body.splitlines())
    assert next(f for f in functions(source) if f.name == "f").nesting == nesting


def test_arguments_are_counted_without_the_receiver() -> None:
    found = {
        f.name: f for f in functions("class A:\n  def m(self, a, *, b): ...\n  @staticmethod\n  def s(a, b): ...\n")
    }
    assert (found["m"].arguments, found["m"].positional) == (2, 1)
    assert (found["s"].arguments, found["s"].positional) == (2, 2)


def _repeated(named: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for name, path in named:
        places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_two_modules_share_a_name_and_no_two_classes() -> None:
    """A reader who searches for a name finds one thing. The scripts of launcher/ are named after their commands."""
    modules = [path for path in python_files() if path.is_relative_to(ROOT / "seqaware") and path.stem != "__init__"]
    assert not _repeated((path.stem, path) for path in modules)
    classes = (
        (node.name, path)
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not _repeated(classes)
