"""A model of spelled words as a run: its checkpoints hold the spelling."""

import jax
import numpy as np
import pytest

import lm
from lm.data.stream import Data
from lm.layers.char_cnn import CharCNN
from lm.models.recurrent import Recurrent
from lm.objectives.causal import Causal
from lm.train.optimizers import SGD
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Constant
from tests.main.helpers import call, losses

CNN = CharCNN(width=8, filters=((1, 8), (2, 8)), max_characters=8)


def run() -> Run:
    """An experiment, of which this file is the name."""
    return Run(
        model=Recurrent(layers=1, width=16, characters=CNN),
        objective=Causal(),
        data=Data(order="lanes", tokenizer="word", validation=0.2),
        optimizer=SGD(),
        schedule=Constant(peak=1.0),
        train=Train(steps=6, batch_size=8, seq_len=8, log_every=1, eval_every=6, save_every=3, ema_decay=0.5),
        evals=Evals(batch_size=8, sample_tokens=3),
    )


@pytest.mark.slow
def test_a_run_spells_its_tokenizers_words_and_its_folder_keeps_them(tmp_path, capfd):
    rng = np.random.default_rng(0)
    words = np.array(["tom", "saw", "a", "cat", "cats", "."])
    text = "\n".join(" ".join(rng.choice(words, 9)) for _ in range(300))
    (tmp_path / "text").write_text(text)
    workdir = tmp_path / "run"
    arguments = (f"--experiment={__file__}", f"--workdir={workdir}")
    assert call("train", *arguments, f"--set=data.source=text:{tmp_path}/text", "--set=train.steps=3") == 0
    assert call("train", *arguments, f"--set=data.source=text:{tmp_path}/text") == 0
    assert losses(workdir)[6] < losses(workdir)[1]

    model, params = lm.load(str(workdir))
    pieces = lm.load_tokenizer(str(workdir)).pieces
    expected = CNN.with_pieces({"spelling": jax.numpy.zeros(params["embed"]["spelling"].shape)}, pieces)["spelling"]
    # The average over steps, which is what is loaded, is rounded once a step.
    np.testing.assert_allclose(params["embed"]["spelling"], expected, rtol=1e-6)
    assert call("generate", f"--checkpoint={workdir}", "--prompt=tom saw", "--tokens=3") == 0
    assert call("evaluate", f"--checkpoint={workdir}", f"--source=text:{tmp_path}/text") == 0
    assert "loss: " in capfd.readouterr().out
