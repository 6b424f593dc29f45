"""`lm corpus` builds, keeps, verifies, and refuses with exit code 2 and one line."""

import pytest

from lm.main import verbs


@pytest.fixture
def text(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be\n" * 50)
    return f"text:{tmp_path}/input.txt"


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        verbs.run("corpus", list(arguments))
    return done.value.code


def test_a_corpus_is_built_kept_and_verified(tmp_path, text, capsys):
    build = (f"--source={text}", "--tokenizer=char", "--validation=0.1", f"--out={tmp_path}/c")
    assert run(*build) == 0
    printed = capsys.readouterr().out
    assert "train: 1 documents, 900 tokens, 900 bytes" in printed and "validation: 1 documents, 100 tokens" in printed
    assert run(*build) == 0 and "already" in capsys.readouterr().out
    assert run("--verify", f"--out={tmp_path}/c") == 0 and "agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing"),
        (["--out={0}/c"], "--source is missing"),
        (["--out={0}/c", "--source={1}s"], "did you mean input.txt"),
        (["--out={0}/c", "--source={1}", "--tokenizer=chr"], "no tokenizer file chr"),
        (["--out={0}/c", "--source={1}", "--validaton=0.1"], "validation"),
        (["--out={0}/c", "--verify"], "c"),
        (["--out={0}/c", "--verify", "--source={1}"], "leave out --source"),
    ],
)
def test_mistakes_exit_2_with_one_line(tmp_path, text, capsys, arguments, message):
    assert run(*(a.format(tmp_path, text) for a in arguments)) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_a_damaged_corpus_exits_2_and_names_the_file(tmp_path, text, capsys):
    assert run(f"--source={text}", "--tokenizer=byte", f"--out={tmp_path}/c") == 0
    shard = tmp_path / "c" / "train-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert run("--verify", f"--out={tmp_path}/c") == 2
    assert "train-00000.npy" in capsys.readouterr().err
