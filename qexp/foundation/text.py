"""Text of others, made fit to be shown: names of files and classes, tags, addresses, what libraries say.

What goes to a terminal or a log passes `printable`. What goes into Markdown (the report, notes and descriptions in
MLflow) passes `opaque` first, and the whole text `as_markdown` or `as_html` last. Secrets are hidden in all of them.
"""

import os
import re
import unicodedata
from dataclasses import fields, is_dataclass, replace
from html import escape
from typing import Any, TypeVar
from urllib.parse import unquote

T = TypeVar("T")

# Secrets

# What may follow a colon and is no password: the port of a server, and the rest of its address.
PORT = r"""\d{1,5}(?:[/?#][^@\s]*)?(?:[\s,;:)\]'"<>]|\.?\s|\.?$)"""
# As in postgresql://user:password@host. A password may have blanks and an @ in it, so that the last @ ends it; without
# a user's name it is a token. models:/name@alias is none.
IN_ADDRESS = re.compile(rf"(://(?!\[)[^:/?#\s]*:)(?!{PORT})(?:(?:(?!://|models:/| \().)*|\S*)@|(://)[^:/?#@\s]{{20,}}@")
SECRET = (
    r"pass(?:word|wd|phrase)|pwd|secret|token|api[-_]?key|access[-_]?key(?:[-_]?id)?|account[-_]?key|credentials?|"
    r"signature|sig"
)
END = r"""[^&;\s"'<>]*[^&;\s"'<>.,:)\]}]"""
# As in 'token': '…'; in ?password=…&X-Amz-Signature=…, which may have blanks; in AWS_SECRET_ACCESS_KEY=….
NAMED = re.compile(
    rf"""((?:{SECRET})["']?\s*[:=]\s*(?P<quote>["']))(?:\\.|(?!(?P=quote)).)*"""
    rf"""|([?&][\w-]*(?:{SECRET})=)[^&"'\n]+?(?=[.,;:)]*(?:[&#"'<>]|$|:\s|\s\())"""
    rf"""|((?:{SECRET})=){END}""",
    re.IGNORECASE | re.MULTILINE,
)
IN_HEADER = re.compile(
    rf"""((?:authorization|x-api-key|private-token|set-cookie|cookie)["']?\s*[:=]\s*["']?(?:[\w-]+\s+(?=[^\s"']))?)({END})"""
    rf"|(\bbearer\s+){END}",
    re.IGNORECASE,
)
KEYS = re.compile(r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_\w{20,}|hf_\w{20,}|dapi[0-9a-f]{32})\b")
IN_ENVIRONMENT = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING", "DATABRICKS_TOKEN", "PGPASSWORD",
)  # fmt: skip
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
SHORTEST = 6  # characters of a secret that is looked for wherever it may stand


def hide_secrets(text: str) -> str:
    """`text` with *** for passwords, tokens and keys: in addresses, headers and settings, and for those that the
    environment has, wherever they stand."""
    for secret in _known_secrets():
        text = text.replace(secret, "***")
    text = IN_ADDRESS.sub(lambda found: f"{found[1] or found[2]}***@", text)
    text = NAMED.sub(lambda found: f"{found[1] or found[3] or found[4]}***", text)
    text = IN_HEADER.sub(lambda found: f"{found[1] or found[3]}***", text)
    return KEYS.sub("***", text)


def _known_secrets() -> list[str]:
    """Those of the environment, the longest first."""
    found = {os.environ.get(name, "") for name in IN_ENVIRONMENT}
    for address in filter(None, map(os.environ.get, ADDRESSES)):
        found |= _secrets_of(address)
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True)


def _secrets_of(address: str) -> set[str]:
    """The password of an address and the secrets among its parameters, which may have blanks in them."""
    _, _, rest = address.partition("://")
    before, question, parameters = rest.partition("?")
    found = set()
    if "@" in rest and not ("@" not in before and question and re.match(r"[^:]*(?::\d+)?/?[^@]*$", before)):
        found.add(rest.rpartition("@")[0].partition(":")[2])
    for pair in re.split("[&#]", parameters):
        name, _, value = pair.partition("=")
        if re.search(SECRET, name, re.IGNORECASE):
            found.add(value)
    return found


# Terminals and logs

BREAKS = re.compile(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*|\t")
JOINERS = "\u200c\u200d"  # in words of some languages, and in emoji


def printable(text: str) -> str:
    """`text` as one line that a terminal shows and does not obey: a line break becomes a blank; control and escape
    characters, reversed writing and bytes that are no text are spelled out, as in `\\x1b`."""
    line = BREAKS.sub(" ", hide_secrets(text).strip("\r\n"))
    return line if line.isprintable() else "".join(map(_spelled_out, line))


def _spelled_out(character: str) -> str:
    if character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


# Markdown and the page made of it

# A character that Markdown or HTML may take for markup waits in a plane of private use until the text is made.
PLANE = 0xF0000
MARKUP = re.compile(r"[\\`*\[\]<>&|~]|(?<![^\W_])_|_(?![^\W_])|^[#+-](?![\d.])|^\d{1,9}[.)](?=\s|$)")
HIDDEN = re.compile("[\U000f0000-\U000f007f]")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def opaque(value: T) -> T:
    """`value` with no markup in any of its texts, whatever they are: of a dataclass, a list or a dict in all depths.

    A text made of it is for `as_markdown`, `as_html` or `as_text`, which put the characters back.
    """
    changed: Any = value
    if isinstance(value, str):
        changed = MARKUP.sub(_hidden, printable(value).lstrip(" "))
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{field.name: opaque(getattr(value, field.name)) for field in fields(value)})
    elif isinstance(value, dict):
        changed = {opaque(key): opaque(inner) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        changed = type(value)(map(opaque, value))
    return changed


def _hidden(found: re.Match[str]) -> str:
    return found[0][:-1] + chr(PLANE + ord(found[0][-1]))


def as_markdown(text: str) -> str:
    """Markdown in which what `opaque` has hidden is shown as it is: in code spans and table cells too."""
    lines = []
    for part in CODE.split(text):
        lines.append(HIDDEN.sub(_in_code if part.startswith("`") else _in_markdown, part))
    return "\n".join(_cells_kept(line) for line in "".join(lines).split("\n"))


def _in_code(found: re.Match[str]) -> str:
    character = _shown(found)
    return {"`": "'", "|": found[0]}.get(character, character)  # a code span has no escape for its own mark


def _in_markdown(found: re.Match[str]) -> str:
    character = _shown(found)
    unescaped = {"|": found[0], "~": "&#126;"}  # for a tilde, not every Markdown has a backslash
    return unescaped.get(character, escape(character) if character in "<>&" else f"\\{character}")


def _cells_kept(line: str) -> str:
    """`line` with its hidden bars put back, which in a table must not end a cell."""
    return line.replace(chr(PLANE + ord("|")), "\\|" if line.startswith("|") else "|")


def as_html(page: str) -> str:
    """HTML that was made from such a text, with the characters put back and escaped."""
    return HIDDEN.sub(lambda found: escape(_shown(found)), page)


def as_text(text: str) -> str:
    """The characters put back as they were."""
    return HIDDEN.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    return chr(ord(found[0]) - PLANE)
