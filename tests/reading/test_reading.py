"""Reading runs and comparing them: FLOPs, Bridge's line, symptoms, one change at a time, and a verdict with its noise."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import yaml

from course_lib import launch, runs
from course_lib.common.project import DATA
from course_lib.experiments import sweep
from course_lib.figures import compare, plots
from course_lib.planning import closed_forms
from course_lib.reading import baselines, health, throughput
from support.small import config

LINE = (
    " [2026-11-24 16:42:12] iteration        5/       5 | consumed samples:          160 | "
    "elapsed time per iteration (ms): 735.8 | learning rate: 4.000000E-04 | global batch size:    32 | "
    "lm loss: 6.692820E+00 | loss scale: 1.0 | grad norm: 1.067 | number of skipped iterations:   1 | "
    "number of nan iterations:   0 |\n"
)
"""A line of Bridge's, as a run of the course wrote it."""


def run_in(
    path: Path, *, steps: int = 20, leak_rank: int | None = None, held: int = 2**25, **columns: list[float]
) -> runs.Run:
    """A run directory with a loss that falls from ln(1024), and memory that settles unless a rank leaks."""
    (path / "logs").mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("model: {hidden_size: 128, init_method_std: 0.02}\n")
    metrics, memory = [], []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": math.log(1024) - 0.05 * step, "grad_norm": 1.0, "skipped": False, "tokens": 100}
        row |= {"elapsed_ms": 500.0 if step == 1 else 100.0, "tokens_per_second": 200.0 if step == 1 else 1000.0}
        row |= {name: values[step - 1] for name, values in columns.items()}
        metrics.append(row)
        for rank in range(4):
            grown = 2**22 * step if rank == leak_rank else 0
            memory.append({"rank": rank, "step": step, "memory_bytes": held + grown, "peak_memory_bytes": 2**26})
    for name, rows in (("metrics", metrics), ("memory", memory)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.Run(path)


def test_two_runs_differ_by_loss_or_gradient_norm(tmp_path):
    """The largest relative difference of steps that both have; a number that is missing is no agreement."""
    norms = [1.0] * 20
    one = run_in(tmp_path / "one")
    assert runs.difference(run_in(tmp_path / "same", steps=10), one) == 0
    other = run_in(tmp_path / "other", grad_norm=[*norms[:19], 1.25])
    assert runs.difference(other, one) == 0.25 and runs.difference(one, other) == pytest.approx(0.2)
    assert math.isnan(runs.difference(run_in(tmp_path / "nan", grad_norm=[*norms[:19], math.nan]), one))
    assert math.isnan(runs.difference(run_in(tmp_path / "none", steps=0), one))


@pytest.mark.parametrize("tp", [1, 4])
def test_flops_equal_bridges_own_count(bridge, tp):
    """The formula with the masked half left out is what Bridge folds into its TFLOP/s."""
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    cfg = config(tp=tp)
    cfg.model.vocab_size, cfg.model.kv_channels = 1024, 16
    for share in (True, False):
        cfg.model.share_embeddings_and_output_weights = share
        ours = closed_forms.flops_per_token(cfg.model, seq_length=64, vocab_size=1024)
        assert ours * 64 * 8 == pytest.approx(num_floating_point_operations(cfg, batch_size=8), rel=1e-12)
        whole = closed_forms.flops_per_token(cfg.model, seq_length=64, vocab_size=1024, causal=False)
        assert whole - ours == 6 * 4 * 64 * 128


def test_steady_steps_leave_out_the_first_and_the_skipped(tmp_path):
    """The slow start and a step that changed no weight say nothing about speed; leaving nothing is refused."""
    run = run_in(tmp_path, skipped=[False] * 19 + [True])
    kept = throughput.steady(run, skip=5)
    assert kept.step.tolist() == list(range(6, 20)) == throughput.steady(run).step.tolist()
    assert throughput.throughput(kept).tokens_per_second == pytest.approx(1000)
    whole = throughput.throughput(run.metrics)
    assert whole.tokens_per_second < whole.mean_of_rates < 1000
    with pytest.raises(ValueError, match="leaves none of 20 steps"):
        throughput.steady(run, skip=20)
    with pytest.raises(ValueError, match="0 steps in 0 s have no throughput"):
        throughput.throughput(run.metrics.iloc[:0])


def test_a_matrix_product_counts_two_operations_a_number(monkeypatch):
    """The fastest of several multiplications of n x n matrices is 2 n^3 operations in its seconds."""
    ticks = iter([0.0, 3.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    assert throughput.machine_flops_per_second(size=8, repeats=3) == 2 * 8**3 / 0.5


def test_bridges_line_is_read(tmp_path):
    """Every number of the line gets its name; a log without a line is refused with a reason."""
    run = run_in(tmp_path)
    (tmp_path / "launch.json").write_text('{"ranks": 2}')
    with pytest.raises(ValueError, match="log_interval above train_iters"):
        throughput.bridge_log(run)
    diverged = LINE.replace("6.692820E+00", "NAN").replace("grad norm: 1.067", "grad norm: inf")
    (tmp_path / "logs" / "rank_1.log").write_text(diverged)
    assert math.isnan(throughput.bridge_log(run).loss[0]) and math.isinf(throughput.bridge_log(run).grad_norm[0])
    (tmp_path / "logs" / "rank_1.log").write_text("noise\n" + LINE)
    row = throughput.bridge_log(run).iloc[0]
    assert (row.step, row.loss, row.grad_norm, row.elapsed_ms) == (5, 6.69282, 1.067, 735.8)
    assert (row.skipped, row["nan"], row.global_batch_size, row.learning_rate) == (1, 0, 32, 4e-4)


def test_bridges_mb_is_mib(tmp_path):
    """Bridge divides by 2**20 and writes MB; a log without its estimate is refused."""
    run = run_in(tmp_path)
    with pytest.raises(ValueError, match="Theoretical memory footprints"):
        throughput.bridge_state_bytes(run)
    (tmp_path / "logs" / "rank_0.log").write_text("Theoretical memory footprints: weight and optimizer=3.10 MB\n")
    assert throughput.bridge_state_bytes(run) == 3.10 * 2**20


def said(path: Path, *rows: tuple[int, int, float | None, float | None, bool], world: int = 2) -> tuple[str, ...]:
    """The warnings of a run whose ranks wrote these steps: rank, step, loss, gradient norm, skipped."""
    path.mkdir(exist_ok=True)
    runs.write_json(path / "launch.json", {"ranks": world})
    lines = [json.dumps(dict(zip(runs.COLUMNS["steps"], row, strict=True))) for row in rows]
    (path / "steps.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return runs.Run(path).warnings


def test_ranks_that_agree_are_not_warned_of(tmp_path):
    """Rounding, a stage without a loss, and steps that loss scaling skips are no fault."""
    rows = [
        (0, 1, None, 1.5, False),
        (1, 1, 6.9, 1.5000001, False),
        (0, 2, None, math.inf, True),
        (1, 2, 6.9, None, True),
    ]
    assert said(tmp_path, *rows) == () and len(runs.Run(tmp_path).steps) == 4


def test_ranks_that_disagree_are_named_once_with_the_first_step(tmp_path):
    """Three ranks against one; the loss follows a step later."""
    rows = [(rank, step, 6.9 - (step == 3 and rank == 2), 1.5 + (step >= 2 and rank == 2), False)
            for step in (1, 2, 3) for rank in range(4)]  # fmt: skip
    norm, loss = said(tmp_path, *rows, world=4)
    assert norm.startswith("ranks that must agree do not: the gradient norm of step 2 is 1.5, but 2.5 on rank 2;")
    assert "the loss of step 3 is 6.9, but 5.9 on rank 2" in loss


def test_a_norm_that_is_not_finite_is_told_unless_the_step_was_skipped(tmp_path):
    """Also where it is the same on all ranks, and where only some skip."""
    (one,) = said(tmp_path, (0, 1, 6.9, math.nan, False), (1, 1, 6.9, math.nan, False))
    assert one.startswith("the gradient norm of step 1 is not finite on ranks 0, 1, and the step was not skipped")
    (one,) = said(tmp_path, (0, 1, 6.9, 1.0, False), (1, 1, 6.9, 1.0, True))
    assert one.startswith("rank 1 skipped step 1 and the others did not")


def test_steps_are_judged_when_all_ranks_have_written_theirs(tmp_path):
    """While a run goes on, a step that one rank has not ended waits; at its end it is judged as it is."""
    rows = [(0, 1, 6.9, 1.0, False), (1, 1, 6.9, 2.0, False)]
    said(tmp_path, *rows, world=3)
    agreement = runs.Agreement(runs.Run(tmp_path))
    assert agreement.look() == ()
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write(json.dumps(dict(zip(runs.COLUMNS["steps"], (2, 1, 6.9, 1.0, False), strict=True))))
        file.flush()
        assert agreement.look() == (), "half a line"
        file.write("\n")
    assert "is 1, but 2 on rank 1" in agreement.look()[0] and agreement.look() == runs.Run(tmp_path).warnings


def test_what_a_schedule_becomes_in_silence_is_told(tmp_path):
    """A warm-up that is cut to fit, and a resumed run with another global batch; not where nothing is changed."""

    def warned(name: str, before: int | None = None, **sections: dict) -> tuple[str, ...]:
        (tmp_path / name).mkdir()
        runs.write_json(tmp_path / name / "launch.json", {"global_batch_size_of_the_checkpoint": before})
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(sections))
        return runs.Run(tmp_path / name).warnings

    train, load = {"train_iters": 3, "global_batch_size": 16}, {"load": "somewhere"}
    assert warned("plain", train=train, scheduler={"lr_warmup_iters": 2}, checkpoint={"load": None}) == ()
    (one,) = warned("cut", train=train, scheduler={"lr_warmup_iters": 50})
    assert one.startswith("the warm-up of 50 steps is cut to fit a schedule of 3")
    assert warned("long", train=train, scheduler={"lr_warmup_iters": 50, "lr_decay_iters": 100}) == ()
    short = {"scheduler": {"lr_decay_style": "cosine", "lr_decay_iters": 2}, "optimizer": {"min_lr": 0.0}}
    (one,) = warned("idle", train=train, **short)
    assert "0 from step 2 on" in one and "other 1 steps" in one
    assert warned("floor", train=train, **short | {"optimizer": {"min_lr": 1e-5}}) == ()
    (one,) = warned("batch", before=8, train=train, checkpoint=load)
    assert one.startswith("the checkpoint was trained with a global batch of 8 and this run goes on with 16")
    assert warned("same", before=16, train=train, checkpoint=load) == ()
    assert warned("weights", before=8, train=train, checkpoint=load | {"load_optim": False}) == ()
    assert warned("tuned", before=8, train=train, checkpoint=load | {"finetune": True}) == ()


def test_a_rank_that_corrupts_its_gradient_is_told(bridge, runs_directory):
    """The run succeeds, and its outcome has the gradient norms that differ after the reduction."""
    run = launch.run(config(tp=1), ranks=2, name="corrupt", show=None, target="support.drills:corrupts_its_gradient")
    assert run.outcome.status == "succeeded" and run.warnings == run.outcome.warnings
    norm = next(text for text in run.warnings if "the gradient norm" in text)
    assert "of step 2 is" in norm and " on rank 0, " in norm
    assert norm.endswith(" on rank 1; their weights differ from there on")


def test_a_healthy_run_has_no_symptom(tmp_path):
    """All six signs are within their limits."""
    assert (health.symptoms(run_in(tmp_path), vocab_size=1024).verdict == "ok").all()


def test_a_single_jump_of_the_gradient_is_no_symptom(tmp_path):
    """A run gets over one step with a large gradient, which clipping makes small."""
    run = run_in(tmp_path, grad_norm=[1.0] * 10 + [12.0] + [1.0] * 9)
    assert (health.symptoms(run, vocab_size=1024).verdict == "ok").all()


FALLING = [6.9 - 0.05 * i for i in range(20)]
SICK = [
    ("first loss away from 6.96", {"loss": [9.0 - 0.1 * i for i in range(20)]}),
    ("loss, average of 10, above its lowest", {"loss": [6.9] * 4 + [3.0] * 7 + [7.0] * 5 + [6.5] * 4}),
    ("gradient norm, average of 10, against step 1", {"grad_norm": [1.0] * 10 + [9.0] * 10}),
    ("steps skipped or not a number", {"loss": [*FALLING[:19], math.nan]}),
    ("steps skipped or not a number", {"skipped": [False] * 19 + [True]}),
    ("steps skipped or not a number", {"grad_norm": [1.0] * 19 + [math.inf]}),
    ("loss, average of the last 10, above step 1", {"loss": [6.94, 6.96] * 10}),
    ("memory growth of one rank, at least", {"leak_rank": 2}),
    ("memory growth of one rank, at least", {"leak_rank": 2, "held": 60 * 2**30}),
]


@pytest.mark.parametrize(("sign", "disease"), SICK)
def test_each_disease_shows_by_its_own_sign(tmp_path, sign, disease):
    """A planted disease is found by the sign that is meant for it, and by no other; a leak in 32 MiB as in 60 GiB."""
    signs = health.symptoms(run_in(tmp_path, **disease), vocab_size=1024)
    assert signs.index[signs.verdict == "look"].tolist() == [sign]
    if "leak_rank" in disease:
        assert signs.loc[sign, "where"] == "rank 2, 4.0 MiB/step"
        assert signs.loc[sign, ["measured", "limit"]].tolist() == [4.0, 1.0]


@pytest.mark.parametrize(("above", "verdict"), [(health.START_NATS - 0.01, "ok"), (health.START_NATS + 0.01, "look")])
def test_signs_are_measured_against_step_1(tmp_path, above, verdict):
    """The first loss is judged at its limit, which is a quarter of a nat; loss and norm are held against those of step 1."""
    first = baselines.first_loss(1024, 128, 0.02) + above
    run = run_in(tmp_path, loss=[first, *FALLING[1:]], grad_norm=[2.0] + [1.0] * 19)
    signs = health.symptoms(run, vocab_size=1024)
    assert health.START_NATS == 0.25 and signs.verdict.iloc[0] == verdict
    assert signs.loc["gradient norm, average of 10, against step 1", "measured"] == 1.0
    fallen = sum(FALLING[10:]) / 10 - first
    assert signs.loc["loss, average of the last 10, above step 1", "measured"] == pytest.approx(fallen, abs=1e-3)


@pytest.mark.parametrize(("spike", "verdict"), [(0.9, "ok"), (1.1, "look")])
def test_a_spike_is_judged_at_one_nat(tmp_path, spike, verdict):
    """The average of ten losses, against its lowest value so far."""
    signs = health.symptoms(run_in(tmp_path, loss=[6.9] + [5.0] * 19 + [5.0 + spike] * 10, steps=30), vocab_size=None)
    assert signs.loc["loss, average of 10, above its lowest", "verdict"] == verdict
    assert not signs.index.str.startswith("first loss").any(), "a run that began with other weights has no first loss"


def test_four_steps_show_growth(tmp_path):
    """The fewest that do: two of them are in the second half, wherever the run began."""
    growth = health.memory_growth(run_in(tmp_path, steps=4, leak_rank=1))
    assert growth["bytes_per_step"].tolist() == [0, 4 * 2**20, 0, 0]
    rows = [{"rank": 0, "step": step, "memory_bytes": 2**20 * min(step, 110)} for step in range(101, 121)]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert health.memory_growth(runs.Run(tmp_path))["bytes_per_step"].tolist() == [0], "it grew in the first half"


def test_a_jump_of_memory_is_no_leak(tmp_path):
    """What an allocator takes once, late in the run, is kept and does not go on."""
    run = run_in(tmp_path, steps=20)
    rows = [{"rank": 0, "step": step, "memory_bytes": 2**25 + (step > 14) * 2**25} for step in range(1, 21)]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (health.symptoms(run, vocab_size=1024).verdict == "ok").all()


def test_a_run_without_a_step_has_no_symptoms(tmp_path):
    """There is nothing to look at, which is no verdict."""
    with pytest.raises(ValueError, match="has no step to look at"):
        health.symptoms(run_in(tmp_path, steps=0), vocab_size=1024)


def test_a_short_run_cannot_show_growth(tmp_path):
    """One reading makes no line."""
    with pytest.raises(ValueError, match="at least four steps"):
        health.memory_growth(run_in(tmp_path, steps=1))


def test_the_growth_of_a_resumed_run_is_that_of_its_own_second_half(tmp_path):
    """Memory that grew in the first steps only is no leak, at step 3 of a run as at step 103 of one that went on."""
    grown = [min(step, 3) * 2**20 for step in range(1, 11)]
    for first in (1, 101):
        rows = [
            {"rank": 0, "step": first + i, "memory_bytes": size, "peak_memory_bytes": size}
            for i, size in enumerate(grown)
        ]
        (tmp_path / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert health.memory_growth(runs.Run(tmp_path)).bytes_per_step[0] == pytest.approx(0, abs=1)


def test_one_change_is_exactly_one_field():
    """No difference and two differences are refused, the latter by name; a tied field may follow."""
    base = {"train": {"iters": 30, "batch": 16}, "optimizer": {"lr": 1e-3}}
    other = copy.deepcopy(base)
    with pytest.raises(sweep.NotOneChange, match="do not differ"):
        sweep.one_change(base, other)
    other["train"] = {"iters": 15, "batch": 32}
    with pytest.raises(sweep.NotOneChange, match=r"2 fields differ \(train.iters: 30 -> 15; train.batch: 16 -> 32\)"):
        sweep.one_change(base, other)
    assert sweep.one_change(base, other, tied=["train.iters"]) == sweep.Change("train.batch", 16, 32)


def test_the_noise_is_welchs_interval():
    """The half widths equal those of scipy's own tests, unpaired and paired; groups without any spread have none."""
    from scipy.stats import ttest_ind, ttest_rel

    before, after = [5.0, 5.1, 5.25], [5.6, 5.5, 5.9]
    one = sweep.Comparison.of(sweep.Change("x", 1, 2), before, after)
    interval = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    assert (one.difference - one.noise, one.difference + one.noise) == pytest.approx((interval.low, interval.high))
    assert one.verdict == "worse"
    within = ttest_rel(after, before).confidence_interval(0.95)
    assert one.paired_noise == pytest.approx((within.high - within.low) / 2)
    assert sweep.Comparison.of(sweep.Change("x", 1, 2), after, before).verdict == "better"
    same = sweep.Comparison.of(sweep.Change("x", 1, 2), [5.0, 5.0], [5.0, 5.0])
    assert (same.noise, same.verdict) == (0, "no difference beyond noise")
    with pytest.raises(ValueError, match="two seeds or more"):
        sweep.Comparison.of(sweep.Change("x", 1, 2), [5.0], [5.1])


@pytest.mark.parametrize("seeds", [[], [1, 1], [0, 1]])
def test_impossible_seeds_are_refused(seeds):
    """Each seed counts once, and Bridge refuses seeds below 1."""
    with pytest.raises(ValueError, match="from 1 up"):
        sweep.repeat(None, seeds=seeds, name="x")


def test_a_seed_decides_weights_and_order(bridge):
    """Both of Bridge's seeds are set, and the configuration itself stays as it is."""
    cfg = config()
    mine = sweep.seeded(cfg, 7)
    assert (mine.rng.seed, mine.dataset.random_seed) == (7, 7) != (cfg.rng.seed, cfg.dataset.random_seed)


def test_what_moves_with_a_field(bridge):
    """A larger batch also moves the tokens of the run, unless the steps follow."""
    cfg, larger = config(train_iters=4), config(train_iters=4, train__global_batch_size=16)
    assert sweep.moved(cfg, larger, ranks=8).loc["tokens in the run"].tolist() == [2048, 4096]
    larger.train.train_iters = 2
    assert sweep.moved(cfg, larger, ranks=8).index.tolist() == ["micro-batches in a step", "tokens in a step"]


def test_a_finished_run_is_not_run_again(bridge, runs_directory, tmp_path, monkeypatch):
    """A sweep goes on where it stopped; a changed field, or changed data behind a path, means a new run."""
    started = []

    def train(cfg: object, *, ranks: int, name: str, show: object, watch: object) -> runs.Run:
        path = runs.create(name)
        (path / "config.yaml").write_text("train: {}\n")
        (path / "validation.jsonl").write_text('{"step": 1, "time": 0, "loss": 5.0}\n')
        started.append(path.name)
        return runs.Run(path)

    monkeypatch.setattr(sweep.launch, "run", train)
    data = tmp_path / "text.bin"
    data.write_bytes(b"12")
    cfg = config(tokenizer__tokenizer_model=str(tmp_path / "text"))
    assert len(sweep.repeat(cfg, seeds=[1, 2], name="base")) == 2
    sweep.repeat(cfg, seeds=[1, 2, 3], name="base")
    assert started == ["base-seed1", "base-seed2", "base-seed3"]
    cfg.optimizer.lr *= 2
    sweep.repeat(cfg, seeds=[1], name="base")
    data.write_bytes(b"123")
    sweep.repeat(cfg, seeds=[1], name="base")
    assert started[3:] == ["base-seed1-2", "base-seed1-3"]


def test_a_run_that_was_never_evaluated_has_no_held_out_loss(tmp_path):
    """The message names the field."""
    with pytest.raises(ValueError, match="eval_iters"):
        sweep.held_out(run_in(tmp_path))


def test_figures_of_several_runs_say_what_they_show(tmp_path):
    """Axes have units, and the description holds the numbers that the eye would read."""
    run = run_in(tmp_path, leak_rank=2)
    change = sweep.Change("optimizer.lr", 1, 2)
    one = sweep.Comparison.of(change, [5.0, 5.1, 5.2], [6.0, 6.1, 6.2])
    with plots.figure("A finding", columns=4) as (first, second, third, fourth):
        compare.curves({"a run": run}, "loss", ax=first, unit="nats per token")
        compare.memory_by_step(run, ax=second, highlight=2)
        compare.seeds({"base": one.before, "lr": one.after}, ax=third)
        compare.effects({"lr": one}, ax=fourth)
    units = [first.get_ylabel(), second.get_ylabel(), third.get_xlabel(), fourth.get_xlabel()]
    wanted = ["nats per token", "MiB", "nats per token", "nats per token"]
    assert all(unit in label for unit, label in zip(wanted, units, strict=True))
    words = plots.describe(first.figure)
    assert "between 32 and 112 MiB" in words and "lr: +1.000" in words and "base: 5.000 to 5.200" in words


def test_published_rates_have_a_source_and_an_accounting():
    """Each row names where it was read, and its FLOPs per token are one of the two accountings within 1%."""
    data = json.loads((DATA / "published" / "throughput.json").read_text())
    for row in data["rows"]:
        assert row["source"] and data["read"]
        giga = row["tflops_per_gpu"] * 1e3 / row["tokens_per_second_per_gpu"]
        assert min(abs(giga / known - 1) for known in (51.47, 57.91)) < 0.01


def test_smoothing_averages_ten_steps():
    """A smoothed series has a value for each step: the average of that step and the nine before it."""
    found = health.smoothed(pd.Series(range(30), dtype=float))
    assert found.tolist() == [sum(range(max(0, i - 9), i + 1)) / min(10, i + 1) for i in range(30)]
