"""`lm train`, `lm evaluate --suite` and `lm generate` on a model of words."""

import pytest

from tests.main.helpers import call

TEXT = "The cat, a cat and the dog.\nA king and a queen!\n" * 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text(TEXT)
    assert (
        call("corpus", f"--source=text:{folder / 'text.txt'}", "--tokenizer=folded", f"--out={folder / 'corpus'}") == 0
    )
    small = [f"--set={s}" for s in ("train.steps=3", "train.seq_len=64", "train.batch_size=8", "objective.sample=0")]
    train = ("train", "--experiment=word2vec_brown:fasttext", f"--corpus={folder / 'corpus'}")
    assert call(*train, f"--workdir={folder / 'run'}", "--set=model.buckets=64", *small) == 0
    return folder / "run"


def test_suites_print_their_figures(run, tmp_path, capfd):
    (tmp_path / "pairs.txt").write_text("Cat\tDog\t9\nking\tqueen\t8\ncat\tqueen\t1\nkitten\tqueen\t0\n")
    assert call("evaluate", f"--checkpoint={run}", f"--suite=similarity:{tmp_path / 'pairs.txt'}") == 0
    out = capfd.readouterr().out
    assert "spearman: " in out and "known: 4\npairs: 4\n" in out  # An unknown word has its n-grams.
    (tmp_path / "questions.txt").write_text(": family\ncat dog king queen\ncat kitten king queen\n")
    assert call("evaluate", f"--checkpoint={run}", f"--suite=analogies:{tmp_path / 'questions.txt'}") == 0
    out = capfd.readouterr().out
    assert "semantic_known: 1\n" in out and "skipped: 1\n" in out


@pytest.mark.parametrize(
    "verb, arguments, words",
    [
        ("generate", ["--prompt=the"], "continues no text"),
        ("evaluate", ["--source=text:x"], "no probability"),
        ("evaluate", ["--suite=similarity:nowhere"], "there is no file"),
        ("evaluate", ["--suite=similar:nowhere"], "similarity"),
    ],
)
def test_what_word_vectors_cannot_do_is_refused_in_one_line(run, capfd, verb, arguments, words):
    assert call(verb, f"--checkpoint={run}", *arguments) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "\n" not in err
