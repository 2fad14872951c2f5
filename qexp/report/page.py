"""One page from `Evidence`: report.md, report.html (pictures inside), metrics.json. Sentences: claims.py, speed.py."""

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import markdown

from qexp.files import to_json
from qexp.measurement.accuracy import Accuracy
from qexp.measurement.host import too_many_threads
from qexp.measurement.latency import LatencyStats, Ratio
from qexp.report import advice, claims, speed
from qexp.report.figures import save_figures
from qexp.report.results import Evidence, Fp32Evidence, Int8Evidence

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto}
th,td{border:1px solid #ccc;padding:.3rem .6rem}
th{background:#f3f4f7}img{width:49%;min-width:20rem}code{background:#f3f4f7;padding:0 .2rem;overflow-wrap:anywhere}
"""


def write_report(evidence: Evidence, folder: Path) -> Path:
    """Write report.md, report.html, metrics.json and figures/*.png into `folder`; return report.html's path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_figures(evidence, folder / "figures")
    text = render_markdown(evidence)
    (folder / "report.md").write_text(text)
    values = {"verdict": asdict(evidence.verdict)} | json.loads(to_json(evidence))
    (folder / "metrics.json").write_text(json.dumps(values, indent=2))
    page = folder / "report.html"
    page.write_text(render_html(text, folder))
    return page


def render_html(text: str, folder: Path) -> str:
    """The Markdown as one HTML page that needs no other file: pictures (relative to `folder`) become data URIs."""
    body = markdown.markdown(text, extensions=["tables", "sane_lists"])

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[^"]+\.png)"', inline, body)
    title = html.escape(text.splitlines()[0].lstrip("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n</body>'
        "</html>\n"
    )


def render_markdown(evidence: Evidence) -> str:
    """The page, in the order: answer, training, accuracy, size, MACs, inference time, gate, environment."""
    fp32 = evidence.fp32
    parts = [
        f"# Can {fp32.model}, trained on {fp32.data.name}, ship as int8 on this CPU?",
        claims.answer(evidence),
        "## Training",
        _pictures("accuracy_curve", "loss_curve", "accuracy_against_loss"),
        _bullets(claims.training(evidence)),
        "## Effect of quantization on accuracy",
        _accuracy_table(evidence),
        _pictures("accuracy_bars"),
        _bullets(claims.accuracy(evidence)),
        "## Effect of quantization on model size",
        *_size_table(evidence),
        _pictures("model_size"),
        _bullets(claims.size(evidence)),
        "## Multiply-accumulates by batch size",
        _macs_table(evidence),
        _pictures("macs"),
        _bullets(claims.macs(evidence)),
        "## Effect of quantization on inference time",
        _p50_table(evidence),
        _speedup_table(evidence),
        _latency_table(evidence),
        _pictures("inference_time"),
        _bullets(speed.latency(evidence)),
        _startup_table(evidence),
        "## What to ship",
        _bullets(advice.recommendation(evidence)),
        *_sensitivity(evidence),
        "## Gate",
        _bullets([claims.gate(evidence)]),
        "## Environment",
        _environment_table(evidence),
    ]
    return "\n\n".join(parts) + "\n"


def _pictures(*names: str) -> str:
    return "\n".join(f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in names)


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table, first column left, the others right if they are numbers."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, [":--", *["--:" if numbers else ":--"] * (len(header) - 1)], *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _accuracy_table(evidence: Evidence) -> str:
    header = ["Model", "Parameters", "Size, MB", "Top-1 train", "Top-3 train", "Top-1 test", "Top-3 test"]
    rows = []
    models: list[tuple[str, int, Fp32Evidence | Int8Evidence]] = [
        ("fp32", evidence.int8.fp32_cost.parameters, evidence.fp32)
    ]
    for judged in evidence.versions:
        label = "int8" if len(evidence.versions) == 1 else f"int8 {judged.int8.quantize.engine}"
        models.append((label, judged.int8.cost.parameters, judged.int8))
    for name, parameters, model in models:
        shares = [f"{value:.2f} %" for split in ("train", "test") for value in _both(model.accuracy[split])]
        rows.append([f"{evidence.fp32.model} {name}", f"{parameters:,}", f"{model.size_bytes / 1e6:.3f}", *shares])
    if bf16 := evidence.measured.bf16:
        shares = ["not measured"] * 2 + [f"{value:.2f} %" for value in _both(bf16.accuracy)]
        parameters = evidence.int8.fp32_cost.parameters
        rows.append([f"{evidence.fp32.model} bf16", f"{parameters:,}", f"{bf16.size_bytes / 1e6:.3f}", *shares])
    return table(header, rows)


def _both(accuracy: Accuracy) -> tuple[float, float]:
    return accuracy.top1_percent, accuracy.top3_percent


def _size_table(evidence: Evidence) -> list[str]:
    """What is in each stored file; nothing where that was not measured."""
    models = [("fp32", evidence.fp32.size_bytes, evidence.fp32.contents)]
    for judged in evidence.versions:
        models.append((f"int8 {judged.int8.quantize.engine}", judged.int8.size_bytes, judged.int8.contents))
    rows = [
        [name, *(f"{size / 1e6:.4f}" for size in (found.weights_bytes, found.code_bytes, found.other_bytes, total))]
        for name, total, found in models
        if found
    ]
    return [table(["MB", "weights", "code", "metadata and container", "file"], rows)] if rows else []


def _macs_table(evidence: Evidence) -> str:
    counted, cost = evidence.int8.fp32_cost, evidence.int8.cost
    rows = [[str(batch), f"{counted.macs[batch]:,}", f"{cost.int8_macs[batch]:,}"] for batch in counted.macs]
    return table(["Batch size", "MACs per batch", "in int8, after quantization"], rows)


def _p50_table(evidence: Evidence) -> str:
    names = list(evidence.latency.rows[0].stats)
    rows = [[str(row.batch_size), *(_quantiles(row.stats[name]) for name in names)] for row in evidence.latency.rows]
    head = "Wall time, ms per batch, p50 / p90 / p99 (a dash where too few passes lie beyond a percentile):\n\n"
    return head + table(["Batch size", *names], rows)


def _quantiles(found: LatencyStats) -> str:
    return " / ".join(speed.three_digits(value) for value in (found.p50_ms, found.p90_ms, found.p99_ms))


def _speedup_table(evidence: Evidence) -> str:
    """The chosen version over the fastest float; every model over the registered fp32 model; and the control."""
    base, latency = evidence.latency.baseline, evidence.latency
    names = [name for name in latency.rows[0].stats if name != base]
    header = ["Batch size", "fastest float", f"{evidence.name} over it", *(f"{name} over {base}" for name in names)]
    body = []
    for row in latency.rows:
        best = row.fastest(evidence.floats)
        ratios = [row.ratio(best, evidence.name), *(row.speedups[name] for name in names), row.noise]
        body.append([str(row.batch_size), best, *(_ratio(found) for found in ratios)])
    head = f"Times as fast, with {speed.interval(latency.rows)}; last, the control, an int8 model against its copy:\n\n"
    return head + table([*header, "control"], body)


def _ratio(found: Ratio) -> str:
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _latency_table(evidence: Evidence) -> str:
    names = (evidence.latency.baseline, evidence.name)
    columns = ("p50, ms", "p90", "p99", "images/s", "calls")
    header = ["Batch size", *(f"{name} {what}" for name in names for what in columns)]
    rows = []
    for row in evidence.latency.rows:
        cells = [
            text
            for s in (row.stats[name] for name in names)
            for text in (
                *("-" if value is None else f"{value:.2f}" for value in (s.p50_ms, s.p90_ms, s.p99_ms)),
                f"{s.images_per_second:,.0f}",
                f"{s.repeats:,}",
            )
        ]
        rows.append([str(row.batch_size), *cells])
    return table(header, rows)


def _startup_table(evidence: Evidence) -> str:
    rows = [
        [found.model, f"{found.load_s:.2f}", f"{found.first_call_ms:.1f}", f"{found.peak_memory_mb:,.0f}"]
        for found in evidence.latency.startups
    ]
    return table(["In a process of its own", "loading, s", "first call, ms", "peak memory of the process, MB"], rows)


def _sensitivity(evidence: Evidence) -> list[str]:
    """Layer by layer, and what the budget kept in fp32; nothing where neither was measured."""
    found = evidence.int8.sensitivity
    if found is None:
        return []
    rows = [
        [
            f"`{layer.layer}`",
            f"{layer.weight_bits}",
            "not finite" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            *(
                "not known" if nats is None else f"{nats:.2g}"
                for nats in (layer.kl_only_int8_nats, layer.kl_only_fp32_nats)
            ),
            f"{layer.top1_only_int8_percent:.2f} %",
            f"{layer.top1_only_fp32_percent:.2f} %",
        ]
        for layer in found.layers
    ]
    header = ["Layer", "Weight bits", "SQNR of its output, dB"]
    header += [f"{what}, only this layer in {kind}" for what in ("KL, nats", "top-1") for kind in ("int8", "fp32")]
    sentences = [*advice.sensitivity(found), *advice.budget(evidence)]
    return ["## Layer sensitivity", table(header, rows), _pictures("sensitivity"), _bullets(sentences)]


def _environment_table(evidence: Evidence) -> str:
    host, int8, data = evidence.measured.host, evidence.int8, evidence.fp32.data
    quantize = int8.quantize
    rows = [
        ["CPU", claims.processor(host, evidence.latency.threads)],
        *([["Threads", f"**Warning**: {warning}"]] if (warning := too_many_threads(host)) else []),
        ["Instructions", ", ".join(host.features) or "unknown"],
        ["System", f"{host.system}, Python {host.python}"],
        ["Libraries", ", ".join(f"{name} {number}" for name, number in host.libraries.items())],
        ["Data", f"{data.name} from `{data.source}`, digest {data.digest}, {data.image_size_px} px"],
        ["Images", f"{data.train_images} train, {data.validation_images} validation, {data.test_images} test"],
        [
            "Training",
            f"seed {evidence.fp32.seed}, {claims.training_pace(evidence)}",
        ],
        ["Quantization", f"engine {quantize.engine}, timed as {evidence.name}, {claims.quantization(quantize)}"],
        ["Calibration", f"{quantize.calibration_images} training images, digest {int8.calibration_digest}"],
        ["fp32 version", f"`{evidence.fp32.version_uri}`"],
        ["int8 version", ", ".join(f"`{one.int8.version_uri}`" for one in evidence.versions)],
    ]
    return table(["What", "Value"], rows, numbers=False)
