"""Who may import whom: downward only, and no room its sibling."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = [
    {"core"},
    {"parallel"},
    {"layers"},
    {"models", "objectives", "data"},
    {"train", "generate", "evals"},
    {"tasks", "compress", "interop", "serve", "report", "plan"},
    {"main"},
]
HEAVY = {"tensorflow", "torch", "transformers"}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imported(file: pathlib.Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "lm").glob("*/*.py")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_imports_go_down_only(file):
    room = file.parent.name
    for line, name in imported(file):
        parts = name.split(".")
        place = f"{file.relative_to(ROOT)}:{line} imports {name}"
        assert parts[0] != "experiments", place
        if parts[0] == "lm" and len(parts) > 1 and parts[1] != room:
            assert floor(parts[1]) < floor(room), place
        if parts[0] in HEAVY:
            assert room == "interop", place
        if parts[0] in ("jax", "flax", "optax", "orbax"):
            assert room != "data", f"{place}: data is numpy only"
        assert name[:8] != "flax.nnx", place


def test_every_room_is_on_a_floor():
    rooms = {f.parent.name for f in (ROOT / "lm").glob("*/*.py")}
    assert rooms <= set().union(*FLOORS)


def test_launchers_run_without_the_library():
    for file in (ROOT / "launch").glob("*.py"):
        assert not [name for _, name in imported(file) if name.split(".")[0] in ("lm", "jax", "numpy")], file


def test_nothing_unpickles_or_evaluates():
    for file in [*(ROOT / "lm").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{file}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{file}:{node.value.lineno}"
        assert not {n.split(".")[0] for _, n in imported(file)} & {"pickle", "dill", "cloudpickle", "joblib"}, file
