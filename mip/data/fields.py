"""What a field of somebody's JSON or table may hold, so that our own tables can hold it too."""

import re
import sys
from typing import TypeGuard

_HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can write it, a table cannot
_LONGEST = 1000  # characters of a caption or label


def is_text(value: object) -> TypeGuard[str]:
    """True for a text of at most 1000 characters that a table can hold."""
    return isinstance(value, str) and len(value) <= _LONGEST and not _HALF.search(value)


def finite(value: object) -> float | None:
    """A finite number as a float; None for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # an integer may have hundreds of digits
