"""The README's tree is the tree: a line a file, with the first line of its docstring."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "lm").glob("*/*.py"), *(ROOT / "experiments").rglob("*.py")])


def first_line(file):
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0].rstrip(".")


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.name[:2] != "__"], ids=lambda f: str(f.relative_to(ROOT).with_suffix(""))
)
def test_the_tree_has_a_line_for_the_file(file):
    lines = [line.split(maxsplit=1) for line in (ROOT / "README.md").read_text().splitlines()]
    assert [file.name, first_line(file)] in lines
