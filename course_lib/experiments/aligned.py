"""What lessons 14 and 15 compare beside the fine-tuned model: their settings as data, and each trained once and found again.

Lesson 14 trains its policies with `settings` in the open, and `kept` keeps them; `policy` finds them, and makes the same ones
for whoever comes without lesson 14.  Each is a Hugging Face folder in the directory of the fine-tuning run that it starts
from, under a name that changes with the code and the settings.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.common import files
from course_lib.common.project import LIBRARY
from course_lib.common.screen import Line
from course_lib.common.units import duration
from course_lib.experiments import export, preferences, stages
from course_lib.recipes import blueprint
from course_lib.text import docstrings
from course_lib.text.tasks import SEPARATOR

if TYPE_CHECKING:
    from transformers import Trainer

    from course_lib.text.tasks import Pair

__all__ = ["ON_A_CPU", "POLICIES", "contaminated", "kept", "policy", "questions", "settings"]

ON_A_CPU = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "report_to": "none", "logging_steps": 1,
}  # fmt: skip
"""What each trainer of TRL is told here: it switches bf16 and gradient checkpointing on unless somebody says no."""
DPO = {
    "max_steps": 40, "per_device_train_batch_size": 16, "max_length": 192,
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 4, "beta": 0.1,
}  # fmt: skip
GRPO = {
    "max_steps": 30, "per_device_train_batch_size": 48, "num_generations": 8, "max_completion_length": 24,
    "learning_rate": 1e-3, "warmup_steps": 5,
}  # fmt: skip
OF_NANO3 = ("beta", "epsilon", "epsilon_high", "loss_type", "scale_rewards", "lr_scheduler_type")
"""What GRPO takes from nano3's stage 2; its rate, sizes and lengths are for a model of 30 billion parameters."""
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "margin alone": ("DPO", {"loss_type": ["sigmoid"]}),
    "preferred": ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "higher beta": ("DPO", {"loss_type": ["sigmoid"], "beta": 0.5}),
    "gamed": ("GRPO", {}),
    "with reference": ("GRPO", {"beta": 0.3}),
}
"""Name to algorithm, and what the policy changes of its settings."""
NO_MATTER = {"output_dir", "disable_tqdm", "logging_nan_inf_filter"}
"""Arguments that decide where a trainer writes and what it shows, and nothing of what it trains."""
LONGEST_PROMPT = 160
LEAKED_STEPS = 60
CODE = ("experiments/aligned.py", "experiments/preferences.py", "text/docstrings.py", "text/ladder.py")


def settings(name: str) -> dict[str, Any]:
    """The arguments of a policy's `DPOConfig` or `GRPOConfig`, without `output_dir` and `seed`.

    Raises:
        KeyError: If no policy has the name; it lists those of `POLICIES`.

    >>> settings("with reference")["beta"], settings("gamed")["beta"]
    (0.3, 0.0)
    """
    if name not in POLICIES:
        raise KeyError(f"no policy is called {name!r}: there are {', '.join(POLICIES)}")
    algorithm, changed = POLICIES[name]
    if algorithm == "DPO":
        return ON_A_CPU | DPO | changed
    known = {key: value for row in blueprint.in_trl().trl for key, value in row.items()}
    return ON_A_CPU | GRPO | {key: known[key] for key in OF_NANO3} | changed


def questions() -> list[dict[str, str]]:
    """The prompts of GRPO: signatures of the training pairs that are not too long, each with its separator."""
    prompts = [{"prompt": pair.input + SEPARATOR} for pair in stages.text().read("train")]
    return [row for row in prompts if len(row["prompt"]) <= LONGEST_PROMPT]


def policy(tuned: runs.Run, name: str, *, seed: int = 1) -> Path:
    """The folder of a policy: found, or trained now from a fine-tuned model.

    Args:
        tuned: A fine-tuning run of `stages`.
        name: One of `POLICIES`.
        seed: Of the faults, of the order and of the samples.

    Raises:
        KeyError: As `settings`.
    """
    given = settings(name)

    def trainer(network: Any, tokenizer: Any, common: dict[str, Any]) -> Trainer:
        from datasets import Dataset

        kind, arguments = _kinds(name)
        mine = {"args": arguments(**common, **given), "train_dataset": Dataset.from_list(_rows(name, seed))}
        judge = (_score,) if POLICIES[name][0] == "GRPO" else ()
        return kind(network, *judge, processing_class=tokenizer, **mine)

    return _trained(tuned, name, trainer, seed=seed, made_of=given)


@contextlib.contextmanager
def kept(trainer: Trainer, tuned: runs.Run, name: str, *, seed: int = 1) -> Iterator[None]:
    """What this trainer trains in the block is found by `policy`, if it is what `policy` would train; a line says so.

    Compared are the trainer and all its arguments, the rows, the weights at the start, and each reward of a judge.

    Args:
        trainer: TRL's, before it trains.
        tuned: As for `policy`, like `name` and `seed`.
    """
    start, folder = stages.exported(tuned), _folder(tuned, name, seed=seed, made_of=settings(name))
    other = _differences(trainer, start, name, seed)
    judges = getattr(trainer, "reward_funcs", None)
    if judges is not None:
        trainer.reward_funcs = [_watched(judge, other) for judge in judges]
    try:
        yield
    finally:
        if judges is not None:
            trainer.reward_funcs = judges
    # Last: new arguments take the device's state from the trainer that was made before them.
    mine, theirs = trainer.args.to_dict(), _kinds(name)[1]("unused", seed=seed, **settings(name)).to_dict()
    other |= {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} - NO_MATTER
    if trainer.state.global_step < trainer.args.max_steps:
        other.add("end")
    if not other and not folder.is_dir():
        _save(trainer, start, folder)
    where = f"not kept, for it has another {', another '.join(sorted(other))}" if other else f"kept in {folder.name}"
    Line().close(f"{name}: {where}")


