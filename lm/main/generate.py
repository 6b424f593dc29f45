"""Continues a prompt with a checkpoint.

lm generate --checkpoint=runs/shk_run --prompt='ROMEO:' --tokens=200 --temperature=0.8
"""

from absl import flags

from lm.core.errors import UsageError, check_positive
from lm.main.flags import required, value


def define(values: flags.FlagValues) -> None:
    """Registers the flags of `lm generate`."""
    flags.DEFINE_string("checkpoint", None, "a run folder, a step, or a Hugging Face folder", flag_values=values)
    flags.DEFINE_string("prompt", None, "the text to continue, or an encoder's to read", flag_values=values)
    flags.DEFINE_integer("tokens", 100, "how many tokens to add", flag_values=values)
    flags.DEFINE_integer("samples", 1, "how many continuations", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token each time", flag_values=values)
    flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens", flag_values=values)
    flags.DEFINE_float("top_p", None, "draw from the fewest tokens that hold this probability", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the same seed gives the same text", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Prints the prompt with its continuation; returns the exit code."""
    checkpoint, prompt = required(values, "checkpoint"), value(values, "prompt")
    if prompt is None:
        raise UsageError("--prompt is missing: the text to continue; --prompt='' starts a new document")
    check_positive(**{f"--{name}": value(values, name) for name in ("tokens", "samples")})
    import numpy as np

    from lm.interop.load import load, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt)
    if not len(ids):
        if tokenizer.eos_id is None:
            raise UsageError(f"--prompt='' needs an end-of-text token, and a {tokenizer.kind} tokenizer has none")
        ids = np.array([tokenizer.eos_id], np.int32)
    model, params = load(checkpoint)
    from lm.generate.sample import generate

    sampling = {name: value(values, name) for name in ("temperature", "top_k", "top_p", "seed")}
    rows = generate(
        model, params, [ids] * value(values, "samples"), value(values, "tokens"), eos_id=tokenizer.eos_id, **sampling
    )
    for number, row in enumerate(rows, 1):
        if len(rows) > 1:
            print(f"--- {number}")
        # What an encoder has read is no part of what its decoder writes. Words are parted where two of them meet.
        read = [] if hasattr(model, "encode") or not prompt else ids.tolist()
        print(tokenizer.decode([*read, *row]))
    return 0


if __name__ == "__main__":
    from lm.main.verbs import run as run_verb

    run_verb("generate")
