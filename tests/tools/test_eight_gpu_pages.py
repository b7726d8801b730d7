"""The pages about eight GPUs: their lines prepare the runs that they promise, and their numbers agree with each other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from book.builder import plan
from course_lib import launch, recipes
from course_lib.common.project import DATA, PROJECT
from course_lib.common.units import GB, gib
from course_lib.launch import cluster
from course_lib.planning import ceiling, closed_forms, memory
from course_lib.reading import baselines
from course_lib.text import corpus, microscope, tokenizers

PLAN, LEVERS, TOMORROW = (
    (PROJECT / "book" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("eight_gpu_plan", "eight_gpu_levers", "node_tomorrow")
)
BLOCKS = re.findall(r"^```python\n(.*?)^```", LEVERS + TOMORROW, flags=re.DOTALL | re.MULTILINE)
PUBLISHED = json.loads((DATA / "published" / "nemotron_4b.json").read_text(encoding="utf-8"))


@pytest.fixture
def executed(bridge: Any, runs_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that executes a block of the page as on a node with eight GPUs, and returns its names."""
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    for module in (tokenizers, microscope):
        monkeypatch.setattr(module, "require", lambda cfg: None)  # files that are on the node only

    def execute(block: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(block, "the page", "exec"), names)  # noqa: S102
        return names

    return execute


def test_the_lines_prepare_the_1b_step(executed: Any) -> None:
    """They make the run whose first loss and memory the page names."""
    block = next(one for one in BLOCKS if 'name="first"' in one)
    names = executed(block)
    cfg, run = names["cfg"], names["run"]
    assert run.path.name == "first" and (run.path / "config.yaml").is_file() and run.launch["device"] == "cuda"
    assert (cfg.model.num_layers, cfg.model.hidden_size, cfg.model.seq_length) == (16, 2048, 8192), "its own size"
    planned = gib(memory.plan(cfg, ranks=8).total_bytes)
    first = baselines.first_loss(128_256, cfg.model.hidden_size, cfg.model.init_method_std)
    assert f"first loss of {first:.2f} within 0.05, and a peak of {planned:.1f} GiB" in TOMORROW
    assert f"| {first:.2f} within 0.05; a peak of {planned:.1f} GiB or up to 15% above it |" in PLAN
    whole = gib(memory.plan(memory.with_layout(cfg, tp=1, sequence_parallel=False), ranks=8).total_bytes)
    assert f"| the loss falls alike; {whole:.1f} GiB or up to 15% above it |" in PLAN
    assert run.launch["layout"]["data_parallel_size"] == 4


