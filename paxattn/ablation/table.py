"""Rows of figures in memory and on disk: JSON as they are, CSV with each value read back as it was written.

rows ──write──> FILE.part ──replace──> FILE.json or FILE.csv      find: the row that has these values
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

TEXT = {"subject", "tokens_sha256"}
"""Columns that are text even where they look like numbers, as 16 hex digits may."""


class Table:
    """Rows in memory and, where a path is given, on disk whenever they are written."""

    def __init__(self, path: Path | None):
        if path is not None and path.suffix not in (".json", ".csv"):
            raise ValueError(f"{path}: the name must end in .json or .csv.")
        self.path, self.rows = path, read(path) if path is not None and path.exists() else []

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The row that has these values."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def put(self, wanted: dict[str, Any], row: dict[str, Any]) -> None:
        """A row in the place of the one that has these values, or at the end."""
        old = self.find(wanted)
        self.rows = [row if each is old else each for each in self.rows] + ([row] if old is None else [])

    def write(self) -> None:
        """All rows to disk; a reader sees the old file or the new one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".part")
        with scratch.open("w", newline="") as file:
            if self.path.suffix == ".json":
                json.dump(self.rows, file, indent=1)
            else:
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)))
                writer.writeheader()
                writer.writerows(self.rows)
        os.replace(scratch, self.path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
      ValueError: it holds something else, or is cut short.
    """
    with path.open(newline="") as file:
        try:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); move it away to start anew.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows of an ablation; give another name.")
    if path.suffix == ".json":
        return rows
    for at, row in enumerate(rows, 1):
        if None in row or None in row.values():  # what DictReader makes of cells too many and too few
            raise ValueError(f"{path}: row {at} has not as many cells as there are names; move it away to start anew.")
    return [{name: cell if name in TEXT and cell else _parsed(cell) for name, cell in row.items()} for row in rows]


def _parsed(cell: str) -> Any:
    """A value as `csv` wrote it."""
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
