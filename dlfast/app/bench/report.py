"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from dlfast.app.bench.accuracy import Error
from dlfast.app.bench.protocol import Ratio, Report, Row, geometric_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_json(report: Report) -> bytes:
    return (json.dumps(report.as_dict(), indent=1) + "\n").encode()


def print_tables(report: Report) -> None:
    """One table for each quantity, then the ratios."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for quantity in dict.fromkeys(row.quantity for row in report.rows):
        rows = [row for row in report.rows if row.quantity == quantity]
        table = Table(title=f"{quantity}: median (quartiles), ms")
        for heading in ("problem", "variant", "ms", "saved MB", "peak MB"):
            table.add_column(heading, justify="left" if heading in ("problem", "variant") else "right")
        last = ""
        for row in rows:
            table.add_row(
                row.problem if row.problem != last else "", row.variant, _time(row),
                _megabytes(row.saved_bytes), _megabytes(row.peak_bytes),
                end_section=row is rows[-1], style="bold" if row.ours else "",
            )  # fmt: skip
            last = row.problem
        console.print(table)
    table = Table(title="fastest mode of PyTorch / fastest of dlfast: above 1 dlfast is faster")
    headings = ["problem", "quantity", "dlfast", "PyTorch", "ratio (quartiles)"]
    for heading in headings + (["of roofline"] if report.points else []):
        table.add_column(heading)
    for ratio in report.ratios:
        part = [] if ratio.of_roofline is None else [f"{ratio.of_roofline:.0%}"]
        table.add_row(ratio.problem, ratio.quantity, ratio.ours, ratio.theirs, _ratio(ratio), *part)
    console.print(table)
    for group, quantity in dict.fromkeys((ratio.group, ratio.quantity) for ratio in report.ratios):
        of_it = [ratio for ratio in report.ratios if (ratio.group, ratio.quantity) == (group, quantity)]
        print(f"{group or 'all'}, {quantity}: geometric mean of the ratios {geometric_mean(of_it):.2f}, ", end="")
        print(f"smallest {min(ratio.median for ratio in of_it):.2f}")
    for note in report.notes:
        print(note)
    for label, value in report.machine.items():
        print(f"{label}: {value}")


def _time(row: Row) -> str:
    digits = 3 if row.seconds >= 1e-4 else 5
    return f"{1e3 * row.seconds:.{digits}f} ({1e3 * row.low:.{digits}f} to {1e3 * row.high:.{digits}f})"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def print_errors(errors: list[Error]) -> None:
    """Largest relative errors against float64."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="largest difference from float64 over the largest value, 3x3 convolution")
    for heading in ("channels", "dtype", "part", "way", "error", "of PyTorch's", "promised"):
        table.add_column(heading, justify="right")
    for e in errors:
        promised = "" if e.promised is None else f"{e.promised:.1e}"
        table.add_row(str(e.channels), e.dtype, e.part, e.way, f"{e.relative:.1e}", f"{e.of_pytorch:.1f}x", promised)
    Console().print(table)


def figure(report: Report) -> bytes:
    """The roofline where work was counted, else bars of time; as a PNG."""
    return roofline_figure(report) if report.roofline else bars(report)


def roofline_figure(report: Report) -> bytes:
    """Speed over arithmetic intensity, both as the dense formulas count them, one panel a quantity."""
    from matplotlib.figure import Figure

    assert report.roofline is not None
    roof = report.roofline
    quantities = list(dict.fromkeys(point.quantity for point in report.points))
    figure = Figure(figsize=(7 * len(quantities), 5.5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        points = [point for point in report.points if point.quantity == quantity]
        at = [point.flops / point.bytes for point in points]
        line = [min(at) / 2, roof.flops / roof.bandwidth, max(at) * 2]
        axes.plot(line, [min(roof.flops, x * roof.bandwidth) / 1e9 for x in line], color="0.4", label="roofline")
        for side, mark in (("theirs", "s"), ("ours", "o")):
            speeds = [point.flops / getattr(point, side) / 1e9 for point in points]
            label = "dlfast" if side == "ours" else "fastest mode of PyTorch"
            axes.scatter(at, speeds, marker=mark, s=24, label=label, zorder=3)
        for x, point in zip(at, points, strict=True):
            ends = [point.flops / seconds / 1e9 for seconds in (point.theirs, point.ours)]
            axes.plot([x, x], ends, color="0.7", linewidth=0.8, zorder=2)
            axes.annotate(point.problem.split(":")[0], (x, max(ends)), fontsize=6, rotation=45)
        axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="GFLOP/s, dense count", title=quantity)
        axes.legend(fontsize=8)
    return _png(figure)


def bars(report: Report) -> bytes:
    """Bars of time per problem and variant, one panel a quantity."""
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(row.quantity for row in report.rows))
    problems = list(dict.fromkeys(row.problem for row in report.rows))
    variants = list(dict.fromkeys(row.variant for row in report.rows))
    figure = Figure(figsize=(3 + 1.3 * len(problems), 3.6 * len(quantities)), layout="constrained")
    height = 0.8 / len(variants)
    for axes, quantity in zip(figure.subplots(len(quantities), squeeze=False)[:, 0], quantities, strict=True):
        for number, variant in enumerate(variants):
            rows = [r for r in report.rows if r.quantity == quantity and r.variant == variant]
            at = [problems.index(row.problem) + (number - (len(variants) - 1) / 2) * height for row in rows]
            medians = [1e3 * row.seconds for row in rows]
            spread = [
                [1e3 * max(0.0, row.seconds - row.low) for row in rows],
                [1e3 * max(0.0, row.high - row.seconds) for row in rows],
            ]
            axes.bar(at, medians, height, yerr=spread, label=variant, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(problems)), problems, fontsize=8, rotation=15)
        axes.set(yscale="log", ylabel="ms", title=f"{quantity} (lower is better)")
        axes.legend(fontsize=7)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
