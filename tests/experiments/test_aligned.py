"""The policies of lessons 14 and 15: settings that TRL takes, one training each, and another folder for other settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import runs
from course_lib.experiments import aligned, export, preferences, stages
from course_lib.recipes import blueprint
from course_lib.text import docstrings, tasks, tokenizers

PAIRS = [
    tasks.Pair(f"module.get_{name}: def get_{name}(self)", f"Return the {name} of the file.", "module")
    for name in ("name", "size", "path", "owner", "group", "mode", "time", "kind")
]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A run whose exported model has 30,000 parameters and never saw a text; its text is eight pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "hugging-face"
    texts = [f"{pair.input}\n{pair.output}" for pair in PAIRS] * 20
    tokenizers.train_bpe(texts, folder, vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    monkeypatch.setattr(stages, "exported", lambda run: folder)
    monkeypatch.setattr(stages, "text", lambda: SimpleNamespace(read=lambda split: PAIRS))
    for algorithm in (aligned.DPO, aligned.GRPO):
        monkeypatch.setitem(algorithm, "max_steps", 2)  # the first one is at a rate of 0
    monkeypatch.setitem(aligned.GRPO, "per_device_train_batch_size", 8)
    path = tmp_path / "runs" / "tuned"
    path.mkdir(parents=True)
    return runs.Run(path)


@pytest.fixture
def said(monkeypatch):
    """What the lines of `aligned` say."""
    words: list[str] = []
    line = SimpleNamespace(say=lambda text, now=False: words.append(text), close=words.append)
    monkeypatch.setattr(aligned, "Line", lambda: line)
    return words


def weights(folder: Path) -> bytes:
    """All weights of a folder."""
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", aligned.POLICIES)
def test_trl_takes_what_a_policy_is_told(name):
    """Every argument exists and keeps its value, so none is ignored or clipped."""
    from trl import DPOConfig, GRPOConfig

    kind = {"DPO": DPOConfig, "GRPO": GRPOConfig}[aligned.POLICIES[name][0]]
    settings = aligned.settings(name)
    made = kind(output_dir="unused", **settings)
    changed = {key: getattr(made, key) for key in settings if getattr(made, key) != settings[key]}
    assert changed == {"report_to": []}  # how TRL keeps "none"


def test_a_policy_differs_from_its_neighbours_by_what_it_names():
    """The margin alone and the preferred one have one batch, rate and beta, and GRPO has nano3's values."""
    alone, preferred = aligned.settings("margin alone"), aligned.settings("preferred")
    unlike = {key for key in alone.keys() | preferred.keys() if alone.get(key) != preferred.get(key)}
    assert unlike == {"loss_type", "loss_weights"}
    known = {key: value for row in blueprint.in_trl().trl for key, value in row.items()}
    gamed = aligned.settings("gamed")
    assert {key: gamed[key] for key in aligned.OF_NANO3} == {key: known[key] for key in aligned.OF_NANO3}
    assert (gamed["beta"], aligned.settings("with reference")["beta"]) == (0.0, 0.3)
    with pytest.raises(KeyError, match="no policy is called 'better': there are margin alone"):
        aligned.settings("better")


def test_long_prompts_are_left_out(monkeypatch):
    """A prompt and its separator have 160 characters at most."""
    pairs = [tasks.Pair("x" * length, "Return it.", "m") for length in (159, 160)]
    monkeypatch.setattr(stages, "text", lambda: SimpleNamespace(read=lambda split: pairs))
    assert [len(row["prompt"]) for row in aligned.questions()] == [160]


def test_a_policy_is_trained_once(tuned, monkeypatch, said):
    """It differs from its start, is found again, and another seed, beta or algorithm is another folder."""
    start = weights(stages.exported(tuned))
    folder = aligned.policy(tuned, "preferred")
    assert said[:3] == ["preferred: preparing its data", "preferred: step 1 of 2", "preferred: step 2 of 2"]
    assert len(said) == 4 and said[3].startswith("preferred: trained in ")
    assert folder.parent == tuned.path and folder.name.startswith("preferred-") and weights(folder) != start
    assert (folder / "tokenizer.json").is_file()
    trained = [run.launch["trainer"] for run in runs.listing() if run.name != "tuned"]
    assert trained == ["DPOTrainer"]

    monkeypatch.setattr(aligned, "_write", lambda *_, **__: pytest.fail("trained again"))
    assert aligned.policy(tuned, "preferred") == folder
    monkeypatch.undo()


def test_another_setting_is_another_folder(tuned, monkeypatch):
    """Seed, beta and algorithm are in the name."""
    monkeypatch.setattr(aligned, "_write", lambda folder, *_, **__: made.append(folder.name))
    made: list[str] = []
    aligned.policy(tuned, "preferred")
    aligned.policy(tuned, "preferred", seed=2)
    monkeypatch.setitem(aligned.DPO, "beta", 0.2)
    aligned.policy(tuned, "preferred")
    aligned.policy(tuned, "gamed")
    assert len(set(made)) == 4 and made[3].startswith("gamed-")


def test_a_policy_that_is_judged_is_trained_on_its_own_answers(tuned):
    """GRPO samples, asks the five checks and moves the weights, or leaves them where all answers got one reward."""
    folder = aligned.policy(tuned, "gamed")
    run = next(run for run in runs.listing() if run.name.startswith("gamed"))
    assert run.launch["trainer"] == "GRPOTrainer" and run.outcome.status == "succeeded"
    assert 0 <= run.metrics.reward.iloc[0] <= 1 and (folder / "model.safetensors").is_file()


