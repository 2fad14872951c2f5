"""The tables of the report: each is a header and rows of text, made from `Evidence`; `markdown` writes one down."""

from collections.abc import Iterator

from qexp.measurement.accuracy import Accuracy, share_interval
from qexp.measurement.gate import AGREEMENT, DROP, SIZE, SPEED, TOP1, TRAINED, VERIFIED, GateCheck
from qexp.measurement.host import too_many_threads
from qexp.measurement.latency import LatencyRow, LatencyStats, Ratio
from qexp.measurement.sweep_models import BF16, FOLDED
from qexp.measurement.threads import ThreadsRow
from qexp.measurement.throughput import COLUMNS as COLUMNS_OF_THROUGHPUT
from qexp.measurement.throughput import KINDS
from qexp.measurement.throughput import cells as cells_of_throughput
from qexp.report import sentences
from qexp.report.hosts import COLUMNS, cells
from qexp.report.results import Evidence, Fp32Evidence, Int8Evidence, ThroughputEvidence
from qexp.report.sentences import by_batch_size, three_digits

Table = tuple[list[str], list[list[str]]]  # header and rows


def markdown(table: Table, numbers: bool = True) -> str:
    """A Markdown table, first column left, the others right if they are numbers."""
    header, rows = table
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, [":--", *["--:" if numbers else ":--"] * (len(header) - 1)], *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(evidence: Evidence) -> Table:
    """Best float and int8 side by side, and the limits of the gate with what was measured and whether it passed.

    A result of an earlier version does not have the gate's checks as numbers: its last two columns are left out.
    """
    checks = {check.limit: check for check in evidence.gate.checks}
    fp32, int8 = evidence.fp32.accuracy["test"], evidence.int8.accuracy["test"]
    drop = evidence.int8.comparison["test"]
    labelled = evidence.fp32.data.labelled
    ends = f"{drop.top1_drop_low_points:.2f} to {drop.top1_drop_high_points:.2f}"
    rows = [
        [
            f"Top-1, {fp32.images:,} test images" if labelled else f"Agreement with fp32, {fp32.images:,} images",
            *(_top1(accuracy) for accuracy in (fp32, int8)),
            f"drop {drop.top1_drop_points:.2f} points ({ends})",
            *_limit(checks.get(DROP), "at most {:g} points", "{:.4g} points"),
        ],
        [
            "Size of the file",
            *(f"{size / 1e6:.3f} MB" for size in (evidence.fp32.size_bytes, evidence.int8.size_bytes)),
            sentences.times(evidence.size_ratio, "smaller", "larger"),
            *_limit(checks.get(SIZE), "at least {:g}x", "{:.4g}x"),
        ],
        *(_time(evidence, row, checks.get(SPEED)) for row in _rows_to_show(evidence)),
        *_other_limits(checks),
    ]
    header = ["", "Best float", "int8", "Difference", "Gate's limit", "Measured", "Passed"]
    return _without_gate(header, rows) if not checks else (header, rows)


def _without_gate(header: list[str], rows: list[list[str]]) -> Table:
    return header[:4], [row[:4] for row in rows]


def _rows_to_show(evidence: Evidence) -> Iterator[LatencyRow]:
    """The smallest and the largest batch size that count, and between them the one at which the gate was decided."""
    counted = sorted(evidence.latency.counted, key=lambda row: row.batch_size)
    least = evidence.latency.least_speedup(evidence.name, evidence.floats).batch_size
    for place, row in enumerate(counted):
        if place in (0, len(counted) - 1) or row.batch_size == least:
            yield row


