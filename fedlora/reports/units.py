"""Numbers as people read them: sizes, durations, shares. What is absent is "-", not a zero."""

import math


def size(n: float | None) -> str:
    """Bytes in decimal units: 999 B, 12.3 kB, 4.56 MB, 210 MB."""
    if n is None or not math.isfinite(n):
        return _odd(n)
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            value = n / scale
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float | None) -> str:
    """0.042 s, 12.3 s, 2 min 03 s, 1 h 02 min, 3 d 04 h."""
    if seconds is None or not math.isfinite(seconds):
        return _odd(seconds)
    if seconds < 59.95:
        return f"{seconds:.3f} s" if seconds < 0.1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:34: for what ticks."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float | None) -> str:
    """0.6104 as 61.0%."""
    return f"{share:.1%}" if share is not None and math.isfinite(share) else _odd(share)


def number(x: float | None) -> str:
    """1.2346, 24.50, 1234.6, 1.2e+09: fewer decimals where the number is large."""
    if x is None or not math.isfinite(x):
        return _odd(x)
    if abs(x) >= 1e6:
        return f"{x:.1e}"
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}" if abs(x) < 100 else f"{x:.1f}"


def tiny(x: float | None) -> str:
    """For deviations: 2.1e-07, or 0.312 where that is readable. A true zero is 0."""
    if x is None or not math.isfinite(x):
        return _odd(x)
    return "0" if x == 0 else f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.3f}"


def count(n: int, noun: str) -> str:
    """1 round, 2 rounds."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _odd(x: float | None) -> str:
    """None is "-"; NaN and infinity are named, because they are results too."""
    return "-" if x is None else str(x)
