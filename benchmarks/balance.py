"""The maps of pool.jsonl as a picture: lr_G against lr_D, and depth against depth.

python benchmarks/balance.py docs/balance.png      # needs chromium and chromium-driver
"""

import math
import shutil
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from pool import BINS, EPOCHS, IMAGES, KNOWN, cells_of, rate_bin, read
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cl_ray.tuning.importance import RATES
from cl_ray.tuning.report import DEPTHS
from cl_ray.tuning.study import TrialResult

WIDTH, HEIGHT = 720, 1080
COLOURS = "Cividis"  # alike to the eye with and without red and green (Nuñez et al., 2018)
BRIGHTEST, DARKEST = 4.0, 80.0


def picture(rows: list[TrialResult]) -> go.Figure:
    """Two heat maps of the median distance, the brighter the better, with the best beside it."""
    figure = make_subplots(rows=2, vertical_spacing=0.14)
    ends = [math.log10(end) for end in BINS]
    middles = [(low + high) / 2 for low, high in pairwise(ends)]
    rates = {number: middle for number, middle in enumerate(middles)}
    depths = {depth: float(depth) for depth in range(2, 6)}
    add(figure, 1, cells_of(rows, *RATES, rate_bin), rates)
    add(figure, 2, cells_of(rows, *DEPTHS, int), depths)
    rate = {
        "tickvals": ends,
        "ticktext": [f"{end:g}" for end in BINS],
        "ticks": "outside",
        "ticklen": 8,
        "range": [ends[0], ends[-1]],
    }
    figure.update_xaxes(title="learning rate of G, lr_g (log)", **rate, row=1)
    figure.update_yaxes(title="learning rate of D, lr_d (log)", **rate, row=1)
    figure.update_xaxes(title="depth of G, levels", dtick=1, row=2)
    figure.update_yaxes(title="depth of D, levels", dtick=1, row=2)
    return figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=HEIGHT,
        font={"size": 18, "color": "black", "family": "DejaVu Sans, sans-serif"},
        margin={"l": 120, "r": 30, "t": 90, "b": 70},
        title={
            "text": f"Fréchet distance after {EPOCHS} passes over {IMAGES:,} digits, {len(rows)} "
            "random settings:<br>median of a cell, its best, and of how many; smaller, brighter is "
            "better",
            "font": {"size": 16},
            "x": 0.01,
        },
        coloraxis={
            "colorscale": COLOURS,
            "reversescale": True,
            "showscale": False,  # the metrics stand in the cells
            "cmin": math.log10(BRIGHTEST),
            "cmax": math.log10(DARKEST),
        },
    )


def add(
    figure: go.Figure, line: int, cells: dict[tuple[int, int], list[float]], at: dict[int, float]
) -> None:
    """A heat map, each cell with its metrics; `at` is where a bin's middle lies."""
    places: list[Any] = list(at.values())
    medians = {place: statistics.median(some) for place, some in cells.items()}
    table = [[math.log10(medians[x, y]) if (x, y) in medians else None for x in at] for y in at]
    heat = go.Heatmap(x=places, y=places, z=table, coloraxis="coloraxis", xgap=2, ygap=2)
    figure.add_trace(heat, row=line, col=1)
    for (x, y), some in cells.items():
        figure.add_annotation(
            x=at[x],
            y=at[y],
            text=f"<b>{medians[x, y]:.1f}</b><br><span style='font-size:15px'>best {min(some):.1f} "
            f"of {len(some)}</span>",
            font={"size": 21, "color": "white" if medians[x, y] > 20 else "black"},
            showarrow=False,
            row=line,
            col=1,
        )


def photograph(figure: go.Figure, target: Path) -> None:
    """What a browser shows of it, as a PNG file."""
    options = webdriver.ChromeOptions()
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        sys.exit("This needs a browser: apt-get install chromium chromium-driver")
    options.binary_location = program
    for flag in (
        "headless=new",
        "no-sandbox",
        "hide-scrollbars",
        f"window-size={WIDTH},{HEIGHT + 200}",
    ):
        options.add_argument(f"--{flag}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        figure.write_html(page, config={"staticPlot": True})
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(page.as_uri())
            plot = browser.find_element("css selector", ".plotly-graph-div")
            target.write_bytes(plot.screenshot_as_png)
        finally:
            browser.quit()


if __name__ == "__main__":
    drawn = [curve.row for curve in read() if curve.number >= KNOWN and not curve.diverged]
    photograph(picture(drawn), Path(sys.argv[1]))
