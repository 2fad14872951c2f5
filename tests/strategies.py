"""Strategies of hypothesis for what people and programs write: texts that break lines, terminals, paths and parsers.

The tests that use them are seeded and bounded: `@SEEDED` goes above a test, so that it is the same at each run.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SEEDED = settings(
    derandomize=True, max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# One of each kind: control characters, ends of lines, markup, quotes, paths, formats, other scripts, no UTF-8, length.
NASTY = (
    "", " ", "~", "~/x", "..", "/", "-", "--model", "auto", "none", "null", "true", "nan", "1e400", "0x1f", "1:2:3",
    "a\nb", "a\r\nb", "a\u2028b", "a\x85b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x00", "\x7f", "\x9b31m",
    "<script>alert(1)</script>", "`x`<img src=x onerror=alert(3)>", "{{ 7*7 }}", "| a | b |", "[x](javascript:y)",
    "'", '"', "\\", "%20", "%s", "{0}", "#", "*a", "&a b", "!!python/none", "@", "ü", "日本", "\u202egnp.exe",
    "e\u0301", "🎉", "\ud800", "\udcff", "a" * 300, "9" * 30, "models:/a/1", "postgresql://u:secret@h/x?token=secret",
)  # fmt: skip


def nasty_texts(**limits: Any) -> st.SearchStrategy[str]:
    """Texts as above, and others; `limits` are those of `hypothesis.strategies.text`."""
    return st.sampled_from(NASTY) | st.text(**({"max_size": 40} | limits))


def scalars() -> st.SearchStrategy[Any]:
    """Values that YAML and JSON have, at their limits."""
    numbers = st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**18, 10**40]) | st.floats()
    return st.none() | st.booleans() | numbers | st.dates() | st.datetimes() | st.binary(max_size=8) | nasty_texts()


def trees(leaves: int = 12) -> st.SearchStrategy[Any]:
    """The same in lists and mappings, whose keys are anything."""
    keys = st.sampled_from(["a", "model", "epochs", "models", "a-int8", "min_top1"]) | nasty_texts() | st.integers()
    return st.recursive(
        scalars(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=leaves,
    )
