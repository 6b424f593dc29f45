"""Word vectors beside gensim's, in one run: quality and time of skip-gram with negative sampling on the same words.

  python -m experiments.bench.word2vec --text=brown.txt.gz --pairs=EN-WS-353-ALL.txt --pairs=EN-SIMLEX-999.txt

Sides take turns, seed by seed, each in a process of its own. gensim has one worker, and its time is that of training
alone; ours is that of the whole command, from its start to the saved run. The last line is JSON.
"""

import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

VOCABULARY = 14044  # The words that occur five times, <unk> and <eos>.

_TEXT = flags.DEFINE_string("text", None, "the Brown corpus, a sentence a line, gzipped", required=True)
_PAIRS = flags.DEFINE_multi_string("pairs", None, "files of word similarity", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each side", lower_bound=1)


def ours(text: str, pairs: list[str], folder: str, seed: int) -> dict[str, float]:
    """{"seconds", file: Spearman} of `lm train --experiment=word2vec_brown` and `lm evaluate`."""
    corpus, workdir = os.path.join(folder, "corpus"), os.path.join(folder, f"run{seed}")
    _lm("corpus", f"--source=text:{text}", f"--tokenizer=folded:{VOCABULARY}", f"--out={corpus}")
    start = time.perf_counter()
    seeds = [f"--set={name}.seed={seed}" for name in ("train", "data")]
    _lm("train", "--experiment=word2vec_brown", f"--corpus={corpus}", f"--workdir={workdir}", *seeds)
    seconds = time.perf_counter() - start
    lines = {name: _lm("evaluate", f"--checkpoint={workdir}", f"--suite=similarity:{name}") for name in pairs}
    return {"seconds": seconds} | {name: float(out.split("spearman: ")[1].split()[0]) for name, out in lines.items()}


def gensims(text: str, pairs: list[str], folder: str, seed: int) -> dict[str, float]:
    """The same of gensim's Word2Vec."""
    from gensim.models import word2vec

    from lm.data import clean

    words = os.path.join(folder, "words.txt")
    with gzip.open(text, "rt") as raw, open(words, "w") as folded:
        folded.write(" ".join(clean.fold(raw.read()).split()) + "\n")
    model = word2vec.Word2Vec(
        sg=1, negative=5, vector_size=100, window=15, sample=1e-4, alpha=0.025, min_count=5, workers=1, seed=seed
    )
    sentences = word2vec.LineSentence(words)
    model.build_vocab(sentences)
    start = time.perf_counter()
    model.train(sentences, total_examples=model.corpus_count, epochs=5)
    seconds = time.perf_counter() - start
    found = {name: model.wv.evaluate_word_pairs(name, case_insensitive=True)[1].statistic for name in pairs}
    return {"seconds": seconds} | {name: float(spearman) for name, spearman in found.items()}


def _lm(*arguments: str) -> str:
    command = [sys.executable, "-m", "lm.main", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(argv: list[str]) -> None:
    """Prints one line a run, and the JSON line of means."""
    sides, rows = {"gensim": gensims, "ours": ours}, {"gensim": [], "ours": []}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, _SEEDS.value + 1):
            for name, side in sides.items():
                with context.Pool(1) as pool:
                    rows[name].append(pool.apply(side, (_TEXT.value, _PAIRS.value, folder, seed)))
                shown = "  ".join(f"{os.path.basename(k)} {v:.3f}" for k, v in rows[name][-1].items())
                print(f"{name:>8} seed {seed}: {shown}", flush=True)
    means = {
        name: {os.path.basename(k): round(statistics.mean(row[k] for row in found), 4) for k in found[0]}
        for name, found in rows.items()
    }
    ratio = means["ours"]["seconds"] / means["gensim"]["seconds"]
    print(json.dumps(means | {"times_slower": round(ratio, 2), "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    app.run(main)
