"""The error that a user can mend, with the nearest valid name in its message."""

import difflib
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """Something that a changed command line or config mends; the verbs exit 2 on it.

    The message is one line that names the field, its value, what is allowed and the way out.
    """


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UsageError:
    """A UsageError that names `name`, the nearest of `allowed`, and all of them where they are few."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    listed = f" (one of {', '.join(names)})" if len(names) <= 24 else ""
    return UsageError(f"unknown {kind} {name!r}{hint}{listed}")


def check_choice(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise unknown(field, value, allowed)


def check_positive(**values: float) -> None:
    """Raises UsageError for the first keyword whose value is not above zero."""
    for field, value in values.items():
        if not value > 0:
            raise UsageError(f"{field}={value} must be greater than 0")


def check_given(config: Any, *names: str) -> None:
    """Raises UsageError for the first of the fields that is neither None nor above zero."""
    check_positive(**{name: value for name in names if (value := getattr(config, name)) is not None})
