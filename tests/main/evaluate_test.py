"""`lm evaluate`, `lm generate` and `lm.load` on a run whose text has a known entropy."""

import re

import jax
import numpy as np
import pytest

import lm
from lm.data import corpus, synthetic
from tests.main.helpers import TINY, call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert call("train", f"--experiment={TINY}", f"--workdir={workdir}") == 0
    return workdir


def figures(text):
    return {name: float(value) for name, value in re.findall(r"^(\w+): (\S+)$", text, re.MULTILINE)}


def nats_per_token(run):
    """-ln q of every validation token but the first, in windows of 32 as training had them."""
    model, params = lm.load(run)
    split = corpus.Corpus(run / "corpus").split("validation")
    tokens = split.window(0, split.tokens)
    count = (len(tokens) - 1) // 32 * 32
    rows, targets = tokens[:count].reshape(-1, 32), tokens[1 : count + 1]
    hidden = model.apply(params, {"tokens_BL": rows}).hidden_BLD
    log_q = jax.nn.log_softmax(model.logits(model.head(params), hidden.reshape(count, -1)))
    return -np.asarray(log_q)[np.arange(count), targets], tokens[: count + 1]


def test_figures_are_those_of_a_plain_pass_over_every_token(run, capfd):
    assert call("evaluate", f"--checkpoint={run}", f"--corpus={run / 'corpus'}") == 0
    got = figures(capfd.readouterr().out)
    expected = nats_per_token(run)[0].mean()
    assert got["tokens"] == 4000
    # 31 of 3,999 predicted tokens are in the last, shorter window and not in the plain pass.
    assert got["loss"] == pytest.approx(expected, rel=5e-3)
    assert got["perplexity"] == pytest.approx(np.exp(got["loss"]), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / np.log(2), rel=1e-4)  # One byte a token here.


def test_batch_size_does_not_change_the_figures(run, capfd):
    seen = []
    for size in (8, 24):
        assert call("evaluate", f"--checkpoint={run}", f"--corpus={run / 'corpus'}", f"--batch_size={size}") == 0
        seen.append(figures(capfd.readouterr().out)["loss"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


def test_no_model_beats_the_source(run):
    chain = synthetic.parse("markov?symbols=8&tokens=40000&seed=1")
    loss, tokens = nats_per_token(run)
    gap = loss + chain.log_probability(tokens)
    assert gap.mean() > -4 * gap.std() / np.sqrt(len(gap))
    assert gap.mean() < 0.5 * (np.log(8) - chain.entropy_rate)


def test_a_source_of_text_is_scored(run, tmp_path, capfd):
    split = corpus.Corpus(run / "corpus").split("validation")
    text = lm.load_tokenizer(run).decode(split.window(0, split.tokens))
    (tmp_path / "held_out.txt").write_text(text)
    assert call("evaluate", f"--checkpoint={run}", f"--source=text:{tmp_path / 'held_out.txt'}") == 0
    source = figures(capfd.readouterr().out)
    assert call("evaluate", f"--checkpoint={run}", f"--corpus={run / 'corpus'}") == 0
    assert source == figures(capfd.readouterr().out)


def test_generation_repeats_with_its_seed_and_continues_the_prompt(run, capfd):
    texts = []
    for seed in (1, 1, 2):
        arguments = ("generate", f"--checkpoint={run}", "--prompt=!", "--tokens=40", f"--seed={seed}")
        assert call(*arguments) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("!") and len(texts[0].strip()) == 41


@pytest.mark.parametrize(
    "verb, arguments, words",
    [
        ("evaluate", ["--checkpoint=/nowhere", "--source=text:x"], "neither a run folder"),
        ("evaluate", ["--checkpoint={run}"], "give one of"),
        ("evaluate", ["--checkpoint={run}", "--source=txet:x"], "text"),
        ("evaluate", ["--checkpoint={run}", "--corpus={run}/corpus", "--split=test"], "no split 'test'"),
        ("generate", ["--checkpoint={run}"], "--prompt is missing"),
        ("generate", ["--checkpoint={run}", "--prompt=a"], "not in the vocabulary"),
        ("generate", ["--checkpoint={run}", "--prompt="], "end-of-text"),
        ("generate", ["--checkpoint={run}", "--prompt=!", "--top_p=2"], "top_p=2"),
        ("generate", ["--checkpoint={run}/checkpoints/7", "--prompt=!"], "neither a run folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, capfd, verb, arguments, words):
    assert call(verb, *(a.format(run=run) for a in arguments)) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "\n" not in err
