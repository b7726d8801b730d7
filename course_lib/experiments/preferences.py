"""Preferences for TRL: pairs with one planted fault, and a trainer's run written down like any other.

The trainers themselves are TRL's, made and started in the lesson, in one plain process.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.common import heap
from course_lib.runs import writer
from course_lib.text import ladder
from course_lib.text.tasks import SEPARATOR

if TYPE_CHECKING:
    from nemo_gym.base_resources_server import SimpleResourcesServer
    from transformers import Trainer, TrainerCallback

    from course_lib.text.tasks import Pair

__all__ = [
    "NotANumber",
    "Preference",
    "alone",
    "asked",
    "one_thread",
    "preferences",
    "quiet",
    "recorded",
    "request",
]


class NotANumber(ValueError):
    """A loss, a gradient norm or a reward is no finite number."""


@dataclass(frozen=True)
class Preference:
    """One row of preference data, under the names that TRL reads.

    Attributes:
        prompt: The signature and the separator.
        chosen: The docstring of the library.
        rejected: The same text with one fault.
        fault: Which one, a key of `ladder.faults()`.
    """

    prompt: str
    chosen: str
    rejected: str
    fault: str


def preferences(pairs: Iterable[Pair], *, seed: int, separator: str = SEPARATOR) -> list[Preference]:
    """A preference for each pair whose docstring has no fault: the docstring, before the same text with one.

    Args:
        pairs: Pairs of one split.
        seed: Draws the fault of each pair.
        separator: End of the prompt.

    Raises:
        ValueError: If no pair has a docstring without a fault.
    """
    dice = random.Random(seed)
    found = []
    for pair in pairs:
        if ladder.short(pair) and ladder.well_formed(pair.output):
            fault, rejected = dice.choice(list(ladder.faults(pair.output).items()))
            found.append(Preference(pair.input + separator, pair.output, rejected, fault))
    if not found:
        raise ValueError(
            "no pair has a docstring that passes docstrings.passes() and is short: nothing can be preferred"
        )
    return found


def alone(name: str) -> dict[str, Any]:
    """What a NeMo Gym server is made with if it runs in this process, without the head server that finds the others.

    Args:
        name: Of the server, as a configuration of `config_paths` gives it.
    """
    from nemo_gym.base_resources_server import BaseResourcesServerConfig
    from nemo_gym.config_types import BaseServerConfig
    from nemo_gym.server_utils import ServerClient
    from omegaconf import DictConfig

    here = {"host": "127.0.0.1", "port": 8080}  # nothing listens there
    client = ServerClient(head_server_config=BaseServerConfig(**here), global_config_dict=DictConfig({}))
    return {"config": BaseResourcesServerConfig(**here, entrypoint="", name=name), "server_client": client}


def request(prompt: str, answer: str) -> dict[str, Any]:
    """What NeMo Gym posts to `/verify`: the prompt, and the answer as a response of OpenAI's Responses API.

    Source: nemo_gym base_resources_server.py, BaseVerifyRequest @ 0.4.0; the other fields are those that it requires.
    """
    content = [{"type": "output_text", "text": answer, "annotations": []}]
    message = {"id": "answer", "type": "message", "role": "assistant", "status": "completed", "content": content}
    response = {"id": "rollout", "created_at": 0.0, "model": "policy", "object": "response", "output": [message]}
    response |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    return {"responses_create_params": {"input": [{"role": "user", "content": prompt}]}, "response": response}


def asked(server: SimpleResourcesServer) -> Callable[..., list[float]]:
    """A reward function for TRL that posts each answer to `/verify` of a NeMo Gym resources server, in this process.

    Raises:
        RuntimeError: In the function, if the server refuses a request; it has the server's words.
    """
    from fastapi.testclient import TestClient

    service = server.setup_webserver()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of each of thousands of requests

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        with TestClient(service) as client:  # one event loop for all of them, and not one for each
            return [_verified(client, prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]

    reward.__name__ = server.config.name  # TRL logs it under this name
    return reward


def _verified(client: Any, prompt: str, answer: str) -> float:
    reply = client.post("/verify", json=request(prompt, answer))
    if reply.status_code != 200:
        raise RuntimeError(f"/verify answered {reply.status_code} to {answer!r}: {reply.text[:300]}")
    return reply.json()["reward"]


def quiet() -> None:
    """No progress bars of datasets and transformers in this process: the live view of a run is the one to look at."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread: in a model this small, threads wait for each other longer than they work.

    It also keeps the memory of the tensors that it frees, from then on.
    """
    import torch

    heap.keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def recorded(trainer: Trainer, *, name: str, show: str | None = "live") -> Iterator[runs.Run]:
    """Whatever this trainer trains in the block is a run: its directory, live view, and last word however the block ends.

    It trains in one thread, as `one_thread` says why.

    Args:
        trainer: TRL's or transformers', with `max_steps` set; it writes a row each `logging_steps`.
        name: Name of the run's directory.
        show: `"live"` for a view of loss, memory and throughput while it trains, `None` for silence.

    Yields:
        The run; read it after the block.

    Raises:
        ValueError: If nothing says when the run ends.
        NotANumber: In the block, as soon as a loss, a gradient norm or a reward is no finite number.
    """
    from course_lib.figures import live

    args = trainer.args
    if args.max_steps <= 0:
        raise ValueError(f"{type(args).__name__}(max_steps={args.max_steps}): say when the run ends, with max_steps")
    # Otherwise the loss of a step that is no number is left out of the log, as if there had been none.
    # Source: transformers trainer.py, logging_nan_inf_filter @ 5.12.1
    args.logging_nan_inf_filter = False
    given = getattr(trainer, "reward_funcs", None)
    if given is not None:
        trainer.reward_funcs = [_finite(each) for each in given]
    config = {"model": trainer.model.config.to_dict(), "trainer": _as_data(args.to_dict())}
    about = {"trainer": type(trainer).__name__, "seed": args.seed, "loss_unit": "nats"}
    view = live.view(args.max_steps, name=name) if show else None
    recording = writer.recording(name, config=config, train_iters=args.max_steps, view=view, **about)
    with one_thread(), recording as mine:
        callback = _callback(mine)
        printing = [trainer.pop_callback(kind) for kind in _printing()]
        trainer.add_callback(callback)
        try:
            yield runs.Run(mine.path)
        finally:
            for each in (callback, *filter(None, printing)):
                (trainer.remove_callback if each is callback else trainer.add_callback)(each)
            if given is not None:
                trainer.reward_funcs = given


def _as_data(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without the fields for access tokens, which hold a placeholder."""
    return {name: value for name, value in arguments.items() if not name.endswith("_token")}


