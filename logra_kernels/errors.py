"""What a user can get wrong or run into. Each message is one line and says what to do; the CLI prints it as it is."""


class LograError(Exception):
    """Base of the errors whose message is meant for the user: one line, naming the thing and the next step."""


class StoreError(LograError):
    """A gradient store cannot be created, opened, read or written as asked; what it holds is untouched."""


class StoreMismatch(StoreError):  # noqa: N818 - the name says what happened; `except StoreError` catches it
    """The store was written for something else (model, data, projection) than it is now used with."""
