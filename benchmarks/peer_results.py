"""What peers.py has found, and how it shows it: a page in Markdown and a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limits import Limits, Operation
from matplotlib.figure import Figure
from peer_models import FLOATS, FOLDED, OURS, PEERS

from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyRow, Ratio
from qexp.report import tables
from qexp.report.sentences import span, three_digits

DEFAULT = "fx"  # the first of our engines, as a plain load runs it; it is timed twice, for the noise
PROFILED = "fx_onednn"


@dataclass(frozen=True)
class Entry:
    """An int8 model: size of its file or files, accuracy on the test images, drop with its 95 % interval.

    `below_peer_points`: of one of ours, how much less accurate it is than the most accurate peer on the same images,
    with the ends of the 95 % interval.
    """

    name: str
    size_bytes: int
    top1_percent: float
    drop_points: float
    drop_low_points: float
    drop_high_points: float
    made_in_s: float
    below_peer_points: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Peers:
    """All int8 models of one registered fp32 model; `macs` and `weight_bytes` are those of the default engine's.

    `profiles` has where the time of a pass of PROFILED goes, by batch size: the smallest and the largest. Those of
    earlier versions are means of the passes, in which one stall shows as an operation's share. `chosen` is the int8
    model that `qexp run` would choose of ours, `not_chosen` has the reasons of the others, `failed` those of the files
    that could not be made.
    """

    model: str
    fp32_top1_percent: float
    test_images: int
    entries: tuple[Entry, ...]
    rows: tuple[LatencyRow, ...]
    limits: Limits
    macs_of_one_image: int
    weight_bytes: int
    host: Host
    profiles: dict[int, tuple[Operation, ...]] = field(default_factory=dict)
    profile_statistic: str = "mean"
    chosen: str = ""
    not_chosen: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def best_peer(row: LatencyRow) -> str:
    """The peer that takes least time at a batch size."""
    return row.fastest([name for name in PEERS if name in row.stats])


def fastest_float(row: LatencyRow) -> str:
    """The float that takes least time at a batch size, folded ones among them."""
    return row.fastest([name for name in FLOATS if name in row.stats])


def ratio_to_best(row: LatencyRow, name: str) -> Ratio:
    """Time of one of our models over that of the best peer: below 1 is faster."""
    return row.ratio(name, best_peer(row))


def page(found: Sequence[Peers], picture: str) -> str:
    """One section for each kind of CPU, in it one for each network."""
    parts = ["# int8 against the peers", f"![Time over that of the best peer, by batch size]({picture})"]
    for cpu in dict.fromkeys(_cpu(peers) for peers in found):
        parts += [f"## {cpu}", *(render(peers) for peers in found if _cpu(peers) == cpu)]
    return "\n\n".join(parts) + "\n"


def _cpu(peers: Peers) -> str:
    return f"{peers.host.cpu} ({', '.join(peers.host.features)})"


def render(peers: Peers) -> str:
    head = ["model", "size, MB", "test top-1", "drop, points (95 %)", "below the best peer", "made in, s"]
    accuracy = [
        [
            entry.name,
            f"{entry.size_bytes / 1e6:.3f}",
            f"{entry.top1_percent:.2f} %",
            _points((entry.drop_points, entry.drop_low_points, entry.drop_high_points)),
            _points(entry.below_peer_points) if entry.below_peer_points else "-",
            f"{entry.made_in_s:.1f}",
        ]
        for entry in peers.entries
    ]
    names = list(peers.rows[0].stats)
    batches = [f"{row.batch_size}" for row in peers.rows]
    times = [[name, *(three_digits(row.stats[name].p50_ms) for row in peers.rows)] for name in names]
    ours = [name for name in names if name in OURS]
    ratios = [[name, *(_ratio_text(row, name, best_peer(row)) for row in peers.rows)] for name in ours]
    ratios.append(["best peer", *(best_peer(row) for row in peers.rows)])
    if peers.chosen:
        over = [_ratio_text(row, peers.chosen, fastest_float(row)) for row in peers.rows]
        ratios.append([f"{peers.chosen} over the fastest float", *over])
        ratios.append(["fastest float", *(fastest_float(row) for row in peers.rows)])
    ratios.append(["noise", *(f"{row.noise.low:.2f} to {row.noise.high:.2f}" for row in peers.rows)])
    rounds = [len(row.round_ms[DEFAULT]) for row in peers.rows]
    host = peers.host
    libraries = ", ".join(f"{name} {number}" for name, number in host.libraries.items())
    parts = [
        f"### {peers.model}",
        f"{host.threads} threads, {libraries}; {span(rounds)} "
        f"rounds at each batch size. fp32: {peers.fp32_top1_percent:.2f} % of {peers.test_images:,} test images.",
        tables.markdown((head, accuracy)),
        *_about_failed(peers),
        *_about_chosen(peers),
        "p50 in ms by batch size:",
        tables.markdown((["model", *batches], times)),
        "Time over that of the best peer (below 1 is faster), with 95 % interval; `?`: not shown to be faster or slower"
        f"{_of_one_load(peers.rows)}. `fx` has the kernels of a plain load (`x86`), "
        f"`{PROFILED}` and `fx{FOLDED}` those of oneDNN. Peers fold no pool: what int8 alone "
        "gives is shown by our models that are not folded:",
        tables.markdown((["int8 model", *batches], ratios)),
        _about_limits(peers),
        *(
            _profile_text(row, peers.profiles[row.batch_size], peers.profile_statistic)
            for row in peers.rows
            if row.batch_size in peers.profiles
        ),
    ]
    return "\n\n".join(parts)


def _of_one_load(rows: Sequence[LatencyRow]) -> str:
    if all(row.enough for row in rows):
        return " (noise: the default engine against a second copy of itself)"
    return ", as everywhere here: models were loaded once for each batch size, and a load makes some percent"


def _ratio_text(row: LatencyRow, name: str, over: str) -> str:
    ratio = row.ratio(name, over)
    text = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return text if row.compared(over, name) else f"{text} ?"


def _about_failed(peers: Peers) -> list[str]:
    if not peers.failed:
        return []
    return ["Not made: " + "; ".join(f"`{file}` ({reason})" for file, reason in peers.failed.items()) + "."]


def _about_chosen(peers: Peers) -> list[str]:
    """What `qexp run` would choose, and where it is slower than the best peer."""
    if not peers.chosen:
        return []
    slower = [row for row in peers.rows if row.compared(peers.chosen, best_peer(row)) > 0]
    held = "At no batch size a peer is shown to be faster."
    if slower:
        listed = ", ".join(f"{row.batch_size} ({ratio_to_best(row, peers.chosen).median:.2f})" for row in slower)
        held = f"A peer is shown to be faster at batch size {listed}."
    reasons = "; ".join(f"`{name}`: {reason}" for name, reason in peers.not_chosen.items())
    return [f"`qexp run` chooses **{peers.chosen}**. {held} Not chosen: {reasons}."]


def _points(found: tuple[float, float, float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def _about_limits(peers: Peers) -> str:
    first, last = peers.rows[0], peers.rows[-1]
    same = [name for name in first.stats if name in OURS and FOLDED not in name]  # as many multiply-accumulates as fp32
    fast = {row.batch_size: min(row.stats[name].p50_ms for name in same) for row in (first, last)}
    rate = last.batch_size * peers.macs_of_one_image / fast[last.batch_size] / 1e6
    read = peers.weight_bytes * 1e-6 / fast[first.batch_size]
    return (
        f"The machine: {peers.limits.int8_gmacs_per_s:,.0f} G int8 multiply-accumulates a second in a matrix product "
        f"(2048 x 4096 x 4096){_about_peak(peers)}, "
        f"{peers.limits.read_gb_per_s:.1f} GB/s read from memory. Our fastest int8 model that is not folded does "
        f"{rate:,.0f} G of the model's multiply-accumulates a second at batch size {last.batch_size} "
        f"({100 * rate / peers.limits.int8_gmacs_per_s:.0f} %); at batch size {first.batch_size} it goes through the "
        f"default engine's {peers.weight_bytes / 1e6:.1f} MB of weights at {read:.1f} GB/s "
        f"({100 * read / peers.limits.read_gb_per_s:.0f} %; above 100 % if they stay in the caches)."
        + _about_calls(peers.limits)
    )


def _about_peak(peers: Peers) -> str:
    peak, limits = peers.limits.peak_gmacs_per_s(peers.host.threads), peers.limits
    if peak is None:
        return ""
    return (
        f", {100 * limits.int8_gmacs_per_s / peak:.0f} % of the {peak:,.0f} G that {peers.host.threads} cores at "
        f"{limits.clock_ghz:.2f} GHz with {limits.int8_macs_a_cycle} a cycle can do at most"
    )


def _about_calls(limits: Limits) -> str:
    if limits.trace_call_us is None:
        return ""
    return f" Inside a trace, torch's int8 convolution takes at least {limits.trace_call_us:.1f} µs a call."


def _profile_text(row: LatencyRow, found: tuple[Operation, ...], statistic: str) -> str:
    head = ["operation", "input", "calls", "µs", "share"]
    rows = [
        [
            f"`{one.name}`",
            " x ".join(map(str, one.input_shape)) or "-",
            str(one.calls),
            f"{one.time_us:,.0f}",
            f"{one.share_percent:.1f} %",
        ]
        for one in found
    ]
    whole, alone = sum(one.time_us for one in found), 1000 * row.stats[PROFILED].p50_ms
    title = (
        f"Where a pass of `{PROFILED}` spends its time at batch size {row.batch_size}, by torch's profiler, which adds "
        f"its own to each operation ({whole:,.0f} µs in all; {alone:,.0f} µs without it), {statistic} of 30 passes:"
    )
    return f"{title}\n\n{tables.markdown((head, rows))}"


def draw(found: list[Peers], file: Path) -> None:
    drawn = [*OURS, *PEERS]
    colors = {name: f"C{number % 10}" for number, name in enumerate(drawn)}  # the same for each network
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), dpi=160, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, peers in zip(places, found, strict=False):
        batches = [row.batch_size for row in peers.rows]
        for name in (name for name in drawn if name in peers.rows[0].stats):
            style = "o-" if name in OURS else "s--"
            ratios = [ratio_to_best(row, name).median for row in peers.rows]
            axes.plot(batches, ratios, style, ms=3, lw=2 if name == peers.chosen else 1, color=colors[name], label=name)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_title(peers.model, fontsize=9)
        axes.set(xlabel="batch size", ylabel="time over that of the best peer", ylim=(0, 2.5))
    for axes in list(figure.axes)[len(found) :]:
        axes.remove()
    # One for all, beside the lines: a model has the same colour everywhere.
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
    what = "thick: the version chosen"
    figure.legend(
        handles=list(lines.values()), labels=list(lines), loc="outside lower center", ncols=6, fontsize=8, title=what
    )
    figure.savefig(file)