def _time(evidence: Evidence, row: LatencyRow, check: GateCheck | None) -> list[str]:
    best = row.fastest(evidence.floats)
    ratio = row.ratio(best, evidence.name)
    limit = ["", "", ""]
    if check:  # the gate has compared the lowest of these ends
        kept = ratio.low >= check.bound
        limit = [f"at least {check.bound:g}x", f"{ratio.low:.4g}x", _passed(kept)]
    elif evidence.gate.checks:
        limit = ["", "", "not decided"]
    return [
        f"Time per batch, batch size {row.batch_size}",
        f"{_ms(row.stats[best])} (`{best}`)",
        f"{_ms(row.stats[evidence.name])} (`{evidence.name}`)",
        f"{ratio.median:.2f}x as fast ({_interval(ratio)})",
        *limit,
    ]


def _other_limits(checks: dict[str, GateCheck]) -> Iterator[list[str]]:
    """Limits that compare nothing with float."""
    if least := checks.get(TOP1):
        yield ["Lowest top-1 allowed", "", "", "", *_limit(least, "at least {:g} %", "{:.4g} %")]
    if same := checks.get(AGREEMENT):
        yield ["Lowest agreement with fp32", "", "", "", *_limit(same, "at least {:g} %", "{:.4g} %")]
    if guess := checks.get(TRAINED):
        yield ["fp32 better than guessing", "", "", "", *_limit(guess, "above {:.4g} %", "{:.4g} %")]
    if same := checks.get(VERIFIED):
        yield [
            "Reloaded models",
            "",
            "",
            "",
            "equal outputs",
            "equal" if same.kept else "not equal",
            _passed(same.kept),
        ]


def _limit(check: GateCheck | None, limit: str, measured: str) -> list[str]:
    if check is None:
        return ["", "", ""]
    return [limit.format(check.bound), measured.format(check.value), _passed(check.kept)]


def _passed(kept: bool) -> str:
    return "yes" if kept else "**no**"


def _top1(accuracy: Accuracy) -> str:
    low, high = share_interval(accuracy.top1_percent, accuracy.images)
    return f"{accuracy.top1_percent:.2f} % ({low:.2f} to {high:.2f})"


def _ms(stats: LatencyStats) -> str:
    return f"{three_digits(stats.p50_ms)} ms"


def accuracy(evidence: Evidence) -> Table:
    """Parameters, size, and accuracy on training and test images, as the seed report has them."""
    header = ["Model", "Parameters", "Size, MB", "Top-1 train", "Top-3 train", "Top-1 test", "Top-3 test"]
    rows = []
    parameters, without_pool = evidence.int8.fp32_cost.parameters, evidence.folded_cost
    models: list[tuple[str, int, Fp32Evidence | Int8Evidence]] = [("fp32", parameters, evidence.fp32)]
    for judged in evidence.versions:
        int8, label = judged.int8, _label(evidence, judged.int8)
        if not int8.runtimes:
            models.append((label, int8.cost.parameters, int8))
        for runtime in (str(int8.runtime), *int8.runtimes) if int8.runtimes else ():
            where = f"{label} in {sentences.RUNTIME_NAMES[runtime]}"
            models.append((where, int8.cost.parameters, int8.in_runtime(runtime)))
    for name, count, model in models:
        shares = [share for split in ("train", "test") for share in _shares(model.accuracy.get(split))]
        rows.append([f"{evidence.fp32.model} {name}", f"{count:,}", f"{model.size_bytes / 1e6:.3f}", *shares])
    for name in (BF16, f"{BF16}{FOLDED}"):
        if bf16 := evidence.measured.rounded.get(name):
            shares = [*_shares(None), *_shares(bf16.accuracy)]
            count = parameters if name == BF16 or not without_pool else without_pool.parameters
            rows.append([f"{evidence.fp32.model} {name}", f"{count:,}", f"{bf16.size_bytes / 1e6:.3f}", *shares])
    return header, rows


def _label(evidence: Evidence, int8: Int8Evidence) -> str:
    return "int8" if len(evidence.versions) == 1 else f"int8 {int8.quantize.label}"


def _shares(accuracy: Accuracy | None) -> list[str]:
    """Top-1 and top-3."""
    if accuracy is None:
        return ["not measured"] * 2
    return [f"{value:.2f} %" for value in (accuracy.top1_percent, accuracy.top3_percent)]


