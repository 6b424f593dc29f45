"""Sentences through a recurrent encoder-decoder by the verbs: trained, scored and written again."""

import numpy as np
import pytest

from lm.core import files
from lm.data import corpus as corpora
from tests.main.helpers import call


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["additive", "none"])
def test_an_autoencoder_is_trained_scored_and_writes(attention, tmp_path, capsys):
    words = np.random.default_rng(0).choice(list("uvwxyz"), (400, 3))
    (tmp_path / "text.txt").write_text("".join(f"{a} is {b} than {c}\n" for a, b, c in words))
    corpus = corpora.build(f"text:{tmp_path / 'text.txt'}", "word", tmp_path / "corpus", validation=0.2)
    (tmp_path / "tiny.py").write_text(
        "from lm.models.seq2seq import Seq2Seq\n"
        "from lm.objectives.autoencode import Autoencode\n"
        "from lm.train.run import Run, Train\n"
        "from lm.train.schedules import Constant\n"
        "def run():\n"
        f"    model = Seq2Seq(width=16, hidden=32, attention={attention!r})\n"
        "    train = Train(steps=200, batch_size=16, seq_len=8, eval_every=100, save_every=200)\n"
        "    return Run(model, Autoencode(), schedule=Constant(5e-3), train=train)\n"
    )
    workdir = tmp_path / "run"
    arguments = (f"--experiment={tmp_path / 'tiny.py'}", f"--workdir={workdir}", f"--corpus={corpus.folder}")
    assert call("train", *arguments) == 0 and files.path(workdir / "row.json").exists()
    capsys.readouterr()
    assert call("evaluate", f"--checkpoint={workdir}", f"--corpus={corpus.folder}") == 0
    figures = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert float(figures["loss"]) < 0.5
    assert call("generate", f"--checkpoint={workdir}", "--prompt=u is v than z", "--temperature=0") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["u is v than z", ""]
