"""The report of a job, from `Evidence`: report.md, report.html (one file that needs no other), metrics.json, figures/.

The Markdown is made by templates/report.md.j2 from sentences.py and tables.py. The page is the same text as HTML, with
the pictures in it, and with the interactive chart (chart.py) in the place of the picture of the inference time.

Names of folders, of layers and of versions, and what libraries say, are in the evidence. None of it is markup: all of
its texts are made opaque (text.py) before the first sentence, and put back when Markdown or HTML is complete.
"""

import base64
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import markdown
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from qexp.files import to_json
from qexp.foundation.text import as_html, as_markdown, as_text, opaque
from qexp.report import sentences, tables
from qexp.report.chart import latency_chart
from qexp.report.figures import save_figures
from qexp.report.results import Evidence

TEMPLATES = Environment(
    loader=PackageLoader("qexp.report"),
    autoescape=select_autoescape(["html.j2"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
UNBROKEN = re.compile(r"\([^()<>]*\)|\d (?:%|ms|MB)|(?:at least|at most|above) [\d.]+(?:x| %| points)")  # one line
CHARTED = "inference_time"  # the figure that is a chart in the page


@dataclass(frozen=True)
class Origin:
    """When a report was made and from which run; what is not known is empty. `run_url` is the run's page in MLflow."""

    date: str = ""
    run_id: str = ""
    run_url: str = ""

    @property
    def line(self) -> str:
        """As the page shows it."""
        run = f"[`{self.run_id}`]({self.run_url})" if self.run_url else f"`{self.run_id}`"
        parts = [f"Report of {self.date}" if self.date else "", f"MLflow run {run}" if self.run_id else ""]
        line = ", ".join(filter(None, parts))
        return f"{line}." if line else ""


def write_report(evidence: Evidence, folder: Path, origin: Origin = Origin()) -> Path:
    """Write report.md, report.html, metrics.json and figures/*.png into `folder`; return report.html's path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_figures(evidence, folder / "figures")
    (folder / "report.md").write_text(render_markdown(evidence, origin))
    values = {"verdict": asdict(evidence.verdict), "origin": asdict(origin)} | json.loads(to_json(evidence))
    (folder / "metrics.json").write_text(json.dumps(values, indent=2))
    page = folder / "report.html"
    page.write_text(render_html(evidence, folder, origin))
    return page


def render_markdown(evidence: Evidence, origin: Origin = Origin()) -> str:
    """The whole report as Markdown; its pictures are files below figures/."""
    return as_markdown(_text_of(opaque(evidence), opaque(origin), evidence.registered))


def _text_of(evidence: Evidence, origin: Origin, registered: bool) -> str:
    named = [name for name in sentences.explained(evidence) if f"`{name}`" in tables.markdown(tables.summary(evidence))]
    template = TEMPLATES.get_template("report.md.j2")
    text = template.render(
        evidence=evidence,
        sentences=sentences,
        tables=tables,
        table=tables.markdown,
        named=named,
        loaded=version_to_load(evidence),
        made=origin.line,
        registered=registered,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def version_to_load(evidence: Evidence) -> str:
    """The registered version that the verdict says to ship; the chosen int8 version where it says none."""
    if evidence.verdict.ship is None:
        return evidence.int8.version_uri
    return evidence.verdict.ship if evidence.verdict.ships_int8 else evidence.fp32.version_uri


def render_html(evidence: Evidence, folder: Path, origin: Origin = Origin()) -> str:
    """The same as one HTML page that needs no other file: pictures (relative to `folder`) become data URIs."""
    registered, evidence = evidence.registered, opaque(evidence)
    text = _text_of(evidence, opaque(origin), registered)
    body = markdown.markdown(text, extensions=["tables", "sane_lists", "fenced_code"])

    def inline(match: re.Match[str]) -> str:
        if match["name"] == CHARTED:
            return latency_chart(evidence, TEMPLATES)
        data = base64.b64encode((folder / "figures" / f"{match['name']}.png").read_bytes()).decode()
        return f'<img alt="{match["alt"]}" src="data:image/png;base64,{data}">'

    body = re.sub(r'<p><img alt="(?P<alt>[^"]*)" src="figures/(?P<name>\w+)\.png" ?/?></p>', inline, body)
    body = re.sub(r"<td[^>]*>.*?</td>", lambda cell: UNBROKEN.sub(_held_together, cell[0]), body)
    body = re.sub(r"<table>(.*?)</table>", r'<div class="wide"><table>\1</table></div>', body, flags=re.DOTALL)
    body = body.replace('<a href="', '<a target="_blank" rel="noopener" href="')  # not in the frame that shows the page
    title = text.splitlines()[0].lstrip("# ")
    return as_html(TEMPLATES.get_template("report.html.j2").render(title=title, body=body)) + "\n"


def _held_together(found: re.Match[str]) -> str:
    return found[0].replace(" ", "&nbsp;")


def _literal(text: str) -> str:
    """The same text as a string of Python."""
    return opaque(json.dumps(as_text(text), ensure_ascii=False))


TEMPLATES.filters["literal"] = _literal