def size(evidence: Evidence) -> Table | None:
    """What is in each stored file; None where that was not measured."""
    models = [("fp32", evidence.fp32.contents)]
    models += [(_label(evidence, judged.int8), judged.int8.contents) for judged in evidence.versions]
    rows = [
        [name, *(f"{part / 1e6:.4f}" for part in (found.weights_bytes, found.code_bytes, found.other_bytes))]
        for name, found in models
        if found
    ]
    return (["MB", "Weights", "Code", "Metadata and container"], rows) if rows else None


def macs(evidence: Evidence) -> Table:
    """Multiply-accumulates of the fp32 model, of the folded one if there is one, and those in int8, by batch size."""
    counted, cost, folded = evidence.int8.fp32_cost, evidence.int8.cost, evidence.folded_cost
    rows = [
        [
            str(batch),
            f"{counted.macs[batch]:,}",
            *([f"{folded.macs[batch]:,}"] if folded else []),
            f"{cost.int8_macs[batch]:,}",
        ]
        for batch in counted.macs
    ]
    after = ["With the pool folded away"] if folded else []
    return ["Batch size", "MACs per batch", *after, "In int8, after quantization"], rows


def latency(evidence: Evidence) -> Table:
    """A row for each model and a column for each batch size: medians of all models, percentiles and throughput of fp32
    and the chosen version, its speed-up over the fastest float model, and the control."""
    rows, main = by_batch_size(evidence), (evidence.latency.baseline, evidence.name)
    found = [
        [
            f"**`{name}`**" if name == evidence.name else f"`{name}`",
            *(three_digits(row.stats[name].p50_ms) for row in rows),
        ]
        for name in rows[0].stats
    ]
    for name in main:
        found.append([f"`{name}`, p90", *(three_digits(row.stats[name].p90_ms) for row in rows)])
        found.append([f"`{name}`, p99", *(three_digits(row.stats[name].p99_ms) for row in rows)])
    for name in main:
        found.append([f"`{name}`, images per second", *(f"{row.stats[name].images_per_second:,.0f}" for row in rows)])
    best = [row.fastest(evidence.floats) for row in rows]
    found.append(["Fastest float model", *(f"`{name}`" for name in best)])
    faster = [row.ratio(name, evidence.name) for row, name in zip(rows, best, strict=True)]
    found.append([f"`{evidence.name}`: times as fast as it", *(f"{ratio.median:.2f}" for ratio in faster)])
    found.append(["95 % interval of that", *map(_interval, faster)])
    found.append(["Control: a model against its copy", *(_interval(row.noise) for row in rows)])
    return ["Batch size", *(str(row.batch_size) for row in rows)], found


def _interval(found: Ratio) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


def _ratio(found: Ratio) -> str:
    return f"{found.median:.2f} ({_interval(found)})"


def threads(evidence: Evidence) -> Table | None:
    """The best number of threads at each batch size; None where one number was timed."""
    rows = evidence.measured.best_threads(evidence.name, evidence.floats)
    return (list(THREADS_COLUMNS), [threads_cells(row) for row in rows]) if rows else None


THREADS_COLUMNS = (
    "Batch size", "Fastest float, ms", "Best for it", "int8, ms", "Best for int8", "Times as fast, each on its fastest",
)  # fmt: skip


def threads_cells(row: ThreadsRow) -> list[str]:
    """The fastest float and int8 on each number of threads, below THREADS_COLUMNS."""
    cells = [str(row.batch_size)]
    for found in (row.float, row.int8):
        cells.append(", ".join(f"{three_digits(ms)} on {count}" for count, ms in found.p50_ms.items()))
        cells.append(sentences.threads(found.threads) + ("" if found.shown else ", not told apart"))
    return [*cells, _ratio(row.speedup)]


