"""What renting a GPU costs: a dated, sourced table that its user can edit (prices.csv); old rows are marked as stale.

Prices are US dollars a GPU and hour, without disks and traffic. They change within weeks: look before you rent.
"""

import csv
import dataclasses
import datetime
import math
from pathlib import Path

from nanochat.errors import UserError, refuse

TABLE = Path(__file__).with_name("prices.csv")
STALE_DAYS = 90  # after which a price is only an order of magnitude [judgement: they fell by a third in 2025]
COLUMNS = ("gpu", "memory_gib", "low", "high", "kind", "date", "source")


@dataclasses.dataclass(frozen=True)
class Price:
    """What one source asked for one GPU on one day."""

    gpu: str  # a name that nanochat/hardware.py knows
    memory_gib: float
    low: float  # dollars a GPU-hour
    high: float
    kind: str  # on demand, spot, ...
    date: datetime.date
    source: str

    def days(self, today: datetime.date) -> int:
        """Age of the row."""
        return (today - self.date).days

    def stale(self, today: datetime.date) -> bool:
        """Too old to be relied on?"""
        return self.days(today) > STALE_DAYS


def read(path: Path | str = TABLE) -> list[Price]:
    """The rows of a table, as they stand. UserError: it is missing, or rows make no sense (all are listed)."""
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"The price table {path} can't be read ({error.strerror}).") from error
    if not rows or set(COLUMNS) - set(rows[0]):
        raise UserError(f"The price table {path} needs the columns {', '.join(COLUMNS)} and a row at least.")
    prices, problems = [], []
    for number, row in enumerate(rows, 2):
        price, problem = _price(row)
        if price:
            prices.append(price)
        else:
            problems.append(f"line {number} of {path}: {problem}.")
    refuse(problems)
    return prices


def _price(row: dict[str, str]) -> tuple[Price | None, str]:
    """(the row, "") or (None, what is wrong with it)."""
    try:
        memory, low, high = (float(row[name]) for name in ("memory_gib", "low", "high"))
        date = datetime.date.fromisoformat(row["date"])
    except (TypeError, ValueError) as error:
        return None, str(error)
    if not (0 < low <= high < math.inf and memory > 0):
        return None, f"low {low:g} must be above 0 and at most high {high:g}, and memory above 0"
    if not (row["gpu"] and row["source"]):
        return None, "it needs a GPU and a source"
    return Price(row["gpu"], memory, low, high, row["kind"], date, row["source"]), ""