def _callback(mine: writer.Writer) -> TrainerCallback:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Hands what the trainer logs to the run's writer."""

        tokens = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mine.begin(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mine.begin_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mine.end_step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return  # an evaluation, or the summary at the end
            for key in ("loss", "grad_norm", "reward"):
                _require_finite(
                    logs.get(key), f"the {key.replace('grad_norm', 'gradient norm')} of step {state.global_step}"
                )
            total = int(logs.get("num_tokens") or 0)
            others = {
                key.replace("/", "_"): value
                for key, value in logs.items()
                if isinstance(value, int | float) and key not in (*_COMMON, "num_tokens")
            }
            common = {key: logs.get(key) for key in _COMMON}
            mine.metrics(state.global_step, **common, tokens=(total - self.tokens) or None, **others)
            self.tokens = total

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
            others = {
                key.removeprefix("eval_").replace("/", "_"): value
                for key, value in metrics.items()
                if isinstance(value, int | float) and key != "eval_loss"
            }
            mine.validation(state.global_step, loss=metrics.get("eval_loss"), **others)

    return Recorder()


_COMMON = ("loss", "grad_norm", "learning_rate")


def _require_finite(value: float | None, what: str) -> None:
    if value is not None and not math.isfinite(value):
        raise NotANumber(
            f"{what} is {value}: no weight is to be trusted from there on. Start again from the last good folder with a "
            "lower learning_rate; if the first step has it, look at the data: an answer without a token, or a beta that "
            "is no number"
        )


def _finite(reward: Callable[..., Any]) -> Callable[..., Any]:
    """The reward function, which refuses a reward that is no number: TRL would leave that answer out without a word."""
    import inspect

    def judged(found: Any, completions: list[Any]) -> list[float]:
        for value, completion in zip(found, completions, strict=False):
            if value is None or not math.isfinite(value):
                raise NotANumber(
                    f"the reward {getattr(reward, '__name__', 'model')!r} gave {value} for the answer {completion!r}: TRL "
                    "would train on the others of its group as if this one were not there. Return a number for every "
                    "answer, an empty one included"
                )
        return found

    if inspect.iscoroutinefunction(reward):

        @functools.wraps(reward)
        async def checked(*args: Any, completions: list[Any], **kwargs: Any) -> list[float]:
            return judged(await reward(*args, completions=completions, **kwargs), completions)

    elif inspect.isfunction(reward) or inspect.ismethod(reward):

        @functools.wraps(reward)
        def checked(*args: Any, completions: list[Any], **kwargs: Any) -> list[float]:
            return judged(reward(*args, completions=completions, **kwargs), completions)

    else:
        return reward  # a reward model: TRL calls it with tokens
    return checked


def _printing() -> tuple[type, ...]:
    """The callbacks that print each row, in a notebook as a table below a bar: the live view takes their place."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback

    return PrinterCallback, ProgressCallback, NotebookProgressCallback
