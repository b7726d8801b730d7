"""A checkpoint of Megatron-Bridge as a Hugging Face folder, for every program that reads one, made without the Hub.

One CPU rank lets Bridge's `AutoBridge` do the work: `model` writes all weights, `adapter` a LoRA adapter in PEFT's format,
`to_megatron` goes the other way.  What was written is read again by transformers in this process, and is kept only if its
logits are those that Bridge's own model gave in the rank: a field that the exporter does not carry over ends as an error.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from course_lib import launch, recipes, stack
from course_lib.common import files
from course_lib.common.config import Fields
from course_lib.runs import Run, checkpoints
from course_lib.stack import devices
from course_lib.stack.patches import Patches, applied, apply

if TYPE_CHECKING:
    import torch

__all__ = [
    "TOLERANCE",
    "Exported",
    "NotExported",
    "adapter",
    "adapter_rank",
    "loaded",
    "model",
    "model_rank",
    "to_megatron",
]

TOLERANCE = 1e-4
"""How far the logits of both programs may be apart, relative to the largest of them; rounding in fp32 takes about 1e-6."""

LIMIT_SECONDS = 600.0
POSITIONS = 64
"""How many tokens the logits are compared on, at most."""


class NotExported(ValueError):
    """A checkpoint that cannot be written as a Hugging Face folder, or whose folder would be another model."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: `config.json`, `model.safetensors` and the tokenizer's files; of an adapter, PEFT's two files.
        parameters: Of the model as transformers loads it; a tied output layer is in the file twice and counts once.
        largest_difference: Between the logits of Bridge's model in its rank and those of the folder.
        largest_logit: To compare it with.
    """

    folder: Path
    parameters: int
    largest_difference: float
    largest_logit: float


def model(place: Run | Path, folder: Path, *, step: int | None = None, like: str | Path | None = None) -> Exported:
    """Write the weights of a checkpoint, whatever layout saved it, its configuration and its tokenizer.

    The sizes come from the checkpoint, everything that Megatron does not know (names, kind of position code) from the
    model of which the recipe made it.  Rows that pad the vocabulary stay: training counted them in every softmax.

    Args:
        place: A run, a directory of checkpoints, or one checkpoint's directory.
        folder: Where to; what stands there is replaced when the new folder is whole.
        step: Which save; the one that the trackers name by default, where Bridge's exporter takes the largest.
        like: A model id that `recipes.known_models()` has, or a folder with a `config.json`; by default what the recipe
            was made of.

    Raises:
        NotExported: If the checkpoint holds an adapter alone, no reference configuration is known, or transformers
            computes other logits from the folder; nothing is written then.
        NoCheckpoint: As `checkpoints.require`, like `WrongCheckpoint`.
    """
    checkpoint = checkpoints.require(place, step=step)
    content = checkpoints.run_config(checkpoint)
    if content.get("peft"):
        raise NotExported(
            f"{checkpoint.path} holds a LoRA adapter and not the weights beneath it: export.adapter() writes the adapter, "
            "given the exported base model"
        )
    known = checkpoints.tensors(checkpoint)
    if (name := "embedding.word_embeddings.weight") not in known.index:
        raise NotExported(f"{checkpoint.path} has no tensor {name!r}: is it a language model's checkpoint?")
    embedding = known.loc[name]
    rows, dtype = embedding["shape"][0], embedding["dtype"]
    with tempfile.TemporaryDirectory() as temporary, files.replacing_folder(Path(folder)) as half:
        reference = _reference(checkpoint, content, like, dtype, Path(temporary) / "reference")
        ids = _ids(Fields.of(content), rows)
        request = {"checkpoint": str(checkpoint.path), "reference": str(reference), "folder": str(half), "rows": rows}
        request |= {"ids": ids, "logits": str(Path(temporary) / "logits.pt")}
        launch.call(
            "course_lib.experiments.export:model_rank", request, ranks=1, device="cpu", limit_seconds=LIMIT_SECONDS
        )
        found = _compared(half, loaded(half), ids, Path(request["logits"]))
    return Exported(Path(folder), *found)


def model_rank(request: dict) -> None:
    """What the one rank does."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with applied(_in_one_cpu_rank(request["rows"])), temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_auto_config(request["checkpoint"], request["reference"])
        _take_over(bridge, Path(request["reference"]))
        built = bridge.load_megatron_model(request["checkpoint"], wrap_with_ddp=False)
        bridge.save_hf_pretrained(built, request["folder"], show_progress=False)
        torch.save(_logits(built[0], request["ids"]), request["logits"])


