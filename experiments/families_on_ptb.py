"""Every family that gives each next word a probability, on one corpus under one budget of training work.

The figure of `lm report` has validation loss over training FLOPs, a curve for each model that is trained and a point
for each that is counted. The budget is the same for all trained by gradients; counting, and the hidden Markov model,
which gains nothing after some epochs, end earlier. Each neural family is small, since most of the work goes into the
scores of 10,000 words, and has AdamW with one rate. Encoders and encoder-decoders have no place here: what they are
trained on is another loss.
Claim: at 5e12 operations, 0.4 to 0.9 epochs, validation perplexity is 163 of a GRU, 178 of an LSTM, 193 of a decoder as
PaLM's, 198 of gated convolutions, 221 of an NNLM and 229 to 248 of a decoder as GPT's, an Elman network, one that
spells its words, and a Performer; 364 of a Reformer, whose rows are too short to gain by hashing. Counting is ahead:
148 of Kneser-Ney's 5-gram, for a millionth of the work. One seed and one rate each.
Command: lm sweep --experiment=families_on_ptb[:small] --corpus=runs/ptb --workdir=runs/fam && lm report
--workdir=runs/fam
Hardware and time: 2 CPU cores, 15 minutes to an hour.
"""

import dataclasses
from typing import Any

from experiments import hmm_ptb, ngram_kn5
from lm.data.stream import Data
from lm.layers.char_cnn import CharCNN
from lm.layers.favor import Favor
from lm.layers.lsh import LSH
from lm.models.convolution import Convolution
from lm.models.decoder import Decoder
from lm.models.nnlm import NNLM
from lm.models.recurrent import Recurrent
from lm.models.reformer import Reformer
from lm.objectives.causal import Causal
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine

BUDGET = 5e12
WORDS = (
    10_000  # By which the steps are counted: Penn Treebank's. Another corpus brings its own words, to the same steps.
)
WIDTH, ROWS, LENGTH = 96, 16, 32


def run() -> list[Run]:
    """5e12 floating-point operations each, one epoch or more."""
    return families(BUDGET)


def small() -> list[Run]:
    """A tenth of it."""
    return families(BUDGET / 10)


def large() -> list[Run]:
    """Ten times as much, for a GPU."""
    return families(BUDGET * 10)


def families(budget: float) -> list[Run]:
    """Counted ones, the hidden Markov model, and each neural one for `budget` FLOPs of products."""
    counted = {"bigram": ngram_kn5.add_k(), "kn5": ngram_kn5.run(), "kn5_cache": ngram_kn5.cache()}
    named = counted | {"hmm": hmm_ptb.stepwise()}
    return [dataclasses.replace(run, name=name) for name, run in named.items()] + [
        _trained(name, model, peak, budget) for name, (model, peak) in _neural().items()
    ]


def _neural() -> dict[str, tuple[Any, float]]:
    """Each model and its rate."""
    # As narrow as they are, all start from larger values than their published settings.
    transformer = Decoder(layers=2, width=WIDTH, heads=4, max_len=LENGTH, init_std=0.1, scan=False)
    rotary = dataclasses.replace(transformer, positions="rotary", max_len=None, norm="rmsnorm", norm_bias=False)
    recurrent = Recurrent(layers=1, width=WIDTH, init_limit=0.5)
    filters = tuple((width, 25 * width) for width in range(1, 5))
    return {
        "nnlm": (NNLM(context=4, width=WIDTH, hidden=WIDTH), 3e-3),
        "elman": (dataclasses.replace(recurrent, cell="elman"), 3e-3),
        "gru": (dataclasses.replace(recurrent, cell="gru"), 1e-2),
        "lstm": (recurrent, 1e-2),
        "charcnn_lstm": (dataclasses.replace(recurrent, characters=CharCNN(filters=filters)), 1e-2),
        "gated_conv": (Convolution(blocks=(((4, WIDTH),),) * 4, width=WIDTH), 6e-3),
        "gpt": (transformer, 6e-3),
        "palm": (
            dataclasses.replace(rotary, kv_heads=1, block="parallel", activation="silu", gated=True, mlp_bias=False),
            6e-3,
        ),
        "performer": (dataclasses.replace(transformer, favor=Favor(features=64, chunk=LENGTH)), 6e-3),
        "reformer": (
            Reformer(
                layers=2, width=WIDTH, heads=4, max_len=LENGTH, init_std=0.1, lsh=LSH(rounds=2, chunk=8, buckets=(8,))
            ),
            6e-3,
        ),
    }


def _trained(name: str, model: Any, peak: float, budget: float) -> Run:
    sized = dataclasses.replace(model, vocab_size=WORDS, valid_vocab_size=WORDS)
    row = 3 * sized.forward_flops(sized.spec(), {"tokens_BL": LENGTH, "targets_BL": LENGTH})
    steps = max(8, round(budget / (row * ROWS)))
    carried = isinstance(model, Recurrent)
    return Run(
        name=name,
        model=model,
        objective=Causal(),
        data=Data(order="lanes" if carried else "shuffled"),
        optimizer=AdamW(b2=0.99, weight_decay=0.0, clip_norm=1.0),
        schedule=Cosine(peak=peak, warmup_steps=max(1, steps // 20)),
        train=Train(
            steps=steps, batch_size=ROWS, seq_len=LENGTH, eval_every=-(-steps // 8), save_every=steps, log_every=20
        ),
        evals=Evals(batch_size=ROWS),
    )
