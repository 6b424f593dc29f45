"""What libraries write to standard error without being asked."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Nothing that is written to the process's standard error inside is seen; exceptions pass.

    The plugins of jax report, from C++, hardware that is not there, and no setting keeps them from it.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
