"""Numbers in words, for reports and progress lines; loads no plotting library."""

import math


def unit(largest: float) -> tuple[float, str]:
    """Returns a divisor that makes numbers up to `largest` short, and its name with a space; (1, "") for small ones."""
    for divisor, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if largest >= divisor:
            return divisor, f"{name} "
    return 1.0, ""


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number with fixed digits and separated thousands; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def compact(value: float | None) -> str:
    """Formats a number with three significant digits and k, M, B or T; a dash for None."""
    if value is None or not math.isfinite(value):
        return number(value)
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * divisor:
            return f"{float(f'{value / divisor:.3g}'):g}{suffix}"
    return f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """Formats a number with its sign and two significant digits or `digits` decimals, whichever is more."""
    if 1e-9 <= abs(value) < math.inf:
        digits = max(digits, 1 - math.floor(math.log10(abs(value))))
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Formats seconds in the two largest units, e.g. "3 h 05 min"; a dash for None."""
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
