"""Files that a user may have in the current folder, with names that the standard library or a package has, too."""

from pathlib import Path

NAMES = ("random", "profile", "statistics", "torch", "numpy", "tempfile", "queue", "subprocess", "typer")


def write_shadows(folder: Path) -> None:
    """Write them; a process that imports one ends, and says so."""
    files = [folder / f"{name}.py" for name in NAMES] + [folder / "mlflow" / "__init__.py"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise SystemExit('imported from the current folder: {file.name}')\n")
