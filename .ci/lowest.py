"""Makes .venv-lowest, the environment of `make test-lowest`: the lowest versions that pyproject.toml allows.

uv does not read pip's configuration: what that says about where packages are is handed on.
"""

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
EXTRAS = ("pt2e", "onnx", "openvino", "digits", "postgres", "test")
NAMES = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX"}


def _environment() -> dict[str, str]:
    """What of pip's configuration uv has other names for; variables of uv's own win."""
    own = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # of several indexes all versions count, as for pip
    for name, variable in NAMES.items():
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
        if words := subprocess.run(command, capture_output=True, text=True).stdout.split():
            own[variable] = (" " if name == "extra-index-url" else ",").join(words)
    return own | dict(os.environ)


def main(folder: str) -> None:
    """Make the environment in `folder`."""
    uv, python = Path(sys.executable).with_name("uv"), Path(folder, "bin", "python")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    install = [str(uv), "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
    for command in (
        [str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, folder],
        [*install, "--resolution", "lowest-direct", "--requirements", "pyproject.toml", *extras],
        [*install, "--no-deps", "--editable", "."],
    ):
        subprocess.run(command, cwd=TOP, env=_environment(), check=True)


if __name__ == "__main__":
    main(sys.argv[1])
