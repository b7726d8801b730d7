"""Preference pairs have one fault each, and whatever a trainer does in the block is a run that tells how it ended."""

import asyncio
import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest

from course_lib.experiments import preferences
from course_lib.text import docstrings, ladder, tasks

GOOD = tasks.Pair("json.dumps: def dumps(obj)", "Serialize an object to a string.", "json")
LOGS = {"loss": 0.69, "grad_norm": 0.5, "learning_rate": 1e-3, "rewards/margins": 0.1, "num_tokens": 100.0}


class Trainer:
    """What `recorded` needs of a trainer; `step` logs what a real one would."""

    def __init__(self, *, max_steps: int = 2, reward_funcs: list[Any] | None = None) -> None:
        self.args = SimpleNamespace(
            max_steps=max_steps, seed=1, logging_nan_inf_filter=True,
            to_dict=lambda: {"beta": 0.1, "hub_token": "<HUB_TOKEN>"},
        )  # fmt: skip
        self.model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"hidden_size": 128}))
        self.callbacks: list[Any] = []
        if reward_funcs is not None:
            self.reward_funcs = reward_funcs

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    remove_callback = property(lambda self: self.callbacks.remove)

    def pop_callback(self, kind: type) -> Any:
        found = next((each for each in self.callbacks if isinstance(each, kind)), None)
        if found is not None:
            self.callbacks.remove(found)
        return found

    def step(self, number: int, **logs: float) -> None:
        state = SimpleNamespace(global_step=number)
        for name in ("on_step_begin", "on_step_end"):
            for callback in self.callbacks:
                getattr(callback, name)(self.args, state, None)
        for callback in self.callbacks:
            callback.on_log(self.args, state, None, logs={**LOGS, "num_tokens": 100.0 * number, **logs})


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Runs of the test's own."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))


def test_each_fault_breaks_one_check_and_no_other():
    """The rejected text differs from the chosen one in a single thing that PEP 257 asks."""
    broken = {
        name: [check for check, holds in docstrings.checks(text).items() if not holds]
        for name, text in ladder.faults(GOOD.output).items()
    }
    assert broken == {
        "no period": ["ends in one period"],
        "small first letter": ["begins with a capital"],
        "third person": ['commands, as in "Return"'],
    }


def test_only_a_pair_without_a_fault_makes_a_preference():
    """A docstring with a fault of its own could not be the chosen one."""
    bad = tasks.Pair("json.loads: def loads(s)", "Deserializes a string to an object.", "json")
    rows = preferences.preferences([GOOD, bad, GOOD], seed=1)
    assert [row.chosen for row in rows] == [GOOD.output] * 2
    assert all(row.prompt.endswith(")\n") and not docstrings.passes(row.rejected) for row in rows)
    assert rows == preferences.preferences([GOOD, bad, GOOD], seed=1)
    with pytest.raises(ValueError, match="nothing can be preferred"):
        preferences.preferences([bad], seed=1)


def test_a_trainer_s_run_reads_like_any_other():
    """Rows, columns of the trainer's own, tokens of one step, configuration without fields for tokens, outcome."""
    trainer = Trainer()
    with preferences.recorded(trainer, name="dpo", show=None) as run:
        for step in (1, 2):
            trainer.step(step)
    assert run.outcome.status == "succeeded"
    assert run.metrics.loss.tolist() == [0.69, 0.69] and run.metrics.rewards_margins.tolist() == [0.1, 0.1]
    assert run.metrics.tokens.tolist() == [100, 100]
    assert run.config["trainer"] == {"beta": 0.1} and run.config["model"]["hidden_size"] == 128
    assert trainer.callbacks == []


