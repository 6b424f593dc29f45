"""The run of `tiny.py` with a fault put into its batches, for tests of what is done about it."""

import functools
import importlib.util
import pathlib
import time

import jax

from lm.main import corpora
from lm.train.run import Run

HUNG_FROM = 20

_spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def slow() -> Run:
    """Every process takes its time, so that a signal comes in the middle."""
    return _with(lambda process, batch: 0.1)


def straggler() -> Run:
    """Process 1 takes longer for its batches."""
    return _with(lambda process, batch: 0.05 * (process == 1))


def hung() -> Run:
    """Process 1 waits for ever for its 20th batch of a start."""

    def sleep_s(process, batch):
        if (process, batch) != (1, HUNG_FROM):
            return 0
        print("hangs from now on", flush=True)
        return 1e6

    return _with(sleep_s)


def _with(sleep_s) -> Run:
    original = corpora.training_batches

    @functools.wraps(original)
    def faulty(*arguments):
        for i, batch in enumerate(original(*arguments)):
            time.sleep(sleep_s(jax.process_index(), i + 1))
            yield batch

    corpora.training_batches = faulty
    return tiny.run()
