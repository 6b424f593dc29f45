"""Prints the settings in which two runs differ: lm diff RUN RUN

lm diff runs/a runs/b
"""

from absl import flags

from lm.core.errors import UsageError

POSITIONAL = True


def define(values: flags.FlagValues) -> None:
    """`lm diff` has no flags of its own."""


def main(values: flags.FlagValues, folders: list[str]) -> int:
    """Prints one line a setting, or that there is none; returns the exit code."""
    if len(folders) != 2:
        raise UsageError(f"lm diff takes two run folders, and got {len(folders)}")
    from rich.console import Console
    from rich.table import Table

    from lm.core import config
    from lm.train.folder import read_config

    runs = [read_config(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if run is None:
            raise UsageError(f"{folder} keeps no config.json: is it a run folder?")
    changes = config.diff(*runs)
    if not changes:
        print("the two runs have the same settings")
        return 0
    table = Table("setting", *folders)
    for name, pair in changes.items():
        table.add_row(name, *map(str, pair))
    Console().print(table)
    return 0


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("diff")
