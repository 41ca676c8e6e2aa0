"""Write tables and figures for people. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Iterator[str]:
    """Yield head and rows in columns. right: the heads of columns with figures.

    A column in which no row has anything is left out.
    """
    kept = [at for at, name in enumerate(head) if not rows or any(row[at] for row in rows)]
    widths = {at: max(len(head[at]), *(len(row[at]) for row in rows), 0) for at in kept}
    for cells in (head, *rows):
        padded = [cells[at].rjust(widths[at]) if head[at] in right else cells[at].ljust(widths[at]) for at in kept]
        yield "  ".join(padded).rstrip()


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 12 s, 3 min 4 s, 5 h 6 min, 7 d 8 h."""
    whole = max(int(seconds), 0)
    for size, unit, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {below}"
    return f"{whole} s"


def size(count: float) -> str:
    """Return bytes in a unit of 1024: 17 B, 4.0 KiB, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def milliseconds(seconds: float | None) -> str:
    """Return a time for a column; "-" when there is none."""
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
