"""`lm tokenizer` writes one file, and refuses with exit code 2 and one line."""

import pytest

from lm.data import tokenizers
from lm.main import verbs


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        verbs.run("tokenizer", list(arguments))
    return done.value.code


def test_a_tokenizer_is_trained_into_one_file(tmp_path, capsys):
    (tmp_path / "input.txt").write_text("to be or not to be\n" * 50)
    out = tmp_path / "my.model"
    assert run(f"--source=text:{tmp_path}/input.txt", "--kind=bpe", "--vocab_size=280", f"--out={out}") == 0
    assert "280 ids" in capsys.readouterr().out
    assert tokenizers.load(out).vocab_size == 280 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind=bpe", "--out={0}/t"], "--source is missing"),
        (["--source=python", "--kind=bp", "--out={0}/t"], "did you mean bpe"),
        (["--source=python", "--kind=bpe", "--vocab_size=0", "--out={0}/t"], "vocab_size"),
    ],
)
def test_mistakes_exit_2_with_one_line(tmp_path, capsys, arguments, message):
    assert run(*(a.format(tmp_path) for a in arguments)) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1
    assert not any(tmp_path.iterdir())
