"""The table of wrong inputs on the page "Your own classifier": the line that each of them gives."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "your-own-classifier.md"
DOCUMENTED = dict(re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|$", PAGE.read_text(), re.MULTILINE))


def says(documented: str, said: str) -> bool:
    """Whether a message is the documented line; `…` in brackets stands for what differs, such as a library's words."""
    return re.fullmatch(re.escape(documented).replace(r"\(…\)", r"\(.*\)"), said) is not None
