"""Reports as aligned text, as tables of a rich console, and as HTML; changes with how a report is shown."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """The heads of a table's columns, and its rows."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def align(table: Table) -> list[str]:
    """Returns a table's lines, its columns as wide as their longest cell.

    >>> align(Table(("a", "b"), [("long", "1")]))
    ['a     b', 'long  1']
    """
    rows = [table.heads, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show(title: str, tables: Iterable[Table], notes: Iterable[str] = ()) -> Any:
    """Returns what a rich console prints: the title, those tables that have rows, and the notes."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = [Text(title, style="bold")]
    for table in tables:
        if table.rows:
            shown = RichTable(*table.heads)
            for row in table.rows:
                shown.add_row(*row)
            parts.append(shown)
    return Group(*parts, *map(Text, notes))


def name_axes(axes: Iterable[str]) -> str:
    """Returns mesh axes as a report names them.

    >>> name_axes(("fsdp", "model")), name_axes(())
    ('fsdp x model', 'no axis')
    """
    return " x ".join(axes) or "no axis"


def to_html(report: Any) -> str:
    """Returns the HTML of what a rich console would print, for a notebook."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=140)
    console.print(report)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
