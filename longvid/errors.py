"""The errors that a user can meet, each with the exit code of the command line."""

from __future__ import annotations


class LongvidError(Exception):
    """Base of all errors that end a command with one message and no traceback."""

    exit_code = 1


class InputError(LongvidError, ValueError):
    """The user's input is wrong: a storyboard, a setting, a model directory, an output path."""

    exit_code = 2


class RuntimeFailure(LongvidError, RuntimeError):
    """A rank, device or disk failed, or the latents are not finite."""

    exit_code = 3


class Interrupted(LongvidError):
    """The user stopped the work; the message says what is there and how to go on."""

    exit_code = 130


class Preempted(LongvidError):
    """The render was asked to make room, and ended with its state saved; the message says how to go on.

    No failure: whoever asked knows. Empty on ranks other than the leader.
    """

    exit_code = 0
