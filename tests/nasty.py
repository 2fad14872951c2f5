"""Names that are meant to break what shows them, and what a reader of HTML finds: for tests of pages and terminals."""

import random
from collections import Counter
from html.parser import HTMLParser

PIECES = (
    "`", "``", "```", "'", '"', "<", ">", "</code>", "<script>alert(1)</script>", "<img src=x onerror=alert(3)>",
    "<!--", "-->", "&", "&lt;", "&#60;", "[x](javascript:alert(4))", "![x](http://evil.example/x.png)",
    "<javascript:alert(5)>",    "[x]: http://evil.example",
    "|", "||", "\\", "\\`", "*", "**", "_", "__", "~~", "#", "- ", "1. ", "> ", "{{ 7 }}",
    "{% x %}", "$x$", "[red]", "[/]", "[bold", "\n", "\n\n", "\r\n", "\t", "\x1b[2J", "\x1b]0;title\x07", "\x9b31m",
    "\u202e", "\u2028", "\x00", "\x02", "\x03", "\udcff", "a", "b c", "ä", "犬",
)  # fmt: skip
VOID = ("meta", "br", "img", "line", "polyline", "hr")


def nasty(count: int, seed: int = 0) -> list[str]:
    """Some made of these pieces at random, the same for the same seed; the first are each piece by itself."""
    drawn = random.Random(seed)
    mixed = ["".join(drawn.choices(PIECES, k=drawn.randint(2, 8))) for _ in range(max(0, count - len(PIECES)))]
    return [*(f"x{piece}y" for piece in PIECES), *mixed][:count]


class Page(HTMLParser):
    """What a browser finds in HTML: elements, attributes, and the text without the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts, self.attributes, self.addresses = Counter[str](), set[str](), list[str]()
        self.parts, self.open, self.scripts = list[str](), list[str](), 0
        self.feed(text)
        self.close()
        self.tags = set(self.counts)
        self.text = "".join(self.parts).replace("\xa0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.parts.append(data)