@pytest.mark.parametrize(
    "name",
    [
        "trainer_callback.PrinterCallback",
        "trainer_callback.ProgressCallback",
        "utils.notebook.NotebookProgressCallback",
    ],
)
def test_a_trainer_prints_nothing_beside_the_live_view(name):
    """In a notebook transformers draws a bar and a table of its own, which would stay in the page; later they are back."""
    module, _, kind = name.rpartition(".")
    trainer = Trainer()
    trainer.add_callback(getattr(importlib.import_module(f"transformers.{module}"), kind)())
    theirs = list(trainer.callbacks)
    with preferences.recorded(trainer, name="dpo", show=None):
        assert len(trainer.callbacks) == 1 and trainer.callbacks != theirs
    assert trainer.callbacks == theirs


def test_a_small_model_trains_in_one_thread():
    """Threads that wait for each other cost processor time; afterwards there are as many as before, an error or not."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with preferences.recorded(Trainer(), name="dpo", show=None):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt), preferences.one_thread():
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_memory_of_a_large_tensor_is_used_again():
    """The system hands out no new pages where a larger tensor was freed before; else each step fills all with zeros."""
    import resource

    import torch

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    with preferences.one_thread():
        torch.ones(2**25)
        before = faults()
        for _ in range(5):
            torch.ones(2**24)  # 64 MiB, or 16,384 pages
        assert faults() - before < 1000


def test_the_block_refuses_a_run_without_an_end():
    """Without `max_steps` nobody could say how far a run is."""
    with (
        pytest.raises(ValueError, match="say when the run ends"),
        preferences.recorded(Trainer(max_steps=-1), name="x"),
    ):
        pass


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ({"loss": math.nan}, "the loss of step 1 is nan"),
        ({"grad_norm": math.inf}, "the gradient norm of step 1 is inf"),
    ],
)
def test_what_is_no_number_ends_the_run_by_name(logs, words):
    """transformers would leave a loss that is nan out of its log; the run fails, and says which number of which step."""
    trainer = Trainer()
    with (
        pytest.raises(preferences.NotANumber, match=words),
        preferences.recorded(trainer, name="sick", show=None) as run,
    ):
        assert trainer.args.logging_nan_inf_filter is False
        trainer.step(1, **logs)
    assert run.outcome.status == "failed" and words in run.outcome.cause


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_reward_that_is_no_number_is_refused(value):
    """TRL would train on the other answers of the group without a word."""

    def length(completions: list[str], **_: Any) -> list[float | None]:
        return [value if not text else float(len(text)) for text in completions]

    async def later(completions: list[str], **_: Any) -> list[float | None]:
        return length(completions)

    trainer = Trainer(reward_funcs=[length, later])
    with preferences.recorded(trainer, name="grpo", show=None):
        assert trainer.reward_funcs[0](completions=["ab"]) == [2.0]
        with pytest.raises(preferences.NotANumber, match="the reward 'length' gave .* for the answer ''"):
            trainer.reward_funcs[0](completions=["ab", ""])
        with pytest.raises(preferences.NotANumber, match="the reward 'later'"):
            asyncio.run(trainer.reward_funcs[1](completions=[""]))
    assert trainer.reward_funcs == [length, later]


def test_stopping_the_cell_is_told_as_such():
    """The stop button is no failure."""
    with pytest.raises(KeyboardInterrupt), preferences.recorded(Trainer(), name="dpo", show=None) as run:
        raise KeyboardInterrupt
    assert run.outcome.status == "interrupted"


def test_a_gym_server_is_asked_over_its_own_route():
    """The reward is what the server's `verify` says of each answer's text, and what it refuses is told."""
    from nemo_gym import base_resources_server as gym

    class Lengths(gym.SimpleResourcesServer):
        config: gym.BaseResourcesServerConfig

        async def verify(self, body: gym.BaseVerifyRequest) -> gym.BaseVerifyResponse:
            return gym.BaseVerifyResponse(**body.model_dump(), reward=len(body.response.output_text))

    reward = preferences.asked(Lengths(**preferences.alone("lengths")))
    assert reward(prompts=["f\n", "g\n"], completions=["ab", ""]) == [2.0, 0.0]
    assert reward.__name__ == "lengths"
    with pytest.raises(RuntimeError, match="/verify answered 422"):
        reward(prompts=["f\n"], completions=[None])
