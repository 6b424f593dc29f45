"""Word2vec and fastText on the Brown corpus, a million words.

Claim: the vectors rank word pairs as well as gensim's: Spearman 0.351 on WordSim-353 and 0.118 on SimLex-999,
where gensim 4.4 has 0.337 and 0.132 with the same settings (experiments/bench/word2vec.py, three seeds).
Command: lm corpus --source=text:brown.txt.gz --tokenizer=folded:14044 --out=runs/brown
         lm train --experiment=word2vec_brown --corpus=runs/brown --workdir=runs/w2v
         lm evaluate --checkpoint=runs/w2v --suite=similarity:EN-WS-353-ALL.txt
Kind folded drops capitals and punctuation; 14,044 ids are the 14,042 words that occur five times, <unk> and <eos>.
Hardware and time: 2 CPU cores, 1.2 minutes, 2.8 times that of gensim with one worker.
"""

import dataclasses

from lm.models.word2vec import Word2Vec
from lm.objectives.hierarchical import Hierarchical
from lm.objectives.skipgram import Negative, Neighbours
from lm.train.optimizers import SGD, AdamW
from lm.train.run import Run, Train
from lm.train.schedules import Linear


def run() -> Run:
    """Skip-gram with negative sampling, five epochs in rows of 512 tokens, one a step: see Neighbours for its rate."""
    return Run(
        model=Word2Vec(width=100),
        objective=Neighbours("skipgram", reach=15, sample=1e-4, output=Negative(count=5)),
        optimizer=SGD(clip_norm=None),
        schedule=Linear(peak=0.025, final=1e-4),
        train=Train(steps=10656, batch_size=1, seq_len=512, save_every=5000, log_every=500),
    )


def hierarchical() -> Run:
    """Over the Huffman tree in place of negative samples.

    Every pair of a row passes the root, and steps of 0.025 for each of some 3,700 at once diverge (step 137): Adam's
    are as long however many there are. A step takes ten times as long as against samples; 600 were tried.
    """
    adam = AdamW(b2=0.999, weight_decay=0.0, clip_norm=None)
    return dataclasses.replace(_with(output=Hierarchical()), optimizer=adam, schedule=Linear(peak=2e-3, final=1e-5))


def cbow() -> Run:
    """The mean of the neighbours predicts the word; a rate of its own, because each gets its share of the gradient.

    WordSim-353 0.27, SimLex-999 0.08 (one seed).
    """
    return dataclasses.replace(_with(kind="cbow"), schedule=Linear(peak=0.25, final=1e-3))


def fasttext() -> Run:
    """With character n-grams, on the text as it is: a corpus of --tokenizer=word:15175, whose lines are sentences.

    A step takes ten times as long as without n-grams; 400 were tried.
    """
    objective = _with(reach=5, within="line", ngrams=(3, 6)).objective
    model = Word2Vec(width=100, buckets=1 << 16)
    return dataclasses.replace(run(), model=model, objective=objective, schedule=Linear(peak=0.5, final=2e-3))


def _with(**settings: object) -> Run:
    base = run()
    return dataclasses.replace(base, objective=dataclasses.replace(base.objective, **settings))
