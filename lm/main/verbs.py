"""The verbs, and how each is run: its own flags, one line for what a user can mend, an exit code."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from lm.core import quiet
from lm.core.errors import UsageError, unknown

DONE, FAILED, USAGE, RESTART = 0, 1, 2, 75
SUSPICIOUS_RESULT = 17
INTERRUPTED = 130  # As shells number a process that Ctrl-C ended.

VERBS = {
    "train": "train an experiment; the same command continues it",
    "plan": "compile a run for hardware that is not there: does it fit, how fast, at what cost",
    "sweep": "train every run of a sweep; the same command runs what is missing",
    "report": "the table and the curves of a sweep's arms",
    "tokenizer": "train a tokenizer on a source of text",
    "corpus": "tokenise a source into a corpus folder, or verify one",
    "evaluate": "loss, perplexity and bits per byte of a checkpoint",
    "generate": "continue a prompt with a checkpoint",
    "convert": "a Hugging Face folder to a run folder, and back",
    "diff": "the settings in which two runs differ",
    "fit": "fit a scaling law to finished runs, with intervals",
}

USAGE_TEXT = "usage: lm VERB [--flag=value ...]      lm VERB --help lists the flags\n\n" + "\n".join(
    f"  {verb:<10} {text}" for verb, text in VERBS.items()
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command `lm`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("help", "-h", "--help", "--helpfull"):
        print(USAGE_TEXT)
        sys.exit(DONE if arguments else USAGE)
    if arguments[0] not in VERBS:
        _refuse("lm", unknown("verb", arguments[0], VERBS))
    run(arguments[0], arguments[1:])


def run(verb: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one verb and exits with its code.

    A verb's module has `define(flag_values)`, which registers its flags, and `main(flag_values)`, which
    returns an exit code. UsageError and flag errors exit 2 with one line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = f"lm {verb}"
    module = importlib.import_module(f"lm.main.{verb}")
    values = flags.FlagValues()
    module.define(values)
    if any(a in ("--help", "-help", "-h", "--helpfull", "--helpshort") for a in arguments):
        print(f"{name}: {VERBS[verb]}\n\n{(module.__doc__ or '').strip()}\n\n{_flag_help(values)}")
        sys.exit(DONE)
    try:
        rest = values([name, *arguments])[1:]
        if rest and not getattr(module, "POSITIONAL", False):
            raise UsageError(f"unexpected argument {rest[0]!r}: flags have the form --name=value")
    except flags.Error as error:
        _refuse(name, error)
    except UsageError as error:
        _refuse(name, error)
    values.mark_as_parsed()
    flags.FLAGS.mark_as_parsed()  # Libraries that read absl's global flags ask whether they were parsed.
    _quiet_platform()
    try:
        code = module.main(values, *([rest] if getattr(module, "POSITIONAL", False) else []))
    except UsageError as error:
        code = USAGE
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print(f"{name}: interrupted", file=sys.stderr)
    except Exception:
        code = FAILED
        traceback.print_exc()
    if code not in (DONE, RESTART):
        _abandon_peers(code)
    sys.stdout.flush()
    sys.exit(code)


def _abandon_peers(code: int) -> None:
    """Without jax there are no peers to wait for this process at its exit."""
    if "jax" in sys.modules:
        from lm.parallel import hosts

        hosts.abandon(code)


def _flag_help(values: flags.FlagValues) -> str:
    own = (values[name] for name in sorted(values))
    return "\n".join(f"  --{f.name}{'' if f.boolean else '=' + _shown(f)}\n      {f.help}" for f in own)


def _shown(flag: flags.Flag) -> str:
    return "" if flag.default in (None, []) else str(flag.default)


def _refuse(name: str, error: Exception) -> NoReturn:
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(USAGE)


def _quiet_platform() -> None:
    """Without an accelerator on the machine JAX is told so: an installed TPU or CUDA plugin stays silent."""
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0", "/dev/kfd", "/dev/dxg")
    if "JAX_PLATFORMS" not in os.environ and not any(os.path.exists(d) for d in devices):
        os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("JAX_PLATFORMS") == "cpu" and importlib.util.find_spec("jax_cuda12_plugin"):
        with quiet.libraries():
            importlib.import_module("jax")
