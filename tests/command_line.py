"""Runs commands in the test's own process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from bnkit import UserError
from bnkit.cli import app


def run(*arguments: object) -> Result:
    """What a command printed and its exit code, as they are; an error that the command lets through is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def call(*arguments: object) -> Result:
    """As `run`, but bad use raises the `UserError` whose words were printed."""
    result = run(*arguments)
    _, ours, message = f"\n{result.stderr}".rpartition("\nbnkit: ")
    if result.exit_code == 2 and ours:
        raise UserError(message.removesuffix("\n"))
    return result