def adapter(place: Run | Path, folder: Path, *, base: Path, step: int | None = None) -> Exported:
    """Write the LoRA adapter of a fine-tuning run for `peft.PeftModel.from_pretrained`.

    Args:
        place: A run with `cfg.peft`, or a checkpoint of one.
        folder: Where to, as in `model`.
        base: What `model` wrote of the checkpoint that the adapter was trained on.
        step: As in `model`.

    Raises:
        NotExported: If the checkpoint has no adapter, or one that was trained on another base; or as in `model`.
        NoCheckpoint: As in `model`.
    """
    checkpoint = checkpoints.require(place, step=step)
    content = checkpoints.run_config(checkpoint)
    if not content.get("peft"):
        raise NotExported(f"{checkpoint.path} has no adapter: it was saved without cfg.peft; export.model() writes it")
    if not (Path(base) / "model.safetensors").exists():
        raise NotExported(f"{base} holds no model.safetensors: export.model() writes the base model there first")
    rows = _refuse_another_base(Fields.of(content), Path(base))
    ids = _ids(Fields.of(content), rows)
    with tempfile.TemporaryDirectory() as temporary, files.replacing_folder(Path(folder)) as half:
        request = {"checkpoint": str(checkpoint.path), "base": str(base), "folder": str(half), "ids": ids}
        request |= {"rows": rows, "logits": str(Path(temporary) / "logits.pt")}
        launch.call(
            "course_lib.experiments.export:adapter_rank", request, ranks=1, device="cpu", limit_seconds=LIMIT_SECONDS
        )
        from peft import PeftModel

        settings = json.loads((half / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(Path(base).absolute())
        files.write_text(half / "adapter_config.json", json.dumps(settings, indent=2))
        found = _compared(half, PeftModel.from_pretrained(loaded(base), half), ids, Path(request["logits"]))
    return Exported(Path(folder), *found)


def adapter_rank(request: dict) -> None:
    """What the one rank does: Bridge reads the base from its folder, and the adapter from the checkpoint."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with applied(_in_one_cpu_rank(request["rows"])), temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_hf_pretrained(request["base"])
        saved, save = [], bridge.save_hf_adapter
        bridge.save_hf_adapter = lambda chunks, **options: (saved.extend(chunks), save(chunks, **options))
        bridge.export_adapter_ckpt(request["checkpoint"], request["folder"], show_progress=False)
        torch.save(_logits(saved[0], request["ids"]), request["logits"])


def to_megatron(folder: Path, directory: Path) -> checkpoints.Checkpoint:
    """Write a Hugging Face folder as a checkpoint of weights, which `cfg.checkpoint.pretrained_checkpoint` can name.

    Args:
        folder: As `model` wrote it.
        directory: Where to; the save is called step 0.
    """
    request = {"folder": str(folder), "directory": str(directory)}
    launch.call(
        "course_lib.experiments.export:to_megatron_rank", request, ranks=1, device="cpu", limit_seconds=LIMIT_SECONDS
    )
    return checkpoints.at(directory, 0)


def to_megatron_rank(request: dict) -> None:
    """What the one rank does."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with applied(_in_one_cpu_rank(None)), temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_hf_pretrained(request["folder"])
        provider = bridge.to_megatron_provider()
        provider.finalize()
        built = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(built, request["directory"])


def _in_one_cpu_rank(rows: int | None) -> Patches:
    """What a model's provider becomes when one CPU rank builds it, wherever the checkpoint was trained.

    Args:
        rows: Of the embedding, those that pad it included; one rank alone would pad to others.
    """
    mine = Patches()
    why = "a CPU rank has no Transformer Engine, and one rank pads the vocabulary to fewer rows than many"

    def fitted(provider: Any) -> Any:
        devices.apply(SimpleNamespace(model=provider))
        if rows is not None:
            provider.vocab_size, provider.should_pad_vocab = rows, False
        return provider

    @mine.replaces("megatron.bridge.training.model_load_save.load_model_config", why=why)
    def load_model_config(original: Any, checkpoint_path: str) -> Any:
        """The saved model with the fields of a CPU rank, and the rows of its embedding."""
        provider, arguments = original(checkpoint_path)
        return fitted(provider), arguments

    @mine.replaces("megatron.bridge.AutoBridge.to_megatron_provider", why=why)
    def to_megatron_provider(original: Any, *args: Any, **options: Any) -> Any:
        """The same of a provider that is made from a Hugging Face folder."""
        return fitted(original(*args, **options))

    @mine.replaces(
        "megatron.bridge.models.conversion.param_mapping.is_modelopt_dynamic_module",
        why="its question imports all of ModelOpt, and TRL, torchao and an experiment tracker with it: five processor seconds",
    )
    def is_modelopt_dynamic_module(original: Any, module: Any) -> bool:
        """No module is one of ModelOpt's as long as nobody imported the class."""
        return "modelopt.torch.opt.dynamic" in sys.modules and original(module)

    return mine


def _take_over(bridge: Any, reference: Path) -> None:
    """What Bridge's configuration gets from the reference, because Bridge has another thing under that name.

    Bridge writes the length of the training sequences as `max_position_embeddings`; a position code that is scaled from
    8,192 on is then one that transformers warns of at each load.  The length goes into the tokenizer instead.
    """
    from transformers import AutoConfig

    bridge.hf_pretrained.max_position_embeddings = AutoConfig.from_pretrained(reference).max_position_embeddings
    if not (reference / "tokenizer_config.json").exists():
        bridge.hf_model_id = None  # or the exporter asks the Hub for one


def _reference(
    checkpoint: checkpoints.Checkpoint, content: dict, like: str | Path | None, dtype: str, folder: Path
) -> Path:
    """A folder with `config.json` and tokenizer, which stands for the model's repository on the Hub."""
    from transformers import AutoConfig

    fields, known = Fields.of(content), recipes.known_models()
    name = str(like or fields.model("hf_model_id") or "")
    if (Path(name) / "config.json").is_file():
        facts = json.loads((Path(name) / "config.json").read_text())
    elif name in known:
        facts = dict(known[name].config)
    else:
        what = f"names {name!r} as the model it is made like" if name else "does not say which model it is made like"
        raise NotExported(
            f"{checkpoint.path} {what}, and no reference configuration is on this machine: give like=, a folder with a "
            f"config.json or one of {', '.join(list(known)[:3])} and {len(known) - 3} more of recipes.known_models()"
        )
    tokenizer = _tokenizer(checkpoint, fields)
    facts |= {"dtype": dtype, "rope_theta": fields.model("rotary_base"), "bos_token_id": None, "pad_token_id": None}
    facts |= {"eos_token_id": tokenizer.eos_token_id if tokenizer else None}
    if pattern := fields.model("hybrid_layer_pattern"):
        # transformers 5 keeps the reference's list of layers, whatever pattern Bridge writes, and bounds the step sizes of
        # its fallback from below, which Core does not
        facts |= {"hybrid_override_pattern": pattern.replace("|", ""), "time_step_min": 0.0}
    AutoConfig.for_model(facts.pop("model_type"), **facts).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(checkpoint: checkpoints.Checkpoint, fields: Fields) -> Any:
    """The checkpoint's tokenizer, with what its data put between prompt and answer; `None` without one.

    A fine-tuning's checkpoint carries none, so it is the folder that its configuration names.
    Source: megatron-bridge training/checkpointing.py @ 0.6.2 takes the tokenizer from `cfg.dataset`, which has it in pretraining.
    """
    from transformers import AutoTokenizer

    places = (checkpoint.path / "tokenizer", Path(fields.get("tokenizer", "tokenizer_model") or checkpoint.path))
    place = next((place for place in places if (place / "tokenizer_config.json").exists()), None)
    if place is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.model_max_length = fields.model("seq_length")
    said = fields.get("dataset", "preprocessing") or {}
    if "separator" in said and not tokenizer.chat_template:
        before, _, after = said.get("prompt_template", "{prompt}").partition("{prompt}")
        parts = [json.dumps(before), "message.content", json.dumps(after + said["separator"])]
        answer = "message.content ~ eos_token" if said.get("add_eos", True) else "message.content"
        tokenizer.chat_template = (
            "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{{- "
            f"{answer}"
            " -}}{%- else -%}{{- "
            f"{' ~ '.join(parts)}"
            " -}}{%- endif -%}{%- endfor -%}"
        )
    return tokenizer


def _refuse_another_base(fields: Fields, base: Path) -> int:
    """Compare the exported base with the checkpoint that an adapter was trained on; returns the rows of its embedding."""
    import torch
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as content:
        mine = content.get_tensor("model.embed_tokens.weight")
    trained_on = Path(fields.get("checkpoint", "pretrained_checkpoint") or "")
    try:
        theirs = checkpoints.read(checkpoints.require(trained_on), "embedding.word_embeddings.weight")
    except checkpoints.NoCheckpoint:
        return len(mine)  # moved since; Bridge takes the base from its folder alone
    if mine.shape != theirs.shape or not torch.equal(mine.float(), theirs.float()):
        raise NotExported(
            f"the adapter was trained on {trained_on}, and {base} holds another model: their embeddings differ. "
            "Give export.model() that checkpoint first"
        )
    return len(mine)


def _ids(fields: Fields, rows: int) -> list[int]:
    """Token ids to compare logits on: any, and the same ones each time."""
    import random

    return random.Random(0).choices(range(rows), k=min(POSITIONS, fields.model("seq_length")))


def _logits(built: Any, ids: list[int]) -> torch.Tensor:
    """Those of Bridge's model, for one sequence."""
    import torch

    with torch.no_grad():
        return built.eval()(torch.tensor([ids]), torch.arange(len(ids))[None], None)


def loaded(folder: Path) -> Any:
    """The model of a Hugging Face folder in fp32 on the CPU, read without a progress bar.

    From then on Nemotron-H's Mamba layers are computed by the scan of the CPU ranks in this process, so that transformers'
    warning of its own scan, for want of kernels, is not true of them.
    """
    _scan_for_transformers()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with stack.quietly("transformers.models.nemotron_h.modeling_nemotron_h", below=logging.ERROR):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            bars.enable_progress_bar()


@functools.cache
def _scan_for_transformers() -> None:
    """Put the course's scan where transformers wants mamba-ssm's kernel; its own fallback is wrong past one chunk.

    Source: transformers `models/nemotron_h/modeling_nemotron_h.py` @ 5.12.1, huggingface/transformers#47246.
    """
    stack.prepare_imports()  # a patch of a module that is not imported yet waits in what this prepares
    mine, place = Patches(), "transformers.models.nemotron_h.modeling_nemotron_h"

    @mine.replaces(f"{place}.NemotronHMamba2Mixer.forward", why="mamba-ssm needs CUDA", late=place)
    def forward(original, self, hidden_states, cache_params=None, attention_mask=None, **options):  # fmt: skip
        """A whole sequence by the course's scan, and single tokens after it by transformers' own recurrence."""
        if hidden_states.is_cuda or (cache_params is not None and cache_params.has_previous_state(self.layer_idx)):
            return original(self, hidden_states, cache_params, attention_mask, **options)
        module = sys.modules[place]
        module.mamba_chunk_scan_combined = _contiguous_scan  # each new layer sets it to None
        self.use_mem_eff_path = False
        return self.cuda_kernels_forward(hidden_states, cache_params, attention_mask)

    apply(mine)


def _contiguous_scan(*args: Any, dt_limit: Any, **options: Any) -> Any:
    """As mamba-ssm's, without bounds of the step sizes, and in memory of the order that its caller expects."""
    from course_lib.stack import state_space

    if tuple(dt_limit) != (0.0, float("inf")):
        raise NotImplementedError(f"time_step_limit={dt_limit}: the course's scan has no bounds of the step sizes")
    y, state = state_space.mamba_chunk_scan_combined(*args, **options)
    return y.contiguous(), state


def _compared(folder: Path, theirs: Any, ids: list[int], logits: Path) -> tuple[int, float, float]:
    """Parameters, largest difference of logits and largest logit.

    Raises:
        NotExported: If the folder's logits are not those of Bridge's model.
    """
    import torch

    with torch.no_grad():
        other = theirs(torch.tensor([ids])).logits
    mine = torch.load(logits, weights_only=True)
    largest = float(mine.abs().max())
    difference = float((mine - other).abs().max()) if mine.shape == other.shape else float("inf")
    if not difference <= TOLERANCE * largest:
        raise NotExported(
            f"transformers computes other logits from the exported folder than Bridge from the checkpoint: they differ by "
            f"{difference:.2g}, and the largest is {largest:.2g}. A setting of cfg.model has no place in a "
            f"{type(theirs.config).__name__}; nothing was written"
        )
    return sum(weight.numel() for weight in theirs.parameters()), difference, largest
