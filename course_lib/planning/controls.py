"""The planner: bars of planned memory against a GPU, and controls that redraw them.

Controls need a running kernel.  The book has none, so it gets frames that were drawn when the lesson was executed; a
link in the browser steps through them.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields, changed
from course_lib.common.units import MiB, gib
from course_lib.figures import plots
from course_lib.planning import ceiling, memory, usable
from course_lib.planning.layout import LayoutError
from course_lib.planning.layout.rules import padded_from_tokenizer

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.axes import Axes

    from course_lib.planning.usable import Usable

__all__ = ["bars", "bridge_code", "controls", "frames", "layer"]

_NOTHING = dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"))
_SELECTIVE = _NOTHING | {"recompute_granularity": "selective"}
RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "nothing": _NOTHING,
    "norms": _SELECTIVE | {"recompute_modules": ["layernorm"]},
    "feed-forward": _SELECTIVE | {"recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""What the control can choose to compute again in the backward pass, as fields of the model."""


def bars(
    plans: Mapping[str, memory.Plan], *, gpu: ceiling.Gpu, ax: Axes, title: str = "", room: Usable | None = None
) -> Axes:
    """Draw one horizontal bar a plan, cut into its components, against the memory of a GPU.

    A plan that does not fit has a red, hatched edge, and says so in words.

    Args:
        plans: Plans by their labels.
        gpu: The GPU.
        ax: The axis to draw on.
        title: What the picture shows.
        room: What a plan may use of it; the rest of what torch sees is a band beside the line.

    Returns:
        The axis, in GiB.
    """
    shades = dict(zip(memory.COMPONENTS, (*plots.COLOURS.values(), plots.INK), strict=True))
    hatches = dict(zip(memory.COMPONENTS, ("", "//", "..", "\\\\", "xx"), strict=True))
    labels, limit = list(plans), gib(room.usable_bytes if room else gpu.memory_bytes)
    left = [0.0] * len(labels)
    for part in memory.COMPONENTS:
        widths = [gib(plans[label].components[part]) for label in labels]
        face = {"color": shades[part], "edgecolor": "white", "linewidth": 0.5, "hatch": hatches[part]}
        ax.barh(labels, widths, left=left, label=part, height=0.6, **face)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    right = 1.25 * max([limit, *left])
    for row, total in enumerate(left):
        fits = total <= limit
        if not fits:
            ax.barh(row, total, height=0.72, fill=False, edgecolor="#E0403A", linewidth=2.5, hatch="/")
        note = f" {total:.1f}" + ("" if fits else " does not fit")
        crossing = fits and total + 0.07 * right > limit  # the note would stand across the line
        ax.text(
            limit if crossing else total, row, note, va="center", color="#787878" if fits else "#E0403A", fontsize=9
        )
    ax.axvline(limit, color="#787878", linewidth=1.5, dashes=[6, 3])
    if room:
        ax.axvspan(limit, gib(room.total_bytes), color=plots.INK, alpha=0.15, linewidth=0)
    ax.set_xlim(0, right)
    what = f"what a plan may use, {limit:.1f} GiB" if room else f"{gpu.name}, {limit:.1f} GiB"
    ax.set_xlabel(f"planned memory of the fullest rank (GiB); dashed line: {what}")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8, columnspacing=1.0, handlelength=1.4)
    ax.set_title(title, pad=24)
    totals = "; ".join(f"{label} {total:.1f}" for label, total in zip(labels, left, strict=True))
    has = "A plan may use" if room else "The GPU has"
    ax.set_label(f"Planned GiB of the fullest rank: {totals}. {has} {limit:.1f} GiB")
    return ax


def layer(kept: Mapping[str, Mapping[str, int]], *, ax: Axes, title: str = "") -> Axes:
    """Draw what one layer keeps for the backward pass, one group of bars a tensor, one bar a layout.

    Args:
        kept: For each layout its bytes by tensor, as `activations.one_layer` returns them.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis, in MiB.
    """
    layouts, tensors = list(kept), list(next(iter(kept.values())))
    height = 0.8 / len(layouts)
    for number, (label, colour, hatch) in enumerate(
        zip(layouts, plots.COLOURS.values(), ("", "//", ".."), strict=False)
    ):
        places = [row + (number - (len(layouts) - 1) / 2) * height for row in range(len(tensors))]
        sizes = [kept[label][tensor] / MiB for tensor in tensors]
        ax.barh(places, sizes, height=height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
    ax.set_yticks(range(len(tensors)), tensors)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("kept for the backward pass by one layer, of one sequence (MiB)")
    ax.legend(loc="lower right")
    ax.set_title(title)
    totals = "; ".join(f"{label} {sum(kept[label].values()) / MiB:.0f}" for label in layouts)
    ax.set_label(f"MiB that one layer keeps: {totals}. Largest: {max(kept[layouts[0]], key=kept[layouts[0]].get)}")
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
    if padded_from_tokenizer(Fields.of(cfg)):  # nothing else says how many ids the embedding has
        fields["tokenizer.vocab_size"] = cfg.tokenizer.vocab_size
    if cfg.mixed_precision is None:  # nothing else says which numbers the model holds
        fields |= {f"model.{name}": getattr(model, name) for name in ("bf16", "fp16", "params_dtype")}
    fields |= {"train.micro_batch_size": train.micro_batch_size, "train.global_batch_size": train.global_batch_size}
    names = ["recompute_granularity"]  # None as well: the recipe may recompute
    if model.recompute_granularity:
        names += ["recompute_method", "recompute_num_layers"]
    if model.recompute_granularity == "selective":
        names += ["recompute_modules"]
    fields |= {f"model.{name}": getattr(model, name) for name in names}
    first = ["import torch"] if cfg.mixed_precision is None else []
    return "\n".join([*first, f"cfg = {recipe}()", *(f"cfg.{name} = {value!r}" for name, value in fields.items())])


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
        "recompute": widgets.Dropdown(options=list(RECOMPUTE), description="recompute"),
        "gpu": widgets.Dropdown(options=list(ceiling.gpus()), value="H100 SXM 80GB", description="GPU"),
    }
    picture, code = widgets.Image(width=760), widgets.HTML()

    def redraw(_: object = None) -> None:
        choice = {name: control.value for name, control in given.items()}
        try:
            cfg = chosen(recipes[choice["recipe"]], choice)
            picture.value, _ = _frame(memory.plan(cfg, ranks=ranks), cfg, ceiling.gpus()[choice["gpu"]])
            code.value = _lines(bridge_code(choice["recipe"], cfg))
        except LayoutError as error:
            picture.value, code.value = b"", _reasons([str(refusal) for refusal in error.refusals])
        except ValueError as error:
            picture.value, code.value = b"", _reasons([str(error)])

    for control in given.values():
        control.observe(redraw, names="value")
    redraw()
    rows = list(given.values())
    return widgets.VBox([widgets.HBox(rows[:5]), widgets.HBox(rows[5:]), picture, code])


def frames(choices: Mapping[str, tuple[str, Any]], plans: Mapping[str, memory.Plan], *, gpu: ceiling.Gpu) -> VBox:
    """Plans that a reader steps through without a kernel: one picture and its Bridge code at a time.

    Args:
        choices: For each label the name of a recipe function and the planned configuration.
        plans: The plans by the same labels.
        gpu: The GPU.

    Returns:
        A widget whose buttons are linked to the frames in the browser.
    """
    import ipywidgets as widgets

    shown = []
    for label, (recipe, cfg) in choices.items():
        png, words = _frame(plans[label], cfg, gpu)
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        picture = f'<img src="{source}" alt="{html.escape(words)}" style="width: 760px">'
        shown.append(widgets.HTML(picture + _lines(bridge_code(recipe, cfg))))
    buttons = widgets.ToggleButtons(options=list(choices), style={"button_width": "auto"})
    stack = widgets.Stack(children=shown, selected_index=0)
    widgets.jslink((buttons, "index"), (stack, "selected_index"))
    return widgets.VBox([buttons, stack])


def chosen(cfg: Any, choice: Mapping[str, Any]) -> Any:
    """A configuration with the values of the planner's controls; the one given stays as it is."""
    values = {
        "model.tensor_model_parallel_size": choice["tp"],
        "model.pipeline_model_parallel_size": choice["pp"],
        "model.context_parallel_size": choice["cp"],
        "model.expert_model_parallel_size": 1,
        "model.seq_length": choice["sequence"],
        "model.sequence_parallel": choice["tp"] > 1,
        "dataset.seq_length": choice["sequence"],
        "train.micro_batch_size": choice["micro"],
        "train.global_batch_size": choice["batch"],
        "mixed_precision": choice["precision"],
    } | {f"model.{name}": value for name, value in RECOMPUTE[choice["recompute"]].items()}
    if choice["precision"] == "fp32":
        import torch

        values |= {
            "mixed_precision": None,
            "model.bf16": False,
            "model.fp16": False,
            "model.params_dtype": torch.float32,
        }
    return changed(cfg, values)


def _frame(plan: memory.Plan, cfg: Any, gpu: ceiling.Gpu) -> tuple[bytes, str]:
    """One bar as PNG against what a plan may use where that is known, and what it shows in words."""
    from matplotlib.figure import Figure

    room = usable.of(cfg, ranks=plan.layout.world_size) if gpu.name == usable.GPU else None
    with plots.style():
        fig = Figure(figsize=(8, 2.2), layout="constrained")
        ax = bars({str(plan.layout): plan}, gpu=gpu, ax=fig.subplots(), title="Planned, not run", room=room)
        return plots.png(fig), ax.get_label()


def _lines(code: str) -> str:
    return f"<pre>{html.escape(code)}</pre>"


def _reasons(reasons: list[str]) -> str:
    items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f"<p>This combination cannot be planned:</p><ul>{items}</ul>"
