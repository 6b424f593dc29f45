"""`lm fit` writes its three files, reads CSVs and row.json files, and refuses or warns by name."""

import json

import numpy as np
import pytest

from tests.main.helpers import call
from tests.report.rows import surface

MISFIT = "lack of fit"


def write_csv(path, **columns):
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_rows(folder, rows):
    for i, row in enumerate(rows):
        (folder / f"r{i}").mkdir(parents=True)
        (folder / f"r{i}" / "row.json").write_text(json.dumps(row))
    return folder


def rows_of(columns, **more):
    return [
        dict(zip(columns, map(float, values), strict=True))
        | {"status": "done", "decayed": True, "convention": "all"}
        | more
        for values in zip(*columns.values(), strict=True)
    ]


def small(noise=0.002):
    columns = surface(1.69, 406.4, 410.7, 0.34, 0.28, budgets=5, sizes=5, noise=noise)
    return {name: columns[name] for name in ("N", "D", "loss")}


def run(tmp_path, runs, *arguments, form="chinchilla", bootstrap=0):
    out = tmp_path / "fit"
    code = call("fit", f"--runs={runs}", f"--form={form}", f"--out={out}", f"--bootstrap={bootstrap}", *arguments)
    return json.loads((out / "fit.json").read_text()) if code == 0 else code


