"""Figures: they say what they show, in both themes, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from course_lib.figures import compare, plots


def run_of(steps: int = 5, *, ranks: int = 4, memory_bytes: int = 300 * 2**20) -> SimpleNamespace:
    """A finished run, as far as a figure looks at it."""
    metrics = [
        {
            "step": step,
            "loss": 7.0 - 0.5 * step,
            "tokens_per_second": 1000.0 if step == 1 else 4000.0,
            "elapsed_ms": 100.0,
        }
        for step in range(1, steps + 1)
    ]
    memory = [
        {"rank": rank, "step": step, "memory_bytes": memory_bytes + rank, "peak_memory_bytes": 2 * memory_bytes}
        for step in range(1, steps + 1)
        for rank in range(ranks)
    ]
    validation = [{"step": steps, "loss": 5.0}] if steps else []
    return SimpleNamespace(
        metrics=pd.DataFrame(metrics, columns=["step", "loss", "tokens_per_second", "elapsed_ms"]),
        memory=pd.DataFrame(memory, columns=["rank", "step", "memory_bytes", "peak_memory_bytes"]),
        validation=pd.DataFrame(validation, columns=["step", "loss"]),
    )


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast by WCAG 2.2."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#111111", "#121212"])
def test_one_picture_serves_light_and_dark(background: str) -> None:
    """Text keeps a contrast of 4:1, and every curve 3:1, on a light and on a dark page."""
    assert contrast(plots.INK, background) >= 4
    assert {
        name: contrast(colour, background) for name, colour in plots.COLOURS.items() if contrast(colour, background) < 3
    } == {}


def test_the_background_is_transparent() -> None:
    """A figure has no background of its own: its corners let the page show through."""
    from io import BytesIO

    from PIL import Image

    with plots.figure("A finding") as ax:
        plots.loss(run_of(), ax=ax)
        fig = ax.figure
    with plots.style():
        picture = Image.open(BytesIO(plots.png(fig)))
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0))[3] == 0 and picture.getpixel((picture.width - 1, picture.height - 1))[3] == 0


def test_style_leaves_no_trace() -> None:
    """The look holds inside its block only, also when the block raises; pyplot is never loaded."""
    code = (
        "import matplotlib as mpl\n"
        "def values(): return {key: mpl.rcParams[key] for key in mpl.rcParams if key != 'backend'}\n"  # it loads pyplot
        "before = values()\n"
        "from course_lib.figures import plots\n"
        "try:\n"
        "    with plots.figure('x') as ax:\n"
        "        assert mpl.rcParams['text.color'] == plots.INK\n"
        "        1 / 0\n"
        "except ZeroDivisionError: pass\n"
        "import sys; assert values() == before; assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("draw", [plots.loss, plots.memory, plots.throughput])
def test_axes_have_units_and_come_back(draw) -> None:
    """A drawing function returns the axis it was given, with both axes named and a unit on the vertical one."""
    with plots.figure() as ax:
        assert draw(run_of(), ax=ax) is ax
    assert ax.get_xlabel() in ("step", "rank")
    assert any(unit in ax.get_ylabel() for unit in ("nats per token", "MiB", "tokens/s"))
    assert draw(run_of()).get_xlabel() == ax.get_xlabel()


@pytest.mark.parametrize("draw", [plots.loss, plots.memory, plots.throughput])
def test_a_run_without_data_draws(draw) -> None:
    """A run that has just started draws an empty axis that says so, and no error."""
    assert draw(run_of(0)).get_label().startswith("No data yet")


def test_memory_is_drawn_for_each_rank_in_its_unit() -> None:
    """Bars show the last reading of each rank, ticks the peak, in MiB below one GiB and in GiB above."""
    small, large = plots.memory(run_of(ranks=3)), plots.memory(run_of(ranks=3, memory_bytes=2**30))
    assert [round(bar.get_height()) for bar in small.patches] == [300, 300, 300]
    assert [round(value) for value in small.lines[0].get_ydata()] == [600, 600, 600]
    assert "MiB" in small.get_ylabel() and "GiB" in large.get_ylabel()
    assert [round(bar.get_height()) for bar in large.patches] == [1, 1, 1]


def test_throughput_leaves_the_first_step_out_of_the_median() -> None:
    """The first step pays for the start, so the median is that of the others."""
    assert "4,000 tokens per second" in plots.throughput(run_of()).get_label()


def test_the_description_holds_title_data_and_baselines() -> None:
    """Alternative text says the finding and the numbers that the eye would read."""
    with plots.figure("The loss falls below a guess") as ax:
        plots.loss(run_of(), ax=ax, baseline={"ln(1024)": 6.93})
    words = plots.describe(ax.figure)
    assert words.startswith("The loss falls below a guess. ")
    assert "6.5 at step 1 to 4.5 nats per token at step 5" in words
    assert "Held-out loss ends at 5 nats per token" in words
    assert "ln(1024) at 6.93" in words


def test_import_is_light() -> None:
    """Importing the module loads neither matplotlib nor pandas nor IPython."""
    heavy = {"matplotlib", "pandas", "IPython"}
    code = f"import sys, course_lib.figures.plots, course_lib.figures.live; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_bar_counts_every_part_once() -> None:
    """A part that is itself called "other", and more parts than there are looks, still add up to the whole."""
    bars = {"m": {"attention": 50, "other": 25, **{f"part {i}": 2.5 for i in range(10)}}}
    ax = plots.stacked(bars, unit="parameters")
    assert "m has 100 parameters" in ax.get_label()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(names) == len(set(names)) == 9 and names[-1] == "other"
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in ax.get_legend().legend_handles]
    hues = [colour for colour, _ in looks if len(set(colour[:3])) > 1]
    assert len(set(looks)) == 9 and len(set(hues)) == len(hues) == len(plots.COLOURS), (
        "two parts of one hue look related"
    )


def test_estimates_and_groups_say_their_numbers():
    """A reader who cannot see bars and whiskers gets each value, and the interval of an estimate."""
    rate = SimpleNamespace(value=0.4, low=0.35, high=0.45)
    with plots.style():
        from matplotlib.figure import Figure

        left, right = Figure().subplots(1, 2)
        compare.intervals({"base": rate}, ax=left, unit="share", title="Passes")
        compare.grouped({"full": {"prose": 0.1, "code": 0.5}}, ax=right, unit="bits/byte", title="Rise")
    assert plots.describe(left) == "Passes. base 0.4, 0.35 to 0.45."
    assert plots.describe(right) == "Rise. full: prose 0.1, code 0.5."
    heights = sorted(round(bar.get_height(), 2) for bar in right.patches)
    assert heights == [0.1, 0.5] and len({bar.get_hatch() for bar in right.patches}) == 2


def test_a_restart_is_drawn_over_the_run_without_a_break():
    """Killed and restarted losses keep their steps, the steps done twice are shaded, and the words say what is computed."""
    steps = pd.DataFrame({"step": range(1, 11), "loss": [6.0 - 0.1 * n for n in range(10)], "grad_norm": 1.0})
    whole, killed, again = (SimpleNamespace(metrics=part) for part in (steps, steps[:6], steps[3:]))
    with plots.style():
        from matplotlib.figure import Figure

        ax, other = Figure().subplots(1, 2)
        compare.restarted(whole, killed, again, ax=ax, title="Restarted")
        compare.restarted(whole, killed, SimpleNamespace(metrics=steps[3:].assign(loss=9.0)), ax=other)
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert lines["killed"] == [1, 2, 3, 4, 5, 6] and lines["restarted"] == [4, 5, 6, 7, 8, 9, 10]
    (twice,) = ax.patches
    assert (twice.get_x(), twice.get_x() + twice.get_width()) == (3.5, 6.5)
    words = (
        "Killed after step 6, restarted with step 4; losses and gradient norms differ from the uninterrupted run's by"
    )
    assert plots.describe(ax) == f"Restarted. {words} 0% at most."
    assert f"{words} 76% at most" in plots.describe(other)


def test_a_mean_lies_over_long_curves_alone() -> None:
    """Fifty steps that jump by one show the course in between, faintly themselves; ten are drawn as they are."""
    with plots.style():
        ax = Figure().subplots()
    short, long = run_of(10), run_of(50)
    long.metrics["loss"] = [7.0, 8.0] * 25
    compare.curves({"short": short, "long": long}, "loss", ax=ax, unit="nats/token", averaged=20)
    of_short, steps, mean = ax.get_lines()
    assert (of_short.get_alpha(), steps.get_alpha(), mean.get_alpha()) == (None, plots.FAINT["alpha"], None)
    assert mean.get_color() == steps.get_color() != of_short.get_color()
    assert len(mean.get_xdata()) == 31 and mean.get_ydata() == pytest.approx(7.5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["short", "long"]
    assert "long goes from 7.5 to 7.5, as the mean of 20 steps" in plots.describe(ax)
