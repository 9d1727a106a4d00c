"""What the service refuses, beside what the rest of the package does."""

from rempart.core.errors import RempartError, SpecError


class Missing(SpecError):
    """Nothing is there under that id."""


class TooLarge(SpecError):
    """An upload beyond the limit."""


class Conflict(SpecError):
    """An idempotency key came with two different requests."""


class Unavailable(RempartError):
    """The table of jobs cannot be reached, or cannot take anything more."""


def status_of(error: RempartError) -> int:
    """The status of the answer that tells it."""
    kinds = {Missing: 404, Conflict: 409, TooLarge: 413, SpecError: 422, Unavailable: 503}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 500)
