"""How many bad samples a data set may have."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

__all__ = ["allowed_bad", "spent_budget"]


def allowed_bad(max_bad: int | str, samples: int) -> int:
    """How many of `samples` may be bad.

    Args:
        max_bad: a number of samples, or a share of them such as "0.1%", rounded down.
        samples: size of the data set.

    Raises:
        ValueError: it is neither, or the share is not one of 0 to 100%.
    """
    text = str(max_bad).strip()
    if text.isdecimal() and not isinstance(max_bad, bool):
        return int(text)
    if text.endswith("%"):
        try:
            share = Decimal(text[:-1])
        except InvalidOperation:
            share = Decimal(-1)
        if share.is_finite() and 0 <= share <= 100:
            return int(share * samples / 100)
    raise ValueError(f"max_bad is {max_bad!r}; a number of samples, or a share such as 0.1%, is accepted")


def spent_budget(errors: Sequence[str], allowed: int) -> str:
    """What is said when more samples are bad than may be; it names all."""
    listed = "".join(f"\n  {error}" for error in errors)
    return (
        f"{len(errors)} samples are bad, but max_bad allows for {allowed}; repair or remove them (mmfast data check "
        f"finds all), or raise max_bad:{listed}"
    )
