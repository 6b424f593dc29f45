"""Masked tokens, pairs and detection by the verbs: every figure over the whole validation split, and export."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lm
from lm.core import params as specs
from lm.data import corpus as corpora
from lm.data.stream import Stream
from lm.main.corpora import scorer
from lm.models.electra import Electra
from lm.models.encoder import Encoder
from lm.objectives.detect import Detect
from lm.objectives.mlm import MaskedLM
from lm.objectives.pairs import Pairs
from lm.parallel.mesh import Mesh
from lm.train.run import Evals, Run, Train, resolve
from tests.main.helpers import call

SMALL = {"layers": 1, "max_len": 16, "init_std": 0.2}
ENCODER = Encoder(**SMALL, width=16, heads=2, outputs=("tokens", "pair"))
ELECTRA = Electra(
    Encoder(**SMALL, width=16, heads=2, outputs=("detect",)), Encoder(**SMALL, width=8, heads=1, embed_width=16)
)
MASKED = {"loss", "accuracy", "masked_nll"}
PAIRS = MASKED | {"pair_loss", "pair_accuracy"}
DETECT = {"loss", "accuracy", "detect_loss", "detect_accuracy", "detect_majority"}
ROWS = {
    "mlm": (ENCODER, MaskedLM(unit="word", max_ngram=2), MASKED),
    "static": (ENCODER, MaskedLM(copies=2), MASKED),
    "nsp": (ENCODER, Pairs("nsp"), PAIRS),
    "sop": (ENCODER, Pairs("sop", mlm=None), {"loss", "pair_accuracy"}),
    "detect": (ELECTRA, Detect(), DETECT),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """20 training documents and 5 to validate on, of 4 to 30 words."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in rng.integers(0, 40, rng.integers(4, 30))) for _ in range(25)]
    (folder / "text.txt").write_text("\n".join(lines))
    return corpora.build(f"lines:{folder}/text.txt", "word", folder / "corpus", validation=0.2)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "detect" else ()) for n in ROWS])
def test_figures_are_means_over_the_whole_split_whatever_the_batch(corpus, name):
    model, objective, names = ROWS[name]
    run = resolve(Run(model, objective, train=Train(seq_len=16)), corpus.tokenizer())
    params = specs.initialize(run.model.spec(), jax.random.key(0))
    split, mesh = corpus.split("validation"), dataclasses.replace(Mesh(), data=1).build(jax.devices()[:1])
    figures = [scorer(run.model, run.objective, split, mesh, size, Evals(), 16)(params) for size in (1, 4, 64)]
    assert set(figures[0]) == {f"val_{name}" for name in (*names, "loss_error")}
    # By hand, row by row, with no row past the end.
    stream = Stream(split, run.objective, 16, order="sequential")
    totals: dict[str, np.ndarray] = {}
    for i in range(stream.examples):
        terms = run.objective.loss(run.model, params, jax.tree.map(jax.numpy.asarray, stream.rows(i, 1)))
        for term, (total, weight, _) in terms.items():
            totals[term] = totals.get(term, 0) + np.array([float(total), float(weight)])
    by_hand = {term: total / weight for term, (total, weight) in totals.items()}
    by_hand["loss"] = by_hand.pop("nll", by_hand["loss"])
    for found in figures if name != "detect" else figures[:1]:  # Samples differ with the shape that they are drawn in.
        for term in names:
            np.testing.assert_allclose(found[f"val_{term}"], by_hand[term], rtol=1e-5)
    if name == "detect":
        np.testing.assert_allclose(figures[2]["val_loss"], figures[0]["val_loss"], rtol=1e-5)
    if "pair_accuracy" in names:
        assert (figures[2]["val_pair_accuracy"] * totals["pair_accuracy"][1]) == pytest.approx(
            totals["pair_accuracy"][0]
        )


@pytest.mark.slow
def test_a_trained_electra_becomes_either_class(corpus, tmp_path):
    (tmp_path / "tiny.py").write_text(
        "import lm.models.electra, lm.models.encoder, lm.objectives.detect, lm.train.run\n"
        "def run():\n"
        f"    from lm.models.encoder import Encoder, Layer\n    Electra = lm.models.electra.Electra\n"
        f"    model = {ELECTRA!r}\n"
        "    train = lm.train.run.Train(steps=2, batch_size=8, seq_len=16, eval_every=1, log_every=1)\n"
        "    return lm.train.run.Run(model, lm.objectives.detect.Detect(), train=train)\n"
    )
    workdir = tmp_path / "run"
    arguments = (f"--experiment={tmp_path / 'tiny.py'}", f"--workdir={workdir}", f"--corpus={corpus.folder}")
    assert call("train", *arguments) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {f"val_{name}" for name in DETECT} <= {name for row in rows for name in row}
    model, params = lm.load(workdir)
    for wanted, part in (("", "discriminator"), ("--architecture=ElectraForMaskedLM", "generator")):
        out = tmp_path / part
        assert call("convert", f"--checkpoint={workdir}", f"--out={out}", *filter(None, [wanted])) == 0
        again, weights = lm.load(out)
        assert again.width == model.parts[part].width
        ids = np.arange(10)[None]
        found = lm.interop.forward(again, weights, input_ids=ids)["logits"]
        if part == "generator":
            expected = model.logits(model.head(params), model.apply(params, {"tokens_BL": ids}).hidden_BLD)
            expected = expected[..., : model.valid_vocab_size]
        else:
            expected = model.detect_logits(params, {"tokens_BL": ids})
        np.testing.assert_allclose(found, expected, atol=1e-5)
