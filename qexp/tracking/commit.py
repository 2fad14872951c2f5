"""The git commit of the code that runs, for a version's lineage."""

import os
import subprocess
from pathlib import Path

UNKNOWN = "unknown"
CODE = Path(__file__).resolve().parent


def read_commit(folder: Path = CODE) -> str:
    """The commit of the repository that tracks the code in `folder`, with `-dirty` if files have changed since.

    `unknown` where there is no git, where the code is installed (a repository around it is another project's), or where
    the repository belongs to another user than the code: git runs programs that its settings name.
    """
    repositories = [above / ".git" for above in (folder, *folder.parents) if os.path.exists(above / ".git")]
    if any(found.stat().st_uid != folder.stat().st_uid for found in repositories):
        return UNKNOWN
    if not _git(folder, "ls-files", "__init__.py"):
        return UNKNOWN
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit or UNKNOWN


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; code and repository may belong to another user than this process's, as in a container."""
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
