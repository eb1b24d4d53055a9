"""Pictures of a page table, as text for the terminal.

page map                       one character a block of the pool
|.AAAB CC*A....|               A, B, C: rows    *: shared    .: free
"""

import numpy as np

from paxattn.blocks import NULL
from paxattn.pages import PageTable

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def page_map(table: PageTable, *, width: int = 64) -> str:
    """The pool drawn block by block, and what each row holds. Runs on the host.

    Args:
      table: any page table.
      width: blocks a line.
    """
    pages, refcount = np.asarray(table.pages), np.asarray(table.blocks.refcount)
    cells = np.full(refcount.size, ".")
    for row, held in enumerate(pages):
        cells[held[held != NULL]] = _LETTERS[row % len(_LETTERS)]
    cells[refcount > 1] = "*"
    cells = cells[1:]  # NULL is nobody's
    lines = ["".join(cells[at : at + width]) for at in range(0, cells.size, width)]
    used = int(np.sum(refcount[1:] > 0))
    head = f"{used} of {cells.size} blocks of {table.block_size} tokens in use (a letter a row, * shared, . free)"
    rows = []
    for row, (held, length) in enumerate(zip(pages, np.asarray(table.length), strict=True)):
        if length:
            blocks = " ".join(map(str, held[held != NULL]))
            rows.append(f"  row {_LETTERS[row % len(_LETTERS)]}: {int(length):5d} tokens in {blocks}")
    return "\n".join([head, *(f"  |{line}|" for line in lines), *rows])
