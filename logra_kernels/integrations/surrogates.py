"""Halves of surrogate pairs: JSON may escape one alone, and neither a tokenizer nor a store takes it."""

from logra_kernels.errors import LograError


def refuse_half_pairs(text: str, what: str) -> None:
    """
    Args:
        text: Any string.
        what: Its name in the message, as `rows.jsonl line 3: field 'text'`.

    Raises:
        LograError: Half of a surrogate pair (U+D800 to U+DFFF) stands in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LograError(
            f"{what} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}, character {error.start + 1}),"
            " which stands for no character; mend or drop it"
        ) from None
