"""Errors whose message is written for the user: one line that names the cause and what to do."""


class LograError(Exception):
    """Base of the package's own errors."""


class StoreError(LograError):
    """A store cannot be read or written as asked; what was committed before is intact."""


class StoreMismatch(StoreError):
    """The store was made with another model, projection or layer list than the caller's."""