def throughput(found: ThroughputEvidence) -> Table:
    """At each batch size, the settings with which float and int8 serve most, and those that were chosen."""
    chosen = [best.setting for kind in KINDS if (best := found.best(kind))]
    for size in {row.setting.batch_size for row in found.result.rows}:
        rows = [row for row in found.result.rows if row.setting.batch_size == size]
        chosen += [max(rows, key=lambda row: row.of(kind).mean.value).setting for kind in KINDS]
    rows = [row for row in found.result.rows if row.setting in chosen]
    rows.sort(key=lambda row: (row.setting.batch_size, row.setting.cores))
    header = [name if name.startswith("int8") else name.capitalize() for name in COLUMNS_OF_THROUGHPUT]
    shown = [list(cells_of_throughput(row)) for row in rows]
    return header, [[*texts[:3], f"`{texts[3]}`", *texts[4:]] for texts in shown]


def startup(evidence: Evidence) -> Table:
    """Loading and first call of every model, each in a process of its own."""
    rows = [
        [f"`{found.model}`", f"{found.load_s:.2f}", f"{found.first_call_ms:.1f}", f"{found.peak_memory_mb:,.0f}"]
        for found in evidence.latency.startups
    ]
    return ["Model", "Loading, s", "First batch, ms", "Peak memory of the process, MB"], rows


def versions(evidence: Evidence) -> Table | None:
    """The int8 versions beside the chosen one; None where there are none."""
    rows = []
    for other in evidence.versions[1:]:
        ratio = evidence.latency.mean_ratio([evidence.name], other.name)
        drop = other.int8.comparison["test"].top1_drop_points
        why = evidence.choice.not_chosen.get(other.name, "")
        figures = [f"{drop:.2f}", _ratio(ratio), f"{other.int8.size_bytes / 1e6:.2f}", other.gate.word]
        rows.append([f"`{other.int8.version_uri}`", f"`{other.name}`", *figures, why or "it is the best of them"])
    times = f"Times as fast as `{evidence.name}`"
    header = ["Version", "Model", "Top-1 drop, points", times, "Size, MB", "Gate", "Why it was not chosen"]
    return (header, rows) if rows else None


def hosts(evidence: Evidence) -> Table:
    """What is known of the chosen version, a row a kind of machine."""
    return [name[0].upper() + name[1:] for name in COLUMNS], [list(cells(one)) for one in evidence.hosts]


def sensitivity(evidence: Evidence) -> Table | None:
    """Layer by layer; None where that was not measured."""
    found = evidence.int8.sensitivity
    if found is None:
        return None
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
    header = ["Layer", "Weight bits", "SQNR, dB"]
    return [*header, *(f"{what}, only in {kind}" for what in ("KL, nats", "Top-1") for kind in ("int8", "fp32"))], rows


def environment(evidence: Evidence) -> Table:
    """What the figures belong to: machine, libraries, data, training, quantization, versions."""
    host, int8, data = evidence.measured.host, evidence.int8, evidence.fp32.data
    rows = [
        ["CPU", sentences.processor(host, evidence.latency.threads)],
        *([["Threads", f"**Warning**: {warning}"]] if (warning := too_many_threads(host)) else []),
        ["Instructions", ", ".join(host.features) or "unknown"],
        ["System", f"{host.system}, Python {host.python}"],
        ["Libraries", ", ".join(f"{name} {number}" for name, number in host.libraries.items())],
        ["Data", f"{data.name} from `{data.source}`, digest {data.digest}, {data.image_size_px} px"],
        ["Images", f"{data.train_images:,} train, {data.validation_images:,} validation, {data.test_images:,} test"],
        ["Training", sentences.training_setup(evidence)],
        ["Quantization", f"engine {int8.quantize.label}, {sentences.quantization(int8.quantize)}"],
        ["Calibration", f"{int8.quantize.calibration_images:,} training images, digest {int8.calibration_digest}"],
        ["fp32 version", f"`{evidence.fp32.version_uri}`"],
        ["int8 version", ", ".join(f"`{one.int8.version_uri}`" for one in evidence.versions)],
    ]
    return ["What", "Value"], rows
