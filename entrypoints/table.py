"""The result of a command as a person reads it on a terminal: a table, and the verdict last."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qexp.foundation.text import printable

Summary = dict[str, Any]
UNITS = {  # endings of names, and what they say of a number
    "_percent": " %", "_points": " points", "_mb": " MB", "_ms": " ms", "_seconds": " s",
}  # fmt: skip
SIDE_BY_SIDE = ("fp32_top1_percent", "int8_top1_percent", "top1_drop_points", "size_ratio", "engine")
SIZES = ("fp32_size_mb", "int8_size_mb")
VERSIONS = ("fp32", "int8")  # their URIs, if they are registered
ANSWER = ("verdict", "decision")  # of the whole job, and of a promotion
REASON = ("verdict_reason", "reasons", "gate_reason", "ship")  # told below the answer
IN_TABLE = ("hosts", "best_threads_by_batch_size", "settings")  # told by the table alone
GOOD = ("ship int8", "passed")


def show(summary: Summary, found: Any = None) -> None:
    """Print the result of a command on standard output; `found` is its table, if it has one."""
    console = Console(highlight=False)
    answer = next((summary[key] for key in ANSWER if key in summary), None)
    told = {"command", *(ANSWER + REASON if answer else ())}
    if summary["command"] == "predict":
        told |= {"images"}  # which are on standard error, a line each
    told |= {key for key in VERSIONS if not str(summary.get(key) or "").startswith("models:/")}
    if set(SIDE_BY_SIDE) <= set(summary):
        told |= {*SIDE_BY_SIDE, *SIZES}
        found = found or _side_by_side(summary)
    if found:
        console.print(found if isinstance(found, Table) else _as_rich(found))
        told |= set(IN_TABLE)
    for note in () if answer else getattr(found, "notes", ()):  # an answer is told in full below
        console.print(Text(printable(note)), soft_wrap=True)
    facts = [line for key, value in summary.items() if key not in told for line in _lines(key, value)]
    width = max((len(name) for name, _ in facts), default=0)
    for name, text in facts:
        console.print(Text.assemble((f"{name:{width}}  ", "dim"), printable(text)), soft_wrap=True)
    if answer:
        colour = "bold green" if str(answer).startswith(GOOD) else "bold yellow"
        console.print(Text.assemble(("Verdict: ", "bold"), (printable(str(answer)), colour)), soft_wrap=True)
        reasons = summary.get("verdict_reason") or "; ".join(summary.get("reasons", ()))
        ship = f"ship {summary['ship']}" if summary.get("ship") else ""
        for line in filter(None, (reasons, ship)):
            console.print(Text(f"  {printable(line)}"), soft_wrap=True)


def _as_rich(found: Any) -> Table:
    """The report's first table."""
    table = Table(*(escape(printable(name)) for name in found.columns), title=escape(printable(found.title)))
    for row in found.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def _side_by_side(summary: Summary) -> Table:
    """Accuracy and size of fp32 and int8."""
    table = Table("", "fp32", escape(printable(f"int8 ({summary['engine']})")), "int8 against fp32")
    fp32, int8, drop, ratio, _ = (summary[key] for key in SIDE_BY_SIDE)
    table.add_row("test top-1", f"{fp32:.2f} %", f"{int8:.2f} %", f"{-drop:+.2f} points")
    sizes = [f"{summary[key]:.3g} MB" if key in summary else "" for key in SIZES]
    table.add_row("size", *sizes, f"{ratio:.2f}x smaller")
    return table


def _lines(key: str, value: Any) -> list[tuple[str, str]]:
    """A name and its value, on several lines where the value is a list; none where there is nothing to tell."""
    end = next((end for end in UNITS if key.endswith(end)), "")
    name = key.removesuffix(end).replace("_", " ")
    values = value if isinstance(value, list) else [value] if value not in (None, {}, "") else []
    return [("" if number else name, _text(one) + UNITS.get(end, "")) for number, one in enumerate(values)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
