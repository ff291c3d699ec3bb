"""A picture of the dashboard, drawn from a Prometheus's answers to the dashboard's queries.

Usage: python monitoring/picture.py DASHBOARD ANSWERS PICTURE. ANSWERS is a JSON file that maps each query to its answer, the
series of a range query. PICTURE is the SVG file to write.
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLUMNS, ROW_HEIGHT, WIDTH = 24, 0.26, 15  # Grafana's grid has 24 columns; the other numbers are inches
COLOURS = {"red": "#c4162a", "orange": "#e0752d", "green": "#37872d"}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none", "svg.hashsalt": "dashboard",
}  # fmt: skip
SUFFIXES = {"s": " s", "reqps": " req/s", "ops": " /s", "cps": " /s", "dtdurations": " s"}


def written(value: float, unit: str) -> str:
    """Return the value as Grafana writes it, in about as many digits."""
    if unit == "bool_yes_no":
        return {0: "No", 1: "Yes"}.get(value, "")
    if unit == "percentunit":
        return f"{value * 100:,.0f} %" if abs(value) >= 1 else f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    if unit in ("s", "dtdurations") and abs(value) >= 2 * 24 * 3600:
        return f"{value / 24 / 3600:,.0f} days"
    if unit == "s" and abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + SUFFIXES.get(unit, "")


def series(panel: Any, answers: Any) -> list[tuple[str, list[float], list[float]]]:
    """Return the legend, the times and the values of each series that a panel shows."""
    found = []
    for target in panel["targets"]:
        for one in answers[target["expr"]]:
            legend = re.sub(r"{{(\w+)}}", lambda name, labels=one["metric"]: labels.get(name[1], ""), target["legendFormat"])
            points = [(float(time), float(value)) for time, value in one["values"] if value not in ("NaN", "+Inf")]
            found.append((legend or ", ".join(one["metric"].values()), [it[0] for it in points], [it[1] for it in points]))
    return [it for it in found if it[1]]


def colour(value: float, steps: list[Any]) -> str:
    """Return the colour of the value by the panel's thresholds."""
    return COLOURS[[step["color"] for step in steps if step["value"] is None or step["value"] <= value][-1]]


def draw_figures(axes: Axes, panel: Any, shown: list[Any]) -> None:
    """Draw the last value of each series as a large figure."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.axis("off")
    for number, (legend, _, values) in enumerate(shown):
        x = (number + 0.5) / len(shown)
        text, shade = written(values[-1], defaults["unit"]), colour(values[-1], defaults["thresholds"]["steps"])
        axes.text(x, 0.55, text, size=19, weight="bold", color=shade, ha="center", va="center", transform=axes.transAxes)
        if len(shown) > 1:
            axes.text(x, 0.1, legend, size=8, ha="center", transform=axes.transAxes)


def draw_list(axes: Axes, shown: list[Any], end: float) -> None:
    """Draw the names of the series that have a value at the end."""
    axes.axis("off")
    for number, name in enumerate(sorted(legend for legend, times, _ in shown if times[-1] >= end - 2)):
        axes.text(0.02, 0.85 - 0.18 * number, name, size=9, color=COLOURS["red"], transform=axes.transAxes)


def draw_lines(axes: Axes, panel: Any, shown: list[Any], begin: float, end: float) -> None:
    """Draw each series as a line, and the thresholds that are in sight."""
    defaults = panel["fieldConfig"]["defaults"]
    for legend, times, values in shown:
        axes.plot([time - begin for time in times], values, label=legend, linewidth=1.1)
    top = axes.get_ylim()[1]
    axes.set(xlim=(0, end - begin), ylim=(0, defaults.get("max", top)))
    for step in defaults["thresholds"]["steps"][1:]:
        if 0.001 < step["value"] <= top:
            axes.axhline(step["value"], color=COLOURS["red"], linewidth=0.7, linestyle="--")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, defaults["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.tick_params(labelsize=7, length=2)
    axes.locator_params(axis="x", nbins=4)
    axes.locator_params(axis="y", nbins=3)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=6, loc="best", framealpha=0.6)


def main() -> None:
    """Draw the dashboard."""
    dashboard, answers = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    times = [time for answer in answers.values() for one in answer for time, _ in one["values"]]
    mpl.rcParams.update(STYLE)
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure((WIDTH, rows * ROW_HEIGHT))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / COLUMNS + 0.005, 1 - place["y"] / rows
        if panel["type"] == "row":
            figure.text(left, top - 0.8 / rows, panel["title"], size=12, weight="bold")
            continue
        figure.text(left + 0.005, top - 0.75 / rows, panel["title"], size=9, weight="bold")
        shape = left + 0.035, top - (place["h"] - 0.9) / rows, place["w"] / COLUMNS - 0.05, (place["h"] - 2.2) / rows
        axes, shown = figure.add_axes(shape), series(panel, answers)
        if panel["type"] == "stat":
            draw_figures(axes, panel, shown)
        elif panel["type"] == "table":
            draw_list(axes, shown, max(times))
        else:
            draw_lines(axes, panel, shown, min(times), max(times))
    svg = StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # Round the numbers inside of tags, which are coordinates.
    short = re.sub(r"\d+\.\d{2,}(?=[^<>]*>)", lambda number: f"{float(number[0]):.1f}", svg.getvalue())
    Path(sys.argv[3]).write_text(re.sub(r" +$", "", short, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
