"""Results as tables: text for `print`, HTML for a notebook. Each figure is read from the result when it is shown."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qexp.foundation.text import printable


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown, below their column names; `notes` are sentences below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal: the first column to the left, the others to the right."""
        lines = [tuple(map(printable, line)) for line in (self.columns, *self.rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        shown = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        rule = "  ".join("-" * width for width in widths)
        title, *notes = map(printable, (self.title, *self.notes))
        return "\n".join([title, "", shown[0], rule, *shown[1:], *notes])

    def html(self) -> str:
        """For a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        title = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


class Shown(ABC):
    """A result that prints as tables, and shows as HTML in a notebook."""

    @abstractmethod
    def tables(self) -> tuple[Table, ...]:
        """What there is to show of it."""

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "\n".join(table.html() for table in self.tables())
