"""How a training can end before its time; apart from the rest, so that a mistake in the options imports no torch."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message says at which step and on which samples."""


class InterruptedRunError(RuntimeError):
    """Training was stopped by Ctrl-C after writing a checkpoint."""


class PeerFailedError(RuntimeError):
    """Another process of this run failed; the message names it and its error."""
