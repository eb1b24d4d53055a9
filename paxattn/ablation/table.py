"""Rows of figures in memory and on disk: JSON as they are, CSV with each value read back as it was written.

rows ──write──> FILE.part ──replace──> FILE.json or FILE.csv      find: the row that has these values
"""

import csv
import json
import os
from pathlib import Path
from typing import Any


class Table:
    """Rows in memory and, where a path is given, on disk whenever they are written."""

    def __init__(self, path: Path | None):
        if path is not None and path.suffix not in (".json", ".csv"):
            raise ValueError(f"{path}: the name must end in .json or .csv.")
        self.path, self.rows = path, read(path) if path is not None and path.exists() else []

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The row that has these values."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

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
    """The rows of a file."""
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            return [{name: _parsed(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); move it away to start anew.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows of an ablation; give another name.")
    return rows


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
