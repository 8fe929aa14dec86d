"""Plots of results, with matplotlib: each function makes a figure, or None if there is no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..compared.candidates import CANDIDATES, OURS
from ..results import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Ours stands out; the authors' are warm, split versions green, bare products grey.
COLOURS = {
    OURS: "#0b57d0",
    "authors": "#d1495b",
    "authors-compiled": "#edae49",
    "split": "#2e8b57",
    "split-compiled": "#8fc93a",
    "matmul": "#777777",
    "matmul-into": "#bbbbbb",
    "flash-kmeans": "#7b4fb5",
    "flash-kmeans-match": "#b79bdc",
    "flashlib": "#b5532a",
    "flashlib-match": "#e0a485",
}
MARKERS = {OURS: "o", "authors": "s", "authors-compiled": "D", "split": "^", "matmul": "x"}
SERIES_AXES: dict[str, tuple[str, Callable[[str], int]]] = {
    "tokens": ("tokens N", lambda shape: int(shape.split("x")[1])),
    "batch": ("items B", lambda shape: int(shape.split("x")[0])),
    "channels": ("channels D", lambda shape: int(shape.split("x")[2].split("/")[0])),
}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("plots need matplotlib: pip install 'negtome-fast[eval]'") from None
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _short(case: dict[str, Any]) -> str:
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return f"{case['shape']} {short.get(case['dtype'], case['dtype'])}"


def _case_label(case: dict[str, Any]) -> str:
    return f"{case['name']}\n{_short(case)}" if case["name"] != case["shape"] else _short(case)


def speed_ups(result: dict[str, Any]) -> Figure | None:
    """Bars: how many times as long each rival takes as ours; paired medians, 20th to 80th."""
    cases = [case for case in measured(result, "shapes") if case.get("times")]
    rivals = [
        name
        for name in CANDIDATES
        if name != OURS and any("times_ours" in case["times"].get(name, {}) for case in cases)
    ]
    if not cases or not rivals:
        return None
    rows = [(case, [name for name in rivals if name in case["times"]]) for case in cases]
    bars = sum(len(shown) for _, shown in rows)
    figure, (axes,) = _figure(9, 1.4 + 0.25 * len(rows) + 0.2 * bars)
    place, ticks, longest = 0.0, [], 1.0
    legend = set()
    for case, shown in rows:
        ticks.append(place + (len(shown) - 1) / 2)
        for rival in shown:
            ratio = case["times"][rival].get("times_ours")
            if ratio:
                middle, low, high = ratio["median"], ratio["p20"], ratio["p80"]
                longest = max(longest, high)
                axes.barh(
                    place,
                    middle,
                    0.92,
                    color=COLOURS[rival],
                    label=None if rival in legend else CANDIDATES[rival].label,
                    xerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                    error_kw={"elinewidth": 0.9, "ecolor": "#333333", "capsize": 0},
                )
                axes.text(
                    high + 0.012 * longest, place, f" {middle:.2f}", va="center", fontsize=7.5
                )
                legend.add(rival)
            else:
                reason = case["times"][rival].get("failed", "")
                axes.text(0.02, place, f"did not run: {reason[:70]}", va="center", fontsize=7)
            place += 1
        place += 1.2
    axes.axvline(1.0, color=COLOURS[OURS], linewidth=1.6)
    axes.set_yticks(ticks, [_case_label(case) for case in cases], fontsize=8.5)
    axes.set_xlim(0, longest * 1.12)
    axes.set_ylim(place - 1.2, -1)
    axes.set_xlabel("time of a rival / time of ours: right of the blue line it is slower than ours")
    _tidy(axes, "How many times as long as ours")
    axes.grid(False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return figure


def _ceilings(axes: Axes, dtype: str, roof: float, slope: float, ends: tuple[float, float]) -> None:
    """The roof of products and the slope of copies, over intensities between `ends`."""
    left, right = ends
    ridge = roof / slope
    axes.plot([left, ridge, right], [left * slope, roof, roof], color="#222222", linewidth=1.4)
    for text, x, y, side in (
        (f"ceiling of a {dtype} product", right, roof, "right"),
        ("ceiling of a copy", ridge * 0.55, ridge * 0.55 * slope, "left"),
    ):
        axes.annotate(
            text,
            (x, y),
            xytext=(-6 if side == "right" else 8, 5),
            textcoords="offset points",
            ha=side,
            fontsize=8.5,
        )


def _rates(axes: Axes, cases: Sequence[dict[str, Any]], scale: float) -> list[float]:
    """Draw the rates of all candidates, number ours by case, and return the rates."""
    drawn = []
    for name in ("matmul", "split", "authors", OURS):
        for number, case in enumerate(cases, start=1):
            tflops = case["times"].get(name, {}).get("tflops")
            if tflops is None:
                continue
            x, rate = _intensity(case), tflops * scale
            drawn.append(rate)
            style: dict[str, Any] = {"color": COLOURS[name], "marker": MARKERS[name]}
            label = CANDIDATES[name].label
            if name != OURS:
                axes.scatter(x, rate, s=30, label=label, zorder=2, **style)
                continue
            axes.scatter(x, rate, s=46, label=label, zorder=3, **style)
            # Shapes with equally many tokens lie above each other, so labels alternate sides.
            right = number % 2
            axes.annotate(
                str(number),
                (x, rate),
                xytext=(8 if right else -8, -3),
                textcoords="offset points",
                ha="left" if right else "right",
                fontsize=8,
                color=COLOURS[name],
            )
    return drawn


def _intensity(case: dict[str, Any]) -> float:
    """FLOP of the matching for each byte that must be moved."""
    return 2 * float(case["multiply_adds"]) / float(case["least_bytes"])


def roofline(result: dict[str, Any]) -> Figure | None:
    """Rate against arithmetic intensity, under the two ceilings of the same run."""
    limits = result.get("ceilings")
    cases = [
        case
        for case in measured(result, "shapes")
        if case.get("least_bytes") and "tflops" in case.get("times", {}).get(OURS, {})
    ]
    if not limits or not cases:
        return None
    unit, scale = ("TFLOP/s", 1.0) if limits["matmul_tflops"] >= 1 else ("GFLOP/s", 1e3)
    figure, (axes,) = _figure(9, 5.2)
    roof, slope = limits["matmul_tflops"] * scale, limits["copy_bytes_per_second"] / 1e12 * scale
    places = [roof / slope, *map(_intensity, cases)]
    _ceilings(axes, limits["dtype"], roof, slope, (min(places) / 3, max(places) * 3))
    rates = [roof, *_rates(axes, cases, scale)]
    axes.set_xscale("log")
    axes.set_yscale("log")
    # On a CPU a coarse product in int8 goes beyond the ceiling of fp32.
    axes.set_ylim(min(min(rates) / 1.6, roof / 4), max(rates) * 1.5)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("FLOP of the matching for each byte that must be moved")
    axes.set_ylabel(unit)
    _tidy(axes, "Roofline: rate of the matching")
    handles, labels = axes.get_legend_handles_labels()
    single = dict(zip(labels, handles, strict=True))
    axes.legend(single.values(), single.keys(), fontsize=8.5, frameon=False, loc="lower right")
    names = [f"{number} {_short(case)}" for number, case in enumerate(cases, start=1)]
    lines = [",   ".join(names[i : i + 3]) for i in range(0, len(names), 3)]
    figure.supxlabel("\n".join(lines), fontsize=8, color="#444444")
    return figure


def _line(axes: Axes, name: str, points: Sequence[tuple[int, float]], low_high: Any = None) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(
        x, y, color=COLOURS[name], marker=MARKERS.get(name, "."), label=CANDIDATES[name].label,
        linewidth=1.8 if name == OURS else 1.2, markersize=5,
    )  # fmt: skip
    if low_high:
        low, high = zip(*low_high, strict=True)
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)


def _log_axes(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45, ha="right", fontsize=8.5)
    axes.minorticks_off()
    axes.set_xlabel(label)


def _time_lines(axes: Axes, cases: Sequence[dict[str, Any]], size: Any) -> None:
    for name in ("matmul", "split", "authors", OURS):
        taken = [
            (size(case["shape"]), case["times"].get(name, {}).get("seconds")) for case in cases
        ]
        found = [(n, seconds) for n, seconds in taken if seconds]
        points = [(n, seconds["median"]) for n, seconds in found]
        _line(axes, name, points, [(s["p20"], s["p80"]) for _, s in found])


def _by_size(result: dict[str, Any], series: str) -> list[dict[str, Any]]:
    size = SERIES_AXES[series][1]
    return sorted(measured(result, series), key=lambda case: size(case["shape"]))


def growth(result: dict[str, Any]) -> Figure | None:
    """Time and extra memory against the number of tokens."""
    label, size = SERIES_AXES["tokens"]
    cases = _by_size(result, "tokens")
    if len(cases) < 2:
        return None
    figure, (left, right) = _figure(9, 4.4, columns=2)
    sizes = [size(case["shape"]) for case in cases]
    _time_lines(left, cases, size)
    left.set_ylabel("seconds")
    _log_axes(left, sizes, label)
    _tidy(left, "Time, growing with the tokens")

    for name in ("matmul", "split", "authors", OURS):
        extra = [(size(c["shape"]), c.get("extra_bytes", {}).get(name)) for c in cases]
        # The memory of a small call is below the noise of the allocator.
        points = [(n, max(e / 2**20, 0.1)) for n, e in extra if isinstance(e, int)]
        _line(right, name, points)
        refused = [n for n, e in extra if isinstance(e, dict)]
        if refused and points:
            right.annotate(
                "does not fit",
                points[-1],
                xytext=(7, -11),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS[name],
            )
    right.set_ylabel("MiB beyond input and result (0.1 or more)")
    _log_axes(right, sizes, label)
    _tidy(right, "Extra memory")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def sweeps(result: dict[str, Any]) -> Figure | None:
    """Time against the batch and against the channels."""
    parts = {series: _by_size(result, series) for series in ("batch", "channels")}
    if not all(len(cases) > 1 for cases in parts.values()):
        return None
    figure, panels = _figure(9, 4.2, columns=2)
    for axes, (series, cases) in zip(panels, parts.items(), strict=True):
        label, size = SERIES_AXES[series]
        _time_lines(axes, cases, size)
        _log_axes(axes, [size(case["shape"]) for case in cases], label)
        _tidy(axes, f"Time, growing with the {series}")
    panels[0].set_ylabel("seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def end_to_end(models: Sequence[dict[str, Any]]) -> Figure | None:
    """Bars: the share that guidance adds to a step and to an image, with intervals."""
    if not models:
        return None
    figure, panels = _figure(9, 1.7 + 0.75 * len(models), columns=2)
    titles = {"step": "Added to a guided step", "run": "Added to a whole image"}
    for axes, (part, title) in zip(panels, titles.items(), strict=True):
        for number, method in enumerate((OURS, "authors")):
            for row, model in enumerate(models):
                share = model[part][method]["added_share"]
                middle = 100 * share["median"]
                low, high = 100 * share["low"], 100 * share["high"]
                place = row + (number - 0.5) * 0.38
                axes.barh(
                    place,
                    middle,
                    0.34,
                    color=COLOURS[method],
                    label={OURS: "ours", "authors": "authors' function"}[method]
                    if row == 0
                    else None,
                    xerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                    error_kw={"elinewidth": 0.9, "ecolor": "#333333"},
                )
                axes.annotate(
                    f"{middle:+.1f}%",
                    (max(high, 0), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.margins(x=0.16)
        axes.set_yticks(range(len(models)), [model["name"].replace(", ", "\n") for model in models])
        axes.tick_params(axis="y", labelsize=8.5, labelleft=part == "step")
        axes.invert_yaxis()
        axes.set_xlabel("% of the time without guidance")
        _tidy(axes, title)
        axes.grid(False, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure
