"""The planner: controls that draw planned memory against a GPU again when one of them moves.

Controls need a running kernel.  The book has none, so it gets frames that were drawn when the lesson was executed; a
link in the browser steps through them.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields, changed
from course_lib.figures import parallelism, plots
from course_lib.planning import ceiling, memory, usable
from course_lib.planning.layout import LayoutError
from course_lib.planning.layout.rules import padded_from_tokenizer

if TYPE_CHECKING:
    from ipywidgets import VBox

__all__ = ["bridge_code", "frames", "panel"]

_NOTHING = dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"))
_SELECTIVE = _NOTHING | {"recompute_granularity": "selective"}
RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "nothing": _NOTHING,
    "norms": _SELECTIVE | {"recompute_modules": ["layernorm"]},
    "feed-forward": _SELECTIVE | {"recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""What the control can choose to compute again in the backward pass, as fields of the model."""


def bridge_code(recipe: str, cfg: Any) -> str:
    """The lines that give Bridge this plan, after the recipe was loaded.

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


def panel(recipes: Mapping[str, Any], *, ranks: int = 8) -> VBox:
    """Controls for model, layout, sequence, batch, precision, recomputation and GPU, with the bar that follows."""
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
        ax = parallelism.plans(
            {str(plan.layout): plan}, gpu=gpu, ax=fig.subplots(), title="Planned, not run", room=room
        )
        return plots.png(fig), ax.get_label()


def _lines(code: str) -> str:
    return f"<pre>{html.escape(code)}</pre>"


def _reasons(reasons: list[str]) -> str:
    items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f"<p>This combination cannot be planned:</p><ul>{items}</ul>"
