"""Processes start together, end together, and say why."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "local.py"
RANK = "import os, sys, time; rank = int(os.environ['LM_PROCESS_ID']); "


def launch(code, *options, arguments=(), **popen):
    command = [sys.executable, str(SCRIPT), *options, "--", sys.executable, "-c", RANK + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def finish(process, timeout=30):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_it_needs_nothing_but_python():
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported <= set(sys.stdlib_module_names)


def test_each_process_gets_its_place_and_only_rank_0_speaks_plainly():
    code, out, _ = finish(
        launch("print(os.environ['LM_COORDINATOR'], os.environ['LM_NUM_PROCESSES'], rank)", "-n", "3")
    )
    lines = sorted(out.splitlines(), key=lambda line: line[-1])
    assert code == 0 and [line[-3:] for line in lines] == ["3 0", "3 1", "3 2"]
    assert lines[0].startswith("127.0.0.1:") and lines[1].startswith("[1] 127") and lines[2].startswith("[2] 127")
    assert len({line.split()[-3] for line in lines}) == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(75 if rank else 2)", 2),
        ("os.kill(os.getpid(), 9) if rank else time.sleep(60)", 137),
        ("sys.exit(3) if rank else time.sleep(60)", 3),
    ],
)
def test_the_worst_code_is_kept_and_nobody_waits_for_the_dead(code, expected):
    start = time.monotonic()
    assert finish(launch(code, "-n", "2"))[0] == expected and time.monotonic() - start < 10


def test_what_a_process_started_ends_with_it(tmp_path):
    parent = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"print(child.pid, file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True)\ntime.sleep(60)"
    )
    failing = "\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\ntime.sleep(0.2)\nsys.exit(4)"
    code = f"\nif rank: exec({parent!r}){failing}"
    assert finish(launch(code, "-n", "2", arguments=[str(tmp_path / "pid")]))[0] == 4
    stat = pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_signals_reach_every_process_and_stop_restarts(number):
    # One write a line even where stdout is unbuffered: two processes share it.
    say = "print('up\\n', end='', flush=True)"
    code = f"import signal; signal.signal({int(number)}, lambda *_: sys.exit(75)); {say}; time.sleep(60)"
    process = launch(code, "-n", "2", "--restarts", "5")
    for _ in range(2):
        assert process.stdout.readline().endswith("up\n")
    process.send_signal(number)
    assert finish(process)[0] == 75


def test_75_starts_again_until_done_while_steps_go_on(tmp_path):
    code = (
        "import pathlib; folder = pathlib.Path(sys.argv[1].split('=')[1]) / 'checkpoints'; "
        "step = len(list(folder.glob('*'))); (folder / str(step + 1)).mkdir(parents=True); "
        "sys.exit(75 if step < 5 else 0)"
    )
    code, _, err = finish(launch(code, "--restarts", "9", arguments=[f"--workdir={tmp_path}"]))
    assert code == 0 and err.count("starting again") == 5


def test_a_crash_loop_is_stopped_after_three_attempts_at_one_step(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    code, out, err = finish(
        launch("print('try'); sys.exit(75)", "--restarts", "9", arguments=["--workdir", str(tmp_path)])
    )
    assert code == 1 and out.count("try") == 3 and "3 attempts ended at step 7 with exit code 75" in err


def test_a_bug_is_not_started_again():
    code, out, _ = finish(launch("print('try'); sys.exit(1)", "--restarts", "9"))
    assert code == 1 and out.count("try") == 1


def test_a_missing_command_is_a_usage_error():
    result = subprocess.run([sys.executable, str(SCRIPT), "-n", "2"], capture_output=True, env=os.environ)
    assert result.returncode == 2
    result = subprocess.run([sys.executable, str(SCRIPT), "--", "no-such-command"], capture_output=True, text=True)
    assert result.returncode == 2 and "no-such-command" in result.stderr and "Traceback" not in result.stderr