def test_tomorrow_leads_from_a_text_to_a_model(executed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, tokens, run file, resume and export: each file of the page, one after the other; the run itself in small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    text, mine, exported = (
        next(one for one in BLOCKS if words in one) for words in ("train_bpe(", 'name="mine"', "export.model(")
    )
    (tmp_path / "my_text").mkdir()
    for number, topic in enumerate(corpus.language_reference().train):
        (tmp_path / "my_text" / f"{number}.txt").write_text(topic, encoding="utf-8")
    executed(text.replace("vocab_size=32768", "vocab_size=1024"))
    prepared = executed(mine)
    cfg, run = prepared["cfg"], prepared["run"]
    assert run.path == tmp_path / "runs" / "mine" and run.launch["device"] == "cuda"
    assert Path(run.config["checkpoint"]["save"]) == run.path / "checkpoints"
    assert run.launch["layout"]["data_parallel_size"] == 8

    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    shutil.rmtree(run.path)
    recipes.shrink(cfg, num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2)
    cfg.model.seq_length = cfg.dataset.seq_length = 64
    cfg.train.global_batch_size = 8
    cfg.train.train_iters = cfg.checkpoint.save_interval = 2
    cfg.scheduler.lr_warmup_iters = 1
    cfg.validation.eval_interval = 2
    launch.run(cfg, ranks=2, name="mine", save=True, show=None)
    (load,) = re.findall(r"`load=(Path\(.*?\))`", TOMORROW)
    (call,) = re.findall(r"^run = (.*)$", mine, flags=re.MULTILINE)
    resumed = eval(call.replace("save=True", f"save=True, load={load}"), {**prepared, "cfg": cfg})  # noqa: S307
    assert resumed.path.name == "mine-2"
    (look,) = re.findall(r"^\.venv/bin/python -c '(.*?)'$", TOMORROW, flags=re.DOTALL | re.MULTILINE)
    executed(look.replace("first", "mine"))  # what it prints is of a run that trained
    done = executed(exported)["done"]
    assert (tmp_path / "my_model" / "tokenizer.json").is_file() and (done.folder / "model.safetensors").is_file()


def test_the_copy_to_the_node_leaves_out_nothing_of_the_course() -> None:
    """rsync takes a name without a slash at any depth: `runs` alone would leave out `course_lib/runs`."""
    (there,) = re.findall(r"^rsync (.*) NODE:course/$", TOMORROW, flags=re.MULTILINE)
    names = re.findall(r"--exclude (\S+)", there)
    assert set(names) == {"/.venv", "/.tools", "/runs"}
    assert (PROJECT / "course_lib" / "runs").is_dir()


def test_tomorrows_commands_and_numbers_are_those_of_the_course(bridge: Any) -> None:
    """Docker's lines are what the course writes, and the numbers of the 1B run follow from its configuration."""
    for name in ("first", "mine"):
        line = cluster.docker_run(f"runs/{name}/config.yaml", image="nvcr.io/nvidia/nemo:26.06")
        assert f".venv/bin/python {name}.py\n{line}```" in TOMORROW
    with recipes.offline():
        from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

        cfg = llama32_1b_pretrain_config()
    vocab_size = 32_768
    assert f"vocab_size={vocab_size})" in TOMORROW
    cfg.tokenizer.vocab_size = vocab_size
    cfg.model.cross_entropy_fusion_impl = "native"
    cfg.train.global_batch_size = 128
    first = baselines.first_loss(vocab_size, cfg.model.hidden_size, cfg.model.init_method_std)
    planned = gib(memory.plan(cfg, ranks=8).total_bytes)
    assert f"The first loss is {first:.2f} within 0.05 for 32,768 ids, and the peak {planned:.1f} GiB" in TOMORROW
    saved = (2 + 4 + 4 + 4) * closed_forms.parameter_count(cfg.model, vocab_size=vocab_size) / GB
    assert f"A checkpoint has {saved:.1f} GB" in TOMORROW and f"three checkpoints of {saved:.1f} GB" in TOMORROW
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    assert f"{tokens:,} tokens each" in TOMORROW and f"divided by {tokens:,}" in TOMORROW
    gpu = ceiling.gpus()["H100 SXM 80GB"]
    best = ceiling.of(cfg, ranks=8, gpu=gpu, vocab_size=vocab_size).tokens_per_second_per_gpu
    assert tokens / 8 / best == pytest.approx(1.0, abs=0.1), "a step takes a second"
    assert 2000 * 2 * tokens / 8 / best / 3600 == pytest.approx(1.2, abs=0.1), (
        "2,000 steps are a little more than an hour"
    )


def test_the_first_losses_of_the_plan_are_the_formulas() -> None:
    """3B and 8B stand in the row of their step as the data has them."""
    first = plan.read()["first_losses"]
    assert f"first losses {first['3B']:.2f} and {first['8B']:.2f}" in PLAN


def test_checkpoints_and_hours_of_the_plan_follow_from_the_models(bridge: Any) -> None:
    """14 bytes a parameter on the disk, and twice the seconds of the ceiling for the layouts that the page decides for."""
    from megatron.bridge.recipes import llama

    layouts = {"llama32_1b": {}, "llama32_3b": {}, "llama3_8b": {"tp": 2, "sequence_parallel": True}}
    saved, hours = [], []
    for name, sizes in layouts.items():
        with recipes.offline():
            cfg = getattr(llama, f"{name}_pretrain_config")()
        cfg.tokenizer.vocab_size = 128_256
        cfg.train.global_batch_size = 128
        cfg.model.context_parallel_size = 1
        saved.append(14 * closed_forms.parameter_count(cfg.model, vocab_size=128_256) / GB)
        laid_out = memory.with_layout(cfg, **sizes)
        best = ceiling.of(laid_out, ranks=8, gpu=ceiling.gpus()["H100 SXM 80GB"], vocab_size=128_256)
        hours.append(2 * 2000 * 128 * 8192 / 8 / best.tokens_per_second_per_gpu / 3600)
    assert "17, 45 and 112 GB" in TOMORROW and [round(size) for size in saved] == [17, 45, 112]
    one, three, eight = (f"{each:.1f}" for each in hours)
    assert f"{one}, {three} and {eight} hours" in TOMORROW


def test_nemotrons_lines_prepare_what_nvidia_ran(executed: Any) -> None:
    """The recipe, its batch and length, and saving; the published numbers follow from each other and from the formulas."""
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    block = next(one for one in BLOCKS if 'name="nemotron-4b"' in one)
    names = executed(block)
    cfg, run = names["cfg"], names["run"]
    assert PUBLISHED["recipe"] in block
    (folder,) = re.findall(r"--local-dir (\S+)$", LEVERS, flags=re.MULTILINE)
    assert run.config["tokenizer"]["tokenizer_model"] == str(Path(folder).absolute())
    assert (cfg.train.global_batch_size, cfg.model.seq_length, cfg.train.train_iters) == (1024, 4096, 100)
    assert (run.path / "config.yaml").is_file() and cfg.checkpoint.save_interval == 50
    rows = {row["what"]: row["value"] for row in PUBLISHED["rows"]}
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    rate = rows["tokens a second and GPU"]
    assert tokens / 8 / rows["seconds a step, last ten"] == pytest.approx(rate, rel=1e-4)
    per_token = num_floating_point_operations(cfg, 1) / cfg.model.seq_length  # Bridge's own count, as in its log
    assert rate * per_token / 1e12 == pytest.approx(rows["model TFLOP/s a GPU"], rel=1e-3)
    first = baselines.first_loss(cfg.model.vocab_size, cfg.model.hidden_size, cfg.model.init_method_std)
    assert rows["loss at step 1"] == pytest.approx(first, abs=0.05) and f"{first:.2f} within 0.05" in PLAN
    last, resumed = rows["loss at step 100"], rows["resumed from step 50: loss at step 100"]
    assert rows["resumed from step 50: loss at step 51"] == rows["loss at step 51"]
    assert abs(resumed / last - 1) == pytest.approx(0.0016 / 100, rel=0.02) and 0.0016 / 100 < 0.01


def test_the_decision_has_seven_lines() -> None:
    """No more, and the first names the layout with which the course starts."""
    lines = re.findall(r"^\d\. .*$", PLAN, flags=re.MULTILINE)
    assert len(lines) == 7 and "TP=2 PP=1 DP=4" in lines[0] and "pipeline" in lines[-1]


def test_what_the_pages_say_of_ceilings() -> None:
    """TP=2 against TP=1, TP=4 against TP=2, and PP=2 against TP=2, as the data has them."""
    rates = {
        (row["model"], row["tp"], row["pp"], row["cp"]): row["tokens_per_second_per_gpu_at_best"]
        for row in plan.read()["plans"]
    }
    needs = {(row["model"], row["tp"], row["pp"]): gib(row["total_bytes"]) for row in plan.read()["plans"]}
    for model in ("1B", "3B"):
        assert 1 - rates[model, 2, 1, 1] / rates[model, 1, 1, 1] == pytest.approx(1 / 7, abs=0.01)
        assert 1 - rates[model, 4, 1, 1] / rates[model, 2, 1, 1] > 1 / 6
    assert 1 - rates["8B", 4, 1, 1] / rates["8B", 2, 1, 1] == pytest.approx(1 / 6, abs=0.01)
    assert rates["8B", 1, 2, 1] == pytest.approx(rates["8B", 2, 1, 1], rel=0.02)
    assert needs["8B", 1, 2] - needs["8B", 2, 1] == pytest.approx(16, abs=0.1)
