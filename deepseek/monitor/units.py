"""Numbers for people, and numbers out of events, where anything may be missing or odd.

An event field may be absent, a tensor, the string ``"nan"``, or nonsense from a torn file. Everything that
draws goes through ``number`` and friends, so that a strange value costs its own place in the picture and
nothing else.
"""

from __future__ import annotations

import math
import time
from typing import Any

from deepseek.events import plain

MISSING = "–"


def number(value: Any) -> float | None:
    """``value`` as a float, NaN and infinities included; ``None`` when it is no number."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        value = plain(value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None


def finite(value: Any) -> float | None:
    """``value`` as a finite float, or ``None``."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def numbers(value: Any) -> list[float]:
    """The numbers of a list (or one number as a list); entries that are not finite become 0."""
    try:
        value = plain(value)
    except (ValueError, TypeError, RuntimeError):
        return []
    if not isinstance(value, list):
        value = [value] if number(value) is not None else []
    return [finite(v) or 0.0 for v in value]


def si(value: Any, digits: int = 3) -> str:
    """``12345`` -> ``12.3k``: ``digits`` significant digits and k, M, G, T, P, E."""
    found = number(value)
    if found is None:
        return MISSING
    if not math.isfinite(found):
        return str(found)
    if abs(found) < 1000:
        return f"{found:.0f}" if found == int(found) else significant(found, digits)
    power = min(int(math.log10(abs(found)) // 3), 6)
    scaled = found / 1000**power
    if abs(float(f"{scaled:.{digits}g}")) >= 1000 and power < 6:
        scaled, power = scaled / 1000, power + 1
    return significant(scaled, digits) + ("", "k", "M", "G", "T", "P", "E")[power]


def flops(value: Any) -> str:
    """``1.9e11`` -> ``190 GFLOP/s``."""
    text = si(value)
    return (
        f"{text[:-1]} {text[-1]}FLOP/s" if text[-1:].isalpha() and text[-1:].isupper() else f"{text} FLOP/s"
    )


def significant(value: Any, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and, between 1e-3 and 1e6, no exponent."""
    found = number(value)
    if found is None:
        return MISSING
    if not math.isfinite(found) or found == 0:
        return f"{found:g}"
    if not 1e-3 <= abs(found) < 1e6:
        return f"{found:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    rounded = abs(float(f"{found:.{digits}g}"))
    places = max(digits - 1 - math.floor(math.log10(rounded)), 0)
    return f"{found:,.{places}f}"


def fixed(value: Any, places: int = 4) -> str:
    """``value`` with a fixed number of decimals."""
    found = number(value)
    return MISSING if found is None else f"{found:.{places}f}"


def percent(value: Any) -> str:
    """``0.4123`` -> ``41.2%``."""
    found = finite(value)
    return MISSING if found is None else f"{found:.1%}"


def duration(seconds: Any) -> str:
    """``3723`` -> ``1:02:03``; below a minute ``7.5 s``, below a second ``320 ms``."""
    found = finite(seconds)
    if found is None:
        return MISSING
    found = max(found, 0.0)
    if found < 0.9995:
        return f"{found * 1000:.0f} ms"
    if found < 59.95:
        return f"{found:.1f} s"
    total = round(found)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def size(count: Any) -> str:
    """Bytes: ``1536`` -> ``1.5 KiB``."""
    found = finite(count)
    if found is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(found) < 1024:
            return f"{found:.0f} {unit}" if unit == "B" else f"{found:.1f} {unit}"
        found /= 1024
    return f"{found:.1f} TiB"


def timestamp(when: Any, pattern: str, *, local: bool = False) -> str:
    """A Unix time as text by ``strftime``, in UTC unless ``local``."""
    found = finite(when)
    try:
        return (
            MISSING
            if found is None
            else time.strftime(pattern, (time.localtime if local else time.gmtime)(found))
        )
    except (OverflowError, OSError, ValueError):
        return MISSING


def one_line(value: Any, limit: int = 200) -> str:
    """``value`` as text on one line: control characters become spaces, a long end becomes an ellipsis."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"
