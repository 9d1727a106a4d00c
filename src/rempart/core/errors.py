"""Every error Rempart raises on purpose, with the exit status the command line gives it."""

from typing import Any, ClassVar


class RempartError(Exception):
    """Base of the tree. The message always has three parts: expected, got, what to try."""

    exit_code: ClassVar[int] = 3

    def __init__(self, expected: str, *, got: object = None, hint: str = "") -> None:
        self.expected, self.got, self.hint = expected, got, hint
        message = f"expected {expected}"
        if got is not None:
            message += f", got {got}"
        if hint:
            message += f"; {hint}"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.expected, self.got, self.hint)


class SpecError(RempartError, ValueError):
    """The request is wrong: an unknown name, key or value."""

    exit_code = 2


class ThreatError(SpecError):
    """The threat model is impossible or does not fit the attack."""


class DataError(SpecError):
    """The data cannot be read, or do not fit the model."""


class ModelError(SpecError):
    """The model cannot be loaded, or its outputs cannot be used."""


class AttackError(RempartError):
    """An attack broke its contract, for example by leaving the threat model. A bug, never a result."""


class TrainError(RempartError):
    """Training cannot go on: the loss is not finite, or the model has collapsed."""


class Cancelled(RempartError):
    """Raised by a `Notify` callback to stop the work; it travels out of every loop."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("the work to go on", got="a request to stop", hint="what was finished is kept")


def _rebuild(kind: type[RempartError], expected: str, got: object, hint: str) -> RempartError:
    """Unpickle an error that crossed a process border; the default would hand the finished message to `__init__`."""
    error = kind.__new__(kind)
    RempartError.__init__(error, expected, got=got, hint=hint)
    return error
