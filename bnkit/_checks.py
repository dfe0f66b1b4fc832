"""Argument validation and the words of its errors."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

_SHOWN = 80


class UserError(ValueError):
    """A mistake in what the caller asked for; the message is one line that ends with the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class FailedCheck(UserError):
    """What was asked for could be done, but what came out does not stand its check. The command line exits with 1."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a `name` that is none of `choices`, or no string at all; with the nearest of them."""
    choices = sorted(choices)
    others = f" and {len(choices) - _SHOWN} more" if len(choices) > _SHOWN else ""
    hint = f"choose one of {', '.join(choices[:_SHOWN])}{others}."
    if not isinstance(name, str):
        return UserError(f"{kind} must be a name, got {textwrap.shorten(repr(name), 80, placeholder=' ...')}: {hint}")
    near = difflib.get_close_matches(name.lower(), choices, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    return UserError(f"unknown {kind} {name!r}: {hint}")


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_seed(seed: int) -> None:
    """Raise unless torch takes `seed`, and as many consecutive ones as anyone needs."""
    require(seed >= 0, f"the seed must not be negative, got {seed}: choose another.")
    require(seed < 2**63, f"the seed must be less than 2^63, got {seed}: choose another.")


def words_of(error: Exception) -> str:
    """What `error` is and says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