def contaminated(tuned: runs.Run, leaked: Sequence[Pair], *, steps: int = LEAKED_STEPS, seed: int = 1) -> Path:
    """Fine-tuning that goes on with pairs of the benchmark itself.

    Args:
        tuned: A fine-tuning run of `stages`.
        leaked: The pairs whose answers it sees.
        steps: Optimizer steps, 16 pairs each.
        seed: Of the order.
    """
    rows = [{"prompt": pair.input + SEPARATOR, "completion": pair.output} for pair in leaked]
    given = ON_A_CPU | {"max_steps": steps, "per_device_train_batch_size": 16, "max_length": 192, "packing": False}
    given |= {"learning_rate": 2e-3, "lr_scheduler_type": "constant"}

    def trainer(network: Any, tokenizer: Any, common: dict[str, Any]) -> Trainer:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**common, **given)
        return SFTTrainer(network, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return _trained(tuned, "contaminated", trainer, seed=seed, made_of=[given, rows])


def _kinds(name: str) -> tuple[type, type]:
    """The trainer of a policy, and the class of its arguments."""
    import trl

    return getattr(trl, f"{POLICIES[name][0]}Trainer"), getattr(trl, f"{POLICIES[name][0]}Config")


def _rows(name: str, seed: int) -> list[dict[str, str]]:
    """What a policy is trained on."""
    if POLICIES[name][0] == "GRPO":
        return questions()
    return [asdict(row) for row in preferences.preferences(stages.text().read("train"), seed=seed)]


def _score(completions: list[str], **_: Any) -> list[float]:
    return [docstrings.score(text) for text in completions]


def _differences(trainer: Any, start: Path, name: str, seed: int) -> set[str]:
    """What this trainer has, beside its arguments, that `policy` would give it otherwise."""
    found = set() if type(trainer) is _kinds(name)[0] else {"trainer"}
    if len(getattr(trainer, "reward_funcs", [_score])) != 1:
        found.add("judge")
    rows, end = _rows(name, seed), trainer.processing_class.eos_token
    wanted = {
        column: [row[column] + (end if column in ("chosen", "rejected") else "") for row in rows] for column in rows[0]
    }
    if any(list(trainer.train_dataset[column]) != texts for column, texts in wanted.items()):
        found.add("text")
    at_start = export.loaded(start).state_dict()
    for network in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        weights = network.state_dict()
        if weights.keys() != at_start.keys() or not all(weights[each].equal(at_start[each]) for each in weights):
            found.add("start")
    return found


def _watched(judge: Any, other: set[str]) -> Any:
    """The reward function, which notes in `other` that it gave another reward than the five checks."""
    if not inspect.isfunction(judge) or inspect.iscoroutinefunction(judge):
        other.add("judge")
        return judge

    @functools.wraps(judge)
    def watched(*args: Any, completions: list[str], **given: Any) -> list[float]:
        found = judge(*args, completions=completions, **given)
        if list(found) != _score(completions):
            other.add("judge")
        return found

    return watched


def _folder(tuned: runs.Run, name: str, *, seed: int, made_of: Any) -> Path:
    start, name = stages.exported(tuned), name.replace(" ", "-")
    content = [seed, made_of, start.name, version("trl"), *((LIBRARY / each).read_text() for each in CODE)]
    return tuned.path / f"{name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}"


def _trained(tuned: runs.Run, name: str, trainer: Callable[..., Trainer], *, seed: int, made_of: Any) -> Path:
    folder = _folder(tuned, name, seed=seed, made_of=made_of)
    if not folder.is_dir():
        preferences.quiet()
        line, begun = Line(), time.monotonic()
        line.say(f"{name}: preparing its data", now=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each step of the way
            _write(folder, stages.exported(tuned), name.replace(" ", "-"), trainer, seed=seed, line=line)
        line.close(f"{name}: trained in {duration(time.monotonic() - begun)}; kept for next time")
    return folder


def _write(folder: Path, start: Path, name: str, trainer: Callable[..., Trainer], *, seed: int, line: Line) -> None:
    from transformers import AutoTokenizer, TrainerCallback

    class Told(TrainerCallback):
        """Says which step a waiting learner is at."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            line.say(f"{name}: step {state.global_step + 1} of {state.max_steps}")

    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # the prompts end with the separator already
    network = export.loaded(start)
    common = {"output_dir": str(folder.parent / "trl"), "seed": seed, "disable_tqdm": True}
    made = trainer(network, tokenizer, common)
    made.add_callback(Told())
    with preferences.recorded(made, name=name, show=None):
        made.train()
    _save(made, start, folder)


def _save(trainer: Trainer, start: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with files.replacing_folder(folder) as half:
        trainer.model.save_pretrained(half)
        AutoTokenizer.from_pretrained(start).save_pretrained(half)  # with its own padding and template
