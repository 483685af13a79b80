"""Which evaluation of a run is its best."""

from collections.abc import Collection, Iterable
from typing import Any


def best_row(rows: Iterable[dict[str, Any]], metric: str, saved: Collection[int]) -> dict[str, Any] | None:
    """The row of the best evaluation at one of the steps `saved`, by `metric`; None without any.

    Of equals the latest is the best. A metric that is not finite ranks last.
    """
    found = [row for row in rows if metric in row and row["step"] in saved]
    return max(found, key=lambda row: (row[metric] is not None, row[metric] or 0, row["step"]), default=None)