def test_a_csv_is_fitted_and_the_three_files_are_written(tmp_path, capsys):
    found = run(tmp_path, write_csv(tmp_path / "points.csv", **small()), "--predict=7e10,1.4e12", bootstrap=40)
    assert {"form", "params", "derived", "objective", "intervals", "diagnostics", "warnings"} <= set(found)
    assert list(found["params"]) == ["E", "A", "B", "alpha", "beta"]
    low, high = found["intervals"]["a"]
    assert low < found["derived"]["a"] < high and low < 0.4516 < high
    assert found["derived"]["predicted_loss"] == pytest.approx(1.95, abs=0.03)
    assert isinstance(found["objective"], float) and not any(MISFIT in w for w in found["warnings"])
    text = (tmp_path / "fit" / "fit.txt").read_text()
    assert text.index("\n a ") < text.index("\n E ") and text in capsys.readouterr().out
    assert (tmp_path / "fit" / "fit.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("form", ["power", "kaplan", "overtrain", "isoflop"])
def test_every_form_of_n_d_loss_writes_a_figure_and_a_table(tmp_path, form):
    columns = small(noise=0)
    found = run(tmp_path, write_csv(tmp_path / "p.csv", **columns), *(["--x=N"] if form == "power" else []), form=form)
    assert found["form"] == form and (tmp_path / "fit" / "fit.png").exists()


def test_a_seed_gives_the_same_intervals(tmp_path):
    points = write_csv(tmp_path / "p.csv", **small())
    first, again, other = (run(tmp_path, points, f"--seed={s}", bootstrap=20)["intervals"] for s in (1, 1, 2))
    assert first == again != other


def test_row_files_are_read_and_unusable_runs_left_out_by_name(tmp_path):
    rows = rows_of(small())
    rows[3] |= {"status": "failed", "loss": None}
    rows[4] |= {"decayed": False, "name": "half-way"}
    rows[5]["loss"] = float("nan")
    found = run(tmp_path, write_rows(tmp_path / "runs", rows))
    assert found["rows"] == 22
    assert [w for w in found["warnings"] if "left out" in w] == [
        "left out, status is not done: r3",
        "left out, learning rate not decayed: half-way",
        "left out, loss is no positive number: r5",
    ]


def test_runs_that_vary_the_learning_rate_are_fitted_from_their_row_files(tmp_path):
    rows = [
        {"N": n, "D": 20 * n, "learning_rate": lr, "loss": 2 + 0.01 * np.log2(lr / (3 * n**-0.4)) ** 2}
        for n in (1e6, 1e7, 1e8)
        for lr in 3 * n**-0.4 * 2.0 ** np.arange(-3, 3)
    ]
    found = run(tmp_path, write_rows(tmp_path / "runs", rows), "--predict=1e9,2e10", form="hparams", bootstrap=10)
    assert found["params"] == pytest.approx({"lr_constant": 3, "lr_N": -0.4})
    assert found["derived"]["predicted_lr"] == pytest.approx(3 * 1e9**-0.4)
    assert (tmp_path / "fit" / "fit.png").exists()


@pytest.mark.parametrize("case", ["rising", "constant", "one ratio"])
def test_rows_without_a_law_are_warned_about(tmp_path, case):
    columns = small(noise=0)
    if case == "one ratio":
        columns["D"] = 20 * columns["N"]
        columns["loss"] = 1.69 + 400 * columns["N"] ** -0.34
    else:
        columns["loss"] = np.log(columns["N"]) if case == "rising" else np.full(25, 3.0)
    found = run(tmp_path, write_csv(tmp_path / "p.csv", **columns), bootstrap=5)
    assert any(
        {"rising": "alpha ended", "constant": "A ended", "one ratio": "correlate 1.000"}[case] in w
        for w in found["warnings"]
    )


def test_a_misfit_says_so_in_its_warnings(tmp_path):
    columns = small(noise=0)
    columns["loss"] = columns["loss"] + 3e9 / (columns["N"] ** 0.5 * columns["D"] ** 0.55)
    found = run(tmp_path, write_csv(tmp_path / "p.csv", **columns))
    assert sum(MISFIT in w for w in found["warnings"]) == 1


def test_d_is_found_from_n_and_c(tmp_path):
    columns = small(noise=0)
    columns["C"] = 6 * columns["N"] * columns.pop("D")
    found = run(tmp_path, write_csv(tmp_path / "p.csv", **columns))
    assert found["params"]["beta"] == pytest.approx(0.28) and "the rows have no D: it is C / 6N" in found["warnings"]


def bad(tmp_path, case):
    """Points of which `case` is wrong."""
    columns = small()
    few = {name: values[:4] for name, values in columns.items()}
    if case == "empty":
        return write_csv(tmp_path / "p.csv", N=[], D=[], loss=[])
    if case == "few":
        return write_csv(tmp_path / "p.csv", **few)
    if case == "same N":
        return write_csv(tmp_path / "p.csv", **columns | {"N": np.full(25, 1e8)})
    if case == "column":
        return write_csv(tmp_path / "p.csv", N=columns["N"], tokens=columns["D"], loss=columns["loss"])
    if case == "nan":
        return write_csv(tmp_path / "p.csv", **columns | {"loss": ["nan"] * 25})
    if case == "binary":
        (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00\x01" * 9)
        return tmp_path / "p.csv"
    rows = rows_of(columns)
    if case == "mixed":
        rows[7]["convention"] = "head"
    if case == "undecayed":
        rows = rows_of(columns, decayed=False)
    write_rows(tmp_path / "runs", rows)
    if case == "not json":
        (tmp_path / "runs" / "r2" / "row.json").write_text("{")
    if case == "no rows":
        return tmp_path / "runs" / "r0" / "deeper"
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "holds no rows"),
        ("few", "4 rows are fewer than the 5 parameters"),
        ("same N", "N has 1 distinct values (1e+08) in 25 rows"),
        ("column", "has no column 'D'"),
        ("nan", "loss is no positive number: row 1, row 2"),
        ("binary", "is not a CSV file"),
        ("mixed", "mix conventions of N and C: 'all' (r0, "),
        ("undecayed", "learning rate not decayed: r0, r1"),
        ("not json", "r2/row.json is not JSON"),
        ("no rows", "there is no such file or folder"),
    ],
)
def test_rows_that_allow_no_fit_exit_2_with_one_line_that_names_them(tmp_path, capsys, case, message):
    runs = bad(tmp_path, case)
    assert run(tmp_path, runs) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--form=chinchila"], "did you mean chinchilla"),
        (["--objective=huver"], "did you mean huber"),
        (["--delta=0"], "--delta=0.0 must be greater than 0"),
        (["--delta=1e-3", "--objective=mse"], "--delta=0.001 has no effect"),
        (["--objective=lad", "--form=isoflop"], "have no effect on isoflop"),
        (["--bootstrap=-1"], "--bootstrap=-1 must be 0 or more"),
        (["--predict=7e10"], "--predict takes N,D, and got 1 values"),
        (["--predict=many,few"], "is not numbers"),
        (["--nofloor"], "no effect on chinchilla"),
        (["--form=power"], "N and D both vary"),
        (["--form=hparams"], "neither lr nor batch"),
        (["--form=frontier"], "frontier needs 4"),
        (["--drop_highest=99"], "0 rows are fewer"),
        (["--runs=nowhere.csv"], "--runs=nowhere.csv: there is no such file or folder"),
    ],
)
def test_mistaken_flags_exit_2_with_one_line(tmp_path, capsys, arguments, message):
    assert run(tmp_path, write_csv(tmp_path / "p.csv", **small()), *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_budgets_with_no_minimum_inside_are_refused_by_name(tmp_path, capsys):
    columns = surface(1.69, 406.4, 410.7, 0.34, 0.28, budgets=3, sizes=9)
    upper = columns["N"] >= np.repeat(columns["N"][4::9], 9)
    points = write_csv(tmp_path / "p.csv", **{name: values[upper] for name, values in columns.items()})
    assert run(tmp_path, points, form="isoflop") == 2
    assert "minimum is at the edge of the sizes: C = 1e+18" in capsys.readouterr().err
