"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json

from dlfast.bench.protocol import Ratio, Report, Row, geometric_mean


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
    for heading in ("problem", "quantity", "dlfast", "PyTorch", "ratio (quartiles)"):
        table.add_column(heading)
    for ratio in report.ratios:
        table.add_row(ratio.problem, ratio.quantity, ratio.ours, ratio.theirs, _ratio(ratio))
    console.print(table)
    for quantity in dict.fromkeys(ratio.quantity for ratio in report.ratios):
        of_it = [ratio for ratio in report.ratios if ratio.quantity == quantity]
        print(f"{quantity}: geometric mean of the ratios {geometric_mean(of_it):.2f}")
    for note in report.notes:
        print(note)
    for label, value in report.machine.items():
        print(f"{label}: {value}")


def _time(row: Row) -> str:
    return f"{1e3 * row.seconds:.3f} ({1e3 * row.low:.3f} to {1e3 * row.high:.3f})"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def figure(report: Report) -> bytes:
    """Bars of time per problem and variant, one panel a quantity, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(row.quantity for row in report.rows))
    problems = list(dict.fromkeys(row.problem for row in report.rows))
    variants = list(dict.fromkeys(row.variant for row in report.rows))
    figure = Figure(figsize=(3 + 1.3 * len(problems), 3.6 * len(quantities)), layout="constrained")
    FigureCanvasAgg(figure)
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
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
