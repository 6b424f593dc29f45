"""The flags that verbs share, and what they name: experiments and their settings."""

import ast
import importlib
import importlib.util
import pathlib
from typing import Any

from absl import flags

from lm.core.errors import UsageError, unknown


def define_experiment(values: flags.FlagValues) -> None:
    """Registers --experiment and --set."""
    flags.DEFINE_string(
        "experiment", None, "NAME[:VARIANT] of a file in experiments/, or PATH.py[:VARIANT]", flag_values=values
    )
    flags.DEFINE_multi_string(
        "set", [], "a setting, dotted.name=value, such as model.layers=24; may be repeated", flag_values=values
    )


def value(values: flags.FlagValues, name: str) -> Any:
    """The flag's value: absl types every one as possibly None, whatever its default."""
    return values[name].value


def required(values: flags.FlagValues, name: str) -> str:
    """The flag's value; raises UsageError where it was not given."""
    given = value(values, name)
    if not given:
        raise UsageError(f"--{name} is missing: {values[name].help}")
    return given


def load_run(name: str, assignments: list[str]) -> Any:
    """The Run of "NAME[:VARIANT]" after the --set assignments.

    Names are checked against file names and function names before the file, and so jax, is imported.
    """
    run = load_experiment(name)()
    from lm.train.run import Run

    if not isinstance(run, Run):
        raise UsageError(f"--experiment={name} returns a {type(run).__name__}, not a Run: is it for lm sweep?")
    return override(run, assignments, name)


def override(run: Any, assignments: list[str], name: str) -> Any:
    """The Run of experiment `name` after the --set assignments; raises UsageError where it could not be read again."""
    from lm.core import config

    run = config.override_all(run, assignments)
    try:
        config.from_json(config.to_json(run))
    except UsageError as error:
        raise UsageError(f"--experiment={name}: {error}; put classes of your own into a file of experiments/") from None
    return run


def load_experiment(name: str) -> Any:
    """The function that "NAME[:VARIANT]" or "PATH.py[:VARIANT]" names."""
    base, _, variant = name.partition(":")
    variant = variant or "run"
    file = pathlib.Path(base) if base.endswith(".py") else experiments_folder() / f"{base}.py"
    if base.endswith(".py") and not file.is_file():
        raise UsageError(f"--experiment={name}: there is no file {base}")
    if not base.endswith(".py") and (not base.isidentifier() or not file.is_file()):
        raise unknown("experiment", base, _experiments())
    variants = _public_functions(file)
    if variant not in variants:
        raise unknown(f"variant of {base}", variant, variants)
    if base.endswith(".py"):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None  # A file that ends in .py has both.
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(f"experiments.{base}")
    return getattr(module, variant)


def experiments_folder() -> pathlib.Path:
    """The folder `experiments` beside the installed `lm`."""
    return pathlib.Path(__file__).resolve().parents[2] / "experiments"


def _experiments() -> list[str]:
    return [f.stem for f in experiments_folder().glob("*.py") if not f.stem.startswith("_")]


def _public_functions(file: pathlib.Path) -> list[str]:
    body = ast.parse(file.read_text()).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