def in_the_open(tuned, name, *, judge=None, start=None, rows=None, **changed):
    """What lesson 14 does: make a trainer, and train it in the block that keeps what it made."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    kind, arguments = aligned._kinds(name)
    tokenizer = AutoTokenizer.from_pretrained(stages.exported(tuned), padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    args = arguments(str(tuned.path / "trl"), **{"seed": 1} | aligned.settings(name) | changed)
    given = {"args": args, "train_dataset": Dataset.from_list(rows or aligned._rows(name, 1))}
    judges = (judge or judged,) if "GRPO" in kind.__name__ else ()
    network = export.loaded(start or stages.exported(tuned))
    trainer = kind(network, *judges, processing_class=tokenizer, **given)
    with preferences.recorded(trainer, name="open", show=None), aligned.kept(trainer, tuned, name):
        trainer.train()
    return trainer


def judged(completions, **_):
    """The judge of lesson 14, without its server."""
    return [docstrings.score(text) for text in completions]


def kinder(completions, **_):
    """A judge that likes an answer more than the five checks do."""
    return [docstrings.score(text) / 2 + 0.5 for text in completions]


@pytest.mark.parametrize("name", ["preferred", "gamed", "with reference"])
def test_what_a_lesson_trained_is_the_policy(tuned, tmp_path, monkeypatch, said, name):
    """It is found, nothing is trained again, and every weight is that of the policy that is made without the lesson."""
    in_the_open(tuned, name)
    assert said[-1].startswith(f"{name}: kept in ")
    with monkeypatch.context() as found:
        found.setattr(aligned, "_write", lambda *_, **__: pytest.fail("trained again"))
        folder = aligned.policy(tuned, name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    alone = aligned.policy(runs.Run(elsewhere), name)
    assert weights(alone) == weights(folder) != weights(stages.exported(tuned))
    assert {file.name for file in alone.iterdir()} == {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("preferred", {"learning_rate": 1e-4}, "learning_rate"),
        ("preferred", {"seed": 2}, "seed"),
        ("preferred", {"weight_decay": 0.1}, "weight_decay"),
        ("preferred", {"rows": [{"prompt": "f\n", "chosen": "Return it.", "rejected": "returns it"}]}, "text"),
        ("preferred", {"start": "policy"}, "start"),
        ("gamed", {"judge": kinder}, "judge"),
        ("gamed", {"max_steps": 1}, "max_steps"),
    ],
)
def test_what_a_learner_changed_is_not_kept(tuned, said, name, changed, words):
    """Lesson 15 never measures a policy of other settings, another seed, text, start or judge under this name."""
    if "start" in changed:
        changed = {"start": aligned.policy(tuned, "margin alone")}
    in_the_open(tuned, name, **changed)
    assert said[-1].startswith(f"{name}: not kept, for it has another ") and f"another {words}" in said[-1]
    assert not list(tuned.path.glob(f"{name}-*"))


def test_a_training_that_stops_is_not_kept(tuned, monkeypatch):
    """Whether it raises or ends early."""
    from transformers import TrainerCallback
    from trl import DPOTrainer

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    real = DPOTrainer.train
    monkeypatch.setattr(DPOTrainer, "train", lambda self: self.add_callback(Stops()) or real(self))
    in_the_open(tuned, "preferred")
    monkeypatch.setattr(DPOTrainer, "train", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_the_open(tuned, "preferred")
    assert not list(tuned.path.glob("preferred-*"))


def test_a_contaminated_model_saw_the_leak(tuned):
    """The leaked pairs become likelier, and other pairs make another folder."""
    from course_lib.reading import evaluation

    folder = aligned.contaminated(tuned, PAIRS[:4], steps=3)
    before, after = (evaluation.load(each) for each in (stages.exported(tuned), folder))
    losses = [evaluation.answer_loss(model, PAIRS[:4]).value for model in (before, after)]
    assert losses[1] < losses[0]
    assert aligned.contaminated(tuned, PAIRS[:4], steps=3) == folder


def test_chosen_nats_are_those_of_the_answer_and_its_end(tuned, bridge, tmp_path):
    """By hand, a token each: the separator, of which another row of logits decides, does not count."""
    import torch
    from transformers import AutoTokenizer

    from book.builder import alignment

    start, folder = stages.exported(tuned), tmp_path / "policy"
    network, tokenizer = export.loaded(start), AutoTokenizer.from_pretrained(start)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = preferences.preferences(PAIRS[:5], seed=1)
    by_hand = 0.0
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row.prompt, row.chosen + tokenizer.eos_token))
        for model, sign in ((network, 1), (export.loaded(start), -1)):
            with torch.no_grad():
                said = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            by_hand += sign * sum(float(said[len(prompt) + i - 1, one]) for i, one in enumerate(answer))
    assert abs(by_hand) > 1
    assert alignment.chosen_nats(start, folder, rows) == pytest.approx(by_hand / len(rows), rel=1e-4)


def test_a_run_that_dies_leaves_no_folder(tuned, monkeypatch):
    """Half a policy is never found."""
    from trl import DPOTrainer

    def dies(*_, **__):
        raise RuntimeError("out of patience")

    monkeypatch.setattr(DPOTrainer, "train", dies)
    with pytest.raises(RuntimeError, match="out of patience"):
        aligned.policy(tuned, "preferred")
    assert not list(tuned.path.glob("preferred-*"))
