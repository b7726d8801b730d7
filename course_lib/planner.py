"""The planner: bars of planned memory against a GPU, and controls that redraw them.

Without a running kernel the page shows the frame that was drawn when the lesson was executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib import compute, memory
from course_lib.layout import LayoutError
from course_lib.units import gib

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.axes import Axes

__all__ = ["bars", "bridge_code", "controls"]


def bars(plans: Mapping[str, memory.Plan], *, gpu: compute.Gpu, ax: Axes, title: str = "") -> Axes:
    """Draw one horizontal bar a plan, cut into its components, against the memory of a GPU.

    A plan that does not fit has a red, hatched edge, and says so in words.

    Args:
        plans: Plans by their labels.
        gpu: The GPU.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis, in GiB.
    """
    shades = {
        "weights": "#0072B2",
        "gradients": "#D55E00",
        "optimizer": "#009E73",
        "activations": "#CC79A7",
        "loss": "#787878",
    }
    hatches = dict(zip(memory.COMPONENTS, ("", "//", "..", "\\\\", "xx"), strict=True))
    labels, limit = list(plans), gib(gpu.memory_bytes)
    left = [0.0] * len(labels)
    for part in memory.COMPONENTS:
        widths = [gib(plans[label].components[part]) for label in labels]
        face = {"color": shades[part], "edgecolor": "white", "linewidth": 0.5, "hatch": hatches[part]}
        ax.barh(labels, widths, left=left, label=part, height=0.6, **face)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        fits = total <= limit
        if not fits:
            ax.barh(row, total, height=0.72, fill=False, edgecolor="#C00000", linewidth=2.5, hatch="/")
        note = f" {total:.1f}" + ("" if fits else " does not fit")
        ax.text(total, row, note, va="center", color="#787878" if fits else "#C00000", fontsize=9)
    ax.axvline(limit, color="#787878", linewidth=1.5, dashes=[6, 3])
    ax.set_xlim(0, 1.25 * max([limit, *left]))
    ax.set_xlabel(f"planned memory of the fullest rank (GiB); dashed line: {gpu.name}, {limit:.1f} GiB")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8, columnspacing=1.0, handlelength=1.4)
    ax.set_title(title, pad=24)
    totals = "; ".join(f"{label} {total:.1f}" for label, total in zip(labels, left, strict=True))
    ax.set_label(f"Planned GiB of the fullest rank: {totals}. The GPU has {limit:.1f} GiB")
    return ax


def bridge_code(recipe: str, cfg: Any) -> str:
    """The lines that give Bridge this plan, after the recipe was loaded.

    Args:
        recipe: Name of the recipe function.
        cfg: The planned configuration.

    Example::

        cfg = llama3_8b_pretrain_config()
        cfg.model.tensor_model_parallel_size = 2
    """
    model, train = cfg.model, cfg.train
    names = ["tensor_model", "pipeline_model", "context"]
    fields = {f"model.{name}_parallel_size": getattr(model, f"{name}_parallel_size") for name in names}
    fields |= {"model.sequence_parallel": model.sequence_parallel, "model.seq_length": model.seq_length}
    fields |= {"dataset.seq_length": model.seq_length, "mixed_precision": cfg.mixed_precision}
    fields |= {"train.micro_batch_size": train.micro_batch_size, "train.global_batch_size": train.global_batch_size}
    for name in ("recompute_granularity", "recompute_method", "recompute_num_layers"):
        fields |= {f"model.{name}": getattr(model, name)} if getattr(model, name) is not None else {}
    return "\n".join([f"cfg = {recipe}()", *(f"cfg.{name} = {value!r}" for name, value in fields.items())])


def controls(recipes: Mapping[str, Any], *, ranks: int = 8) -> VBox:
    """Controls for model, layout, sequence, batch, precision, recomputation and GPU, with the bar that follows.

    Args:
        recipes: Configurations by the name of their recipe function.
        ranks: World size.

    Returns:
        The widget; it shows its first frame at once.
    """
    import ipywidgets as widgets

    sizes = [1, 2, 4, 8]
    sequence = [2048, 4096, 8192, 16384]
    given = {
        "recipe": widgets.Dropdown(options=list(recipes), description="model"),
        "tp": widgets.Dropdown(options=sizes, value=2, description="TP"),
        "pp": widgets.Dropdown(options=sizes, description="PP"),
        "cp": widgets.Dropdown(options=sizes, description="CP"),
        "sequence": widgets.Dropdown(options=sequence, value=8192, description="tokens"),
        "micro": widgets.BoundedIntText(value=1, min=1, max=64, description="micro"),
        "batch": widgets.BoundedIntText(value=128, min=1, max=8192, description="global"),
        "precision": widgets.Dropdown(options=["bf16_mixed", "fp32"], description="precision"),
        "recompute": widgets.Dropdown(options=["nothing", "full"], description="recompute"),
        "gpu": widgets.Dropdown(options=list(compute.gpus()), value="H100 SXM 80GB", description="GPU"),
    }
    picture, code = widgets.Image(width=760), widgets.HTML()

    def redraw(_: object = None) -> None:
        choice = {name: control.value for name, control in given.items()}
        try:
            cfg = chosen(recipes[choice["recipe"]], choice)
            picture.value = _frame(cfg, compute.gpus()[choice["gpu"]], ranks=ranks)
            code.value = f"<pre>{bridge_code(choice['recipe'], cfg)}</pre>"
        except (LayoutError, ValueError) as error:
            picture.value, code.value = b"", f"<pre>{error}</pre>"

    for control in given.values():
        control.observe(redraw, names="value")
    redraw()
    rows = list(given.values())
    return widgets.VBox([widgets.HBox(rows[:5]), widgets.HBox(rows[5:]), picture, code])


def chosen(cfg: Any, choice: Mapping[str, Any]) -> Any:
    """A configuration with the values of the planner's controls; the one given stays as it is."""
    import copy

    full = choice["recompute"] == "full"
    mine = memory.with_layout(
        cfg,
        tp=choice["tp"],
        pp=choice["pp"],
        cp=choice["cp"],
        seq_length=choice["sequence"],
        sequence_parallel=choice["tp"] > 1,
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )
    mine.dataset = copy.copy(cfg.dataset)
    mine.dataset.seq_length = choice["sequence"]
    mine.train.micro_batch_size, mine.train.global_batch_size = choice["micro"], choice["batch"]
    if choice["precision"] == "fp32":
        import torch

        mine.mixed_precision = None
        mine.model.bf16 = mine.model.fp16 = False
        mine.model.params_dtype = torch.float32
    else:
        mine.mixed_precision = choice["precision"]
    return mine


def _frame(cfg: Any, gpu: compute.Gpu, *, ranks: int) -> bytes:
    from matplotlib.figure import Figure

    from course_lib import plots

    made = memory.plan(cfg, ranks=ranks)
    with plots.style():
        fig = Figure(figsize=(8, 2.2), layout="constrained")
        bars({str(made.layout): made}, gpu=gpu, ax=fig.subplots(), title="Planned, not run")
        return plots.png(fig)
