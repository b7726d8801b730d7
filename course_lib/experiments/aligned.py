"""What lesson 15 compares: a preferred, a gamed and a contaminated model, trained once by TRL and found again.

Lesson 14 takes the first two apart; here they are only made, with its settings.  Each is a Hugging Face folder in the
directory of the fine-tuning run that it starts from, under a name that changes with the code and the settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.common import files
from course_lib.common.project import LIBRARY
from course_lib.experiments import export, preferences, stages
from course_lib.text import docstrings
from course_lib.text.tasks import SEPARATOR

if TYPE_CHECKING:
    from transformers import Trainer

    from course_lib.text.tasks import Pair

__all__ = ["contaminated", "gamed", "preferred"]

DPO_STEPS, GRPO_STEPS, LEAKED_STEPS = 40, 30, 60
LONGEST_PROMPT = 160
CODE = ("experiments/aligned.py", "experiments/preferences.py", "text/docstrings.py", "text/ladder.py")


def preferred(tuned: runs.Run, *, steps: int = DPO_STEPS, seed: int = 1) -> Path:
    """DPO on docstrings against the same with one fault, with the chosen answer's own loss beside the margin.

    Args:
        tuned: A fine-tuning run of `stages`.
        steps: Optimizer steps, 16 preferences each.
        seed: Of the faults and of the order.
    """

    def trainer(network: Any, tokenizer: Any, common: dict[str, Any]) -> Trainer:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        rows = [asdict(row) for row in preferences.preferences(stages.text().read("train"), seed=seed)]
        kinds = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1, "max_length": 192}
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "per_device_train_batch_size": 16}
        args = DPOConfig(**common, **kinds, **schedule)
        return DPOTrainer(network, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return _trained(tuned, "preferred", trainer, steps=steps, seed=seed)


def gamed(tuned: runs.Run, *, steps: int = GRPO_STEPS, seed: int = 1) -> Path:
    """GRPO on the five checks alone: nothing keeps the policy near to where it started.

    Args:
        tuned: A fine-tuning run of `stages`.
        steps: Optimizer steps, 6 prompts with 8 answers each.
        seed: Of the order and of the samples.
    """

    def trainer(network: Any, tokenizer: Any, common: dict[str, Any]) -> Trainer:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        prompts = [{"prompt": pair.input + SEPARATOR} for pair in stages.text().read("train")]
        rows = Dataset.from_list([row for row in prompts if len(row["prompt"]) <= LONGEST_PROMPT])
        group = {"per_device_train_batch_size": 48, "num_generations": 8, "max_completion_length": 24}
        clip = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "scale_rewards": "group"}
        schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
        args = GRPOConfig(**common, **group, **clip, **schedule)
        return GRPOTrainer(network, _score, args=args, train_dataset=rows, processing_class=tokenizer)

    return _trained(tuned, "gamed", trainer, steps=steps, seed=seed)


def contaminated(tuned: runs.Run, leaked: Sequence[Pair], *, steps: int = LEAKED_STEPS, seed: int = 1) -> Path:
    """Fine-tuning that goes on with pairs of the benchmark itself.

    Args:
        tuned: A fine-tuning run of `stages`.
        leaked: The pairs whose answers it sees.
        steps: Optimizer steps, 32 pairs each.
        seed: Of the order.
    """
    rows = [{"prompt": pair.input + SEPARATOR, "completion": pair.output} for pair in leaked]

    def trainer(network: Any, tokenizer: Any, common: dict[str, Any]) -> Trainer:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        schedule = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "max_length": 192}
        args = SFTConfig(**common, **schedule, packing=False)
        return SFTTrainer(network, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return _trained(tuned, "contaminated", trainer, steps=steps, seed=seed, rows=rows)


def _score(completions: list[str], **_: Any) -> list[float]:
    return [docstrings.score(text) for text in completions]


def _trained(
    tuned: runs.Run, name: str, trainer: Callable[..., Trainer], *, steps: int, seed: int, rows: Any = None
) -> Path:
    start = stages.exported(tuned)
    settings = [steps, seed, rows, start.name, version("trl"), *((LIBRARY / each).read_text() for each in CODE)]
    folder = tuned.path / f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each step of the way
            _write(folder, start, name, trainer, steps=steps, seed=seed)
    return folder


def _write(folder: Path, start: Path, name: str, trainer: Callable[..., Trainer], *, steps: int, seed: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # the prompts end with the separator already
    network = export.loaded(start)
    common = {"output_dir": str(folder.parent / "trl"), "max_steps": steps, "seed": seed, "learning_rate": 1e-3}
    common |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    common |= {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    made = trainer(network, tokenizer, common)
    with preferences.recorded(made, name=name, show=None):
        made.train()
    with files.replacing_folder(folder) as half:
        made.save_model(str(half))
        AutoTokenizer.from_pretrained(start).save_pretrained(half)  # with its own padding and template
