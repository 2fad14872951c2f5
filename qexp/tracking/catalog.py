"""What is registered: every version with aliases, accuracy, size, latency and lineage, from its tags alone.

Without torch, so that a list comes at once.
"""

from fnmatch import fnmatchcase
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from qexp.errors import InputError
from qexp.foundation.text import printable
from qexp.progress import say
from qexp.tracking.store import all_pages, uri_of, use_store
from qexp.tracking.tags import TAGS, tags_of

FIGURES = (
    "test_top1_percent", "test_top3_percent", "top1_drop_points", "top1_drop_low_points", "top1_drop_high_points",
    "size_mb", "p50_ms", "p50_batch_size", "p50_threads", "smallest_speedup",
)  # fmt: skip
WORDS = ("kind", "engine", "gate", "gate_reason", "promotion", "promotion_reason")
LINEAGE = (
    "fp32_uri", "dataset", "data_digest", "calibration_digest", "config_uri", "git_commit", "cpu", "cpu_features",
    "train_run_id", "quantize_run_id", "latency_run_id",
)  # fmt: skip
COUNTS = ("calibration_samples", "threads")  # of the lineage too
Row = dict[str, Any]


def list_models(pattern: str | None = None) -> list[Row]:
    """Every version that qexp registered, by name and from the newest on; None where a tag is missing.

    Args:
        pattern: a name, or a shell pattern such as `smallnet-*`.

    Raises:
        InputError: the store does not answer, or no name fits.
    """
    use_store()
    client = mlflow.MlflowClient()
    aliases = {model.name: model.aliases for model in all_pages(client.search_registered_models)}
    found = [one for one in all_pages(client.search_model_versions) if "kind" in one.tags]
    if pattern is not None:
        names = sorted({one.name for one in found})
        found = [one for one in found if fnmatchcase(one.name, pattern)]
        if not found:
            raise InputError(f"NAME {pattern}: no model that qexp registered; there are: {', '.join(names) or 'none'}")
    found.sort(key=lambda one: (one.name, -int(one.version)))
    return [_row(one, aliases.get(one.name, {})) for one in found]


def _row(version: ModelVersion, aliases: dict[str, Any]) -> Row:
    row: Row = {"name": version.name, "version": int(version.version)}
    row["uri"] = uri_of(version)
    row["aliases"] = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
    row |= {name: _known(version, name) for name in WORDS} | {
        name: bool(_known(version, name)) for name in ("folded", "verified")
    }
    row |= {name: _known(version, name) for name in FIGURES}
    return row | {"lineage": {name: _known(version, name) for name in (*LINEAGE, *COUNTS)}}


def _known(version: ModelVersion, name: str) -> Any:
    """The value of a tag; None where it is missing, or wrong, which is said."""
    value = tags_of(version).known(name, warn=say) if name in TAGS else version.tags.get(name)
    return round(value, 4) if isinstance(value, float) else value


def as_table(rows: list[Row]) -> str:
    """The rows as text in columns; digests and commits are shortened, `-` stands for what is not known."""
    if not rows:
        return "no models are registered"
    header = (
        "NAME", "VERSION", "ALIASES", "ENGINE", "TOP-1 %", "DROP (95 %)", "MB", "P50 MS", "SMALLEST SPEED-UP", "GATE",
        "PROMOTION", "FROM", "DATA", "CALIBRATION", "COMMIT", "HOST",
    )  # fmt: skip
    cells = [header, *(tuple(map(printable, _cells(row))) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    lineage = row["lineage"]
    source = (lineage["fp32_uri"] or "").removeprefix("models:/").replace("-fp32/", "-fp32 v")
    return (
        row["name"],
        str(row["version"]),
        ",".join(row["aliases"]) or "-",
        f"{row['engine'] or row['kind'] or '-'}{', folded' if row['folded'] else ''}",
        _number(row["test_top1_percent"], ".2f"),
        _drop(row),
        _number(row["size_mb"], ".3f"),
        _p50(row),
        _number(row["smallest_speedup"], ".2f") + ("x" if row["smallest_speedup"] else ""),
        row["gate"] or "-",
        row["promotion"] or "-",
        source or "-",
        (lineage["data_digest"] or "-")[:8],
        (lineage["calibration_digest"] or "-")[:8],
        _commit(lineage["git_commit"]),
        lineage["cpu"] or "-",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _p50(row: Row) -> str:
    """`0.34 at 1, 2 threads`: batch size and thread count of its latest sweep."""
    if None in (row["p50_ms"], row["p50_batch_size"], row["p50_threads"]):
        return "-"
    plural = "" if row["p50_threads"] == 1 else "s"
    return "{p50_ms:.3g} at {p50_batch_size}, {p50_threads} thread{0}".format(plural, **row)


def _drop(row: Row) -> str:
    if None in (row["top1_drop_points"], row["top1_drop_low_points"], row["top1_drop_high_points"]):
        return "-"
    return "{top1_drop_points:.2f} ({top1_drop_low_points:.2f} to {top1_drop_high_points:.2f})".format(**row)


def _commit(commit: str | None) -> str:
    """`+`: files had changed since."""
    commit = commit or "-"
    return commit.removesuffix("-dirty")[:8] + ("+" if commit.endswith("-dirty") else "")
