"""Every claim of a check cell of lessons 07, 10, 11 and 12 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace as Some

import pandas as pd
import pytest

from course_lib import runs, stack
from course_lib.figures import plots
from course_lib.launch import cluster
from course_lib.reading import pipeline, throughput
from support.lesson_cells import falsify, gives, tagged


def metrics(*losses, first=1):
    """Metrics of a run with these losses."""
    return pd.DataFrame({"step": range(first, first + len(losses)), "loss": losses, "grad_norm": 1.0})


def trained(*losses, device="cpu", **more):
    """A run with these losses."""
    return Some(metrics=metrics(*losses), launch={"device": device}, **more)


EXACT = {"on_cpu": True, "bound": 0.0, "equal": "in every digit"}
"""What lesson 10 claims of CPU ranks."""


def raises(error):
    """A function of anything that raises."""

    def function(*_, **__):
        raise error

    return function


def table(equal=True):
    """A comparison with the closed form."""
    return pd.DataFrame({"phase": [""], "operation": [""], "group": [""], "bytes": [1], "expected": [2],
                         "recorded": [2 if equal else 3], "why": [""]})  # fmt: skip


def sent(**sent_bytes):
    """What `messages.by_group` returns."""
    operations = {"tp": 1000, "dp_cp": 2, "pp": 10}
    rows = {k.replace("_", "-"): {"operations": operations.get(k, 1), "sent_bytes": v} for k, v in sent_bytes.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


class Failed(Exception):
    """A run that failed."""

    def __init__(self, cause="ended without a word", **outcome):
        super().__init__(cause)
        self.outcome = Some(cause=cause, **{"hint": ""} | outcome)


SCRIPT = """#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --account=my_account
#SBATCH --time=01:00:00
export NCCL_DEBUG=WARN
export PYTHONPATH=/shared/course/packages:/shared/course
srun --nodes=1 python -m pip install --no-deps megatron-core==0.19.2 --target /shared/course/packages
srun --container-image nvcr.io#nvidia/nemo:26.06 --container-mounts /shared/course:/shared/course \\
  torchrun --nproc-per-node 8 -m course_lib.ranks.train /shared/course/runs/smoke/config.yaml
"""
WORDS = (
    *("nodes=1", "--container-image nvcr.io#", "/shared/course:", "--nproc-per-node 8", "NCCL_DEBUG=WARN"),
    *(
        "export PYTHONPATH=/shared/course/packages:/shared/course",
        "course_lib.ranks.train",
        "python -m pip install --no-deps megatron-core==0.19.2",
    ),
)


def lesson_07():
    """Facts of lesson 07, and for each cell what may be wrong with them."""
    found = {name: trained(3.0, 2.0, path=".") for name in ("warm launch", "torchrun")}
    other = found | {"torchrun": trained(3.0, 2.1, path=".")}
    yield "check-launchers", {"found": found, "steps": 2, "runs": runs}, [{"steps": 3}, {"found": other}]
    printed = metrics(3.0, 2.0)
    plain_file = {
        "found": found, "steps": 2, "bound": 0.0, "printed": printed, "runs": runs, "throughput": throughput,
        "by_hand": Some(stderr=""),
    }  # fmt: skip
    wrong_files = [{"printed": printed[:0]}, {"printed": printed[:1]}, {"printed": metrics(3.0, 2.1)}]
    yield "check-plain-file", plain_file, wrong_files
    silence = {
        "returned": None, "status": {"status": Some(name="FAILED")}, "success_files": ["SUCCESS"], "cfg": 0, "ranks": 2,
        "launch": Some(prepare=gives(0), RunFailed=Failed), "cluster": Some(settled=raises(Failed())),
    }  # fmt: skip
    yield "check-silence", silence, [{"success_files": []}, {"cluster": Some(settled=gives(0))}]
    first = {
        "dead": Some(log=gives("Connection closed")), "said": pd.DataFrame({"exception": [""] * 8}),
        "outcome": Some(rank=5, exception="SIGKILL", cause=""),
    }  # fmt: skip
    wrong = {"outcome": Some(rank=3, exception="SIGKILL", cause="")}
    yield "check-first", first, [{"dead": Some(log=gives("SIGKILL"))}, wrong]
    yield (
        "check-slurm",
        {"script": SCRIPT, "cluster": cluster, "tested": WORDS[-1]},
        [{"script": SCRIPT.replace(w, "")} for w in WORDS],
    )
    tools = Some(shellcheck=lambda script: [] if script == "plain" else ["x [SC2086]"])
    second = {"changed": [[""] * 4, ["+ --rdzv-endpoint"]], "plain": "plain", "script": "", "cluster": tools}
    yield "check-second", second, [{"changed": [[""] * 3, []]}, {"plain": ""}]
    rented = cluster.docker_run("runs/smoke/config.yaml", image="nemo:26.06")
    address = {"account": "me", "partition": "batch", "image": "nemo:26.06"}
    plain = cluster.sbatch("runs/smoke/config.yaml", **address)

    def writes(line, *findings):
        """`cluster`, which writes this line, and whose shellcheck has these findings."""
        return {"cluster": Some(docker_run=gives(line), shellcheck=gives(list(findings)))}

    node = {"plain": plain, "image": "nemo:26.06", "stack": stack, **writes(rented)}
    words = ("--gpus all", "--ipc=host", "--ulimit memlock=-1", "nemo:26.06", "--nproc-per-node 8", "pip install")
    wrong_lines = [writes(rented.replace(word, "")) for word in words]
    late = {"plain": "exec torchrun\n" + plain}
    yield "check-rented", node, [*wrong_lines, late, writes(rented, "x [SC2086]")]
    names = iter(["twin", "twin-2"])

    def prepare(cfg, **_):
        if cfg.logger.wandb_exp_name:
            raise Failed("would hold an access token")
        return Some(name=next(names, "twin"))

    habits = {
        "cfg": Some(logger=Some(wandb_exp_name="")), "ranks": 2, "launch": Some(prepare=prepare, ConfigError=Failed),
        "plain": "set -euo", "found": found, "cluster": Some(secrets=lambda place: "HF_TOKEN" in str(place)),
    }  # fmt: skip
    yield (
        "check-habits",
        habits,
        [
            {"launch": Some(prepare=gives(Some(name="twin")), ConfigError=Failed)},
            {"cluster": Some(secrets=gives([]))},
            {"cluster": Some(secrets=gives(["a"]))},
        ],
    )


def lesson_10():
    """Facts of lesson 10."""
    parts = pd.DataFrame({"part": ["weights", "moments"], "size_bytes": [400, 1200]})
    size = {
        "checkpoints": Some(tensors=gives(parts)),
        "saved": Some(size_bytes=1700),
        "parameters": 100,
        "state_bytes": 16,
    }
    yield "check-size", size, [{"parameters": 50}, {"saved": Some(size_bytes=1600)}]

    def apart(distance):
        """`runs`, for a run that is so far from the uninterrupted one."""
        return {"runs": Some(difference=gives(distance), GPU_ROUNDING=runs.GPU_ROUNDING)}

    made = Some(run=gives(Some(metrics=metrics(1.0, first=7))))
    resume = {
        "cfg": Some(train=Some()), "resumed_steps": 24, "saved": Some(path=""), "launch": made, "save_interval": 6,
        "whole": trained(1.0), **apart(0),
    }  # fmt: skip
    yield "check-resume", resume, [{"save_interval": 5}, apart(1e-6)]
    cfg = Some(model=Some(), checkpoint=Some(dist_ckpt_optim_fully_reshardable=False, fully_parallel_save=True))
    places = itertools.cycle([7, 13, 19])
    reshard = {
        "saved": Some(path="", step=6), "save_interval": 6, "cfg": cfg, "whole": 0, **apart(1e-6),
        "launch": Some(run=lambda *_, **__: Some(metrics=metrics(1.0, first=next(places)))),
        "checkpoints": Some(at=lambda run, step: Some(path="", step=step)), **EXACT,
    }  # fmt: skip
    again = {"launch": Some(run=gives(Some(metrics=metrics(1.0, first=1))))}
    yield "reshard", reshard, [again, apart(1e-2)]
    refused = Failed("this is dp_reshardable")
    loads = Some(run=lambda *_, **named: raises(refused)() if "load" in named else 0, RunFailed=Failed)
    unlike = Some(run=lambda *_, **named: raises(Failed("x"))() if "load" in named else 0, RunFailed=Failed)
    yield (
        "recipe-format",
        {"recipe": Some(checkpoint=cfg.checkpoint), "cfg": cfg, "launch": loads},
        [{"launch": unlike}],
    )
    kill = {
        "death": 8, "again": 7, "last_good": Some(step=6), "save_interval": 6, "restarted": 0, **apart(0),
        "whole": 0, "checkpoints": Some(latest=gives(0), compare=gives(pd.DataFrame({"largest_difference": [0.0]}))), **EXACT,
        "killed": Some(rank=3, exception="SIGKILL"),
    }  # fmt: skip
    unlike = Some(latest=gives(0), compare=gives(pd.DataFrame({"largest_difference": [1e-9]})))
    other = Some(rank=0, exception="SIGKILL")
    yield "check-kill", kill, [{"again": 1}, apart(1e-6), {"checkpoints": unlike}, {"killed": other}]
    listing = pd.DataFrame({"missing": ["", ".metadata: not written"]}, index=[6, 12])
    space = "No space left on device"

    def of_rank_0(message, exception="CheckpointException"):
        return {rank: {"exception": exception, "message": "[]" if rank else message} for rank in range(8)}

    full = {
        "full": Some(ranks=gives(of_rank_0("[3]"))), "cfg": 0,
        "why": Some(rank=3, cause=space),
        "checkpoints": Some(latest=gives(Some(step=6)), listing=gives(listing)), "save_interval": 6,
        "launch": Some(run=gives(0)), "whole": 0, **apart(0), **EXACT,
    }  # fmt: skip
    yield (
        "check-full",
        full,
        [
            {"why": Some(rank=0, cause=space)},
            {"full": Some(ranks=gives(of_rank_0(space, "OSError"))), **apart(1e-6)},
            {"checkpoints": Some(latest=gives(Some(step=12)), listing=gives(listing.iloc[::-1].set_axis([6, 12])))},
        ],
    )

    def traps(steps=0, saves="a", typo=Failed):
        """The recipe's places, a stale start with so many steps, and what a missing directory leads to."""

        def run(cfg, *, name, **_):
            if name == "typo" and typo:
                raise typo
            return Some(outcome=Some(status="succeeded"), metrics=metrics(*[1.0] * steps))

        places = {place: str(Path.cwd() / name) for place, name in (("save", saves), ("load", "a"))}
        return {
            "recipe": Some(checkpoint=Some(**places)), "cfg": Some(rng=Some(seed=1)), "whole": 0, "Path": Path,
            "checkpoints": Some(NoCheckpoint=Failed), "launch": Some(run=run),
        }  # fmt: skip

    yield "check-traps", traps(), [traps(saves="b"), traps(steps=1), traps(typo=None)]
    weight = Some(numel=gives(100))
    table = pd.DataFrame({"part": ["weights", "weights"], "largest_difference": [0.0, 0.0]})
    kept = Some(compare=gives(table), latest=gives(Some(path="")))
    changed = Some(compare=gives(table.assign(largest_difference=[0.0, 1e-3])), latest=kept.latest)

    def exported(difference):
        """`export`, for a model whose logits are so far from Bridge's."""
        model = gives(Some(largest_difference=difference, largest_logit=1.0, folder=0))
        return {"export": Some(TOLERANCE=1e-4, to_megatron=gives(0), model=model, model_rank=lesson_10)}

    hub = {
        "AutoModelForCausalLM": Some(from_pretrained=gives(Some(parameters=gives([weight])))), "parameters": 100,
        "utils": Some(logging=Some(disable_progress_bar=gives(0))), "checkpoints": kept, "whole": Some(path=Path("run")),
        **exported(0.0),
    }  # fmt: skip
    yield "check-hub", hub, [{"parameters": 101}, {"checkpoints": changed}, exported(0.1)]

    def rows(*rise, status="succeeded"):
        """`launch`, where the run with more rows has losses that are higher by this much."""
        narrow, wide = trained(*[5.0] * len(rise)), trained(*(5.0 + one for one in rise), outcome=Some(status=status))
        return {"launch": Some(run=lambda *_, name, **__: narrow if name == "rows-384" else wide)}

    small = Some(tokenizer=Some(), train=Some(), model=Some())
    loaded = {"cfg": small, "save_interval": 6, "checkpoints": Some(at=gives(Some(path="")))} | rows(0.28, 0.27)
    yield "check-rows", loaded, [rows(0.28, 0.27, status="failed"), rows(0.0, 0.0), rows(0.28, 0.01)]

    def stopped(rate, warmup):
        """`launch`, where another peak rate and another warmup stop with these words."""

        def run(cfg, **_):
            raise Failed(warmup if hasattr(cfg.scheduler, "lr_warmup_iters") else "", exception=rate)

        return {"launch": Some(run=run, RunFailed=Failed)}

    strict = Some(scheduler=Some(override_opt_param_scheduler=False))
    changed = {
        "cfg": Some(optimizer=Some(), scheduler=Some()), "learning_rate": 1e-3, "saved": Some(path=""),
        "recipe": Some(scheduler=Some(override_opt_param_scheduler=True)),
        **stopped("KeyError", "for warmup iterations do not match"),
    }  # fmt: skip
    yield "check-changed", changed, [stopped("RuntimeError", ""), {"recipe": strict}]


def lesson_11():
    """Facts of lesson 11."""
    ways = pd.DataFrame({"largest value": [2.0], "by hand": [1e-6], "Megatron Core": [1e-6]})
    here = {"stack": Some(device=gives("cpu"))}
    yield (
        "hand-check",
        {"differences": ways, "tolerance": 1e-5} | here,
        [{"differences": ways.assign(**{"by hand": 0.1})}],
    )
    found = pd.DataFrame({"group": ["tp", "dp-cp"], "count": [42, 1], "bytes": [8, 9]})
    yield "check-count", {"found": found, "operations": 42, "expected_layers": 4}, [{"operations": 52}]
    form = {"run": 0, "collectives": Some(compare=gives(table())), "on_cpu": True}
    yield "check-form", form, [{"collectives": Some(compare=lambda run, rank: table(rank != 7))}]
    both = {
        name: pd.DataFrame({"bytes": [5], "sent": [s]}) for name, s in (("all-reduce", 4), ("sequence parallel", 5))
    }
    by_group = lambda rows: sent(tp=rows.sent.sum())  # noqa: E731
    halves = {
        "both": both, "stream_bytes": 5, "run": trained(1.0), "run_sp": trained(1.0), "on_cpu": True, "runs": runs,
        "collectives": Some(compare=gives(table())), "messages": Some(by_group=by_group),
    }  # fmt: skip
    yield (
        "sp-check",
        halves,
        [
            {"both": both | {"all-reduce": both["sequence parallel"]}},
            {"run_sp": trained(1.1)},
            {"collectives": Some(compare=gives(table(False)))},
        ],
    )


def lesson_12():
    """Facts of lesson 12."""
    ways = pd.DataFrame({"largest difference": [0.0, 1e-8]})
    hand = {
        "by_hand": Some(data_parallel_step=lesson_12, sharded_step=lesson_12, compare_data_parallel=gives(ways)),
        "stack": Some(device=gives("cpu")), "tolerance": 1e-6,
    }  # fmt: skip
    yield "hand-check", hand, [{"tolerance": 1e-9}]

    def held(ranks, whole=12.0, share=1.0):
        return pd.DataFrame({"bytes per parameter": {"optimizer": whole, "distributed optimizer": share * 12 / ranks}})

    state = {
        "state_bytes": 12, "by_hand": Some(optimizer_bytes=lambda ranks: held(ranks)),
        "recipes": Some(offline=contextlib.nullcontext), "closed_forms": Some(parameter_count=gives(8e9)),
        "llama3_8b_pretrain_config": lambda: Some(model=0, tokenizer=Some()),
    }  # fmt: skip
    unsharded = Some(optimizer_bytes=lambda ranks: held(ranks, 8.0, ranks))
    yield "state-check", state, [{"by_hand": unsharded}]
    moved = {
        "plain": pd.DataFrame({"bytes": [400], "sent": [8]}),
        "sharded": pd.DataFrame({"bytes": [400], "sent": [8]}),
    }
    data = {
        "closed_forms": Some(parameter_count=gives(100)), "cfg": Some(model=0), "run": trained(1.0, rows="sharded"), "runs": runs,
        "run_plain": trained(1.0, rows="plain"),
        "collectives": Some(recorded=lambda run: moved[run.rows]),
        "messages": Some(by_group=lambda rows: sent(dp_cp=rows.sent.sum())),
    }  # fmt: skip
    twice = Some(by_group=lambda rows: sent(dp_cp=1 + (rows is moved["plain"])))
    wrong = [{"closed_forms": Some(parameter_count=gives(99))}, {"run": trained(2.0, rows="sharded")}]
    yield "check-data", data, [*wrong, {"messages": twice}]

    def stages(order=lambda m: 1 / (m + 1), busy=lambda m: 1 / (m + 1) + 0.05):
        """`pipeline`, where `order` and `busy` say how long is waited for m passes by order and with real times."""
        return Some(
            idle_share=lambda share: share,
            replay=lambda m, equal_stages=False: (order if equal_stages else busy)(m),
            passes=lambda run: run.passes,
            bubble_share=lambda stages, microbatches, chunks=1: 1 / (chunks * microbatches + 1),
        )

    piped = {
        "pipelines": {m: Some(passes=m) for m in (2, 8)}, "microbatches": 8, "pipeline": stages(), "on_cpu": True,
    }  # fmt: skip
    longer, rising = stages(order=lambda m: 2 / (m + 2)), stages(busy=lambda m: m / 20)
    yield "check-pipeline", piped, [{"pipeline": longer}, {"pipeline": rising}]
    ordered = pipeline.one_forward_one_backward(2, 8)

    def recorded(rows):
        """`pipeline`, for a run with these passes."""
        return Some(
            passes=gives(rows), replay=gives(rows), idle_share=gives(0.1),
            one_forward_one_backward=pipeline.one_forward_one_backward,
        )  # fmt: skip

    sent_by = {
        "pipelines": {8: 0}, "microbatches": 8, "on_cpu": True, "collectives": Some(compare=gives(table())),
        "pipeline": recorded(ordered), "plots": plots, "parallelism": Some(schedule=gives(0)),
    }  # fmt: skip
    late = ordered.assign(microbatch=ordered.microbatch.to_numpy()[::-1])
    yield "check-stages", sent_by, [{"collectives": Some(compare=gives(table(False)))}, {"pipeline": recorded(late)}]

    def transfers(count, passes):
        return Some(collectives=pd.DataFrame({"operation": ["send"] * count + ["recv"]}), passes=passes)

    woven = {
        "interleaved": transfers(6, 16), "pipelines": {8: transfers(2, 8)}, "microbatches": 8, "by_order": 1 / 9,
        "many": 0.16, "pipeline": stages(),
    }  # fmt: skip
    yield "check-interleave", woven, [
        {"pipeline": longer}, {"by_order": 1 / 20}, {"interleaved": transfers(2, 16)},
    ]  # fmt: skip
    gathers = pd.DataFrame({"group": ["cp"], "operation": ["all_gather"], "bytes": [8 * 2 * 4 * 16 * 4]})
    shared = {
        "cfg": Some(model=Some(seq_length=8, num_query_groups=4, kv_channels=16), train=Some(micro_batch_size=2)),
        "run": trained(1.0), "run_cp": trained(1.0), "runs": runs,
        "collectives": Some(recorded=gives(gathers), compare=gives(table())),
    }  # fmt: skip
    unlike = Some(recorded=gives(gathers.assign(bytes=1)), compare=gives(table(False)))
    yield "check-context", shared, [{"collectives": unlike}, {"run_cp": trained(1.1)}]

    def plan(rows):
        """`messages`, where a plan sends these rows."""
        return {"messages": Some(expected=gives(0), by_group=gives(rows))}

    cfg_8b = Some(model=Some(cross_entropy_fusion_impl=""), train=Some())
    node = plan(sent(tp=100.0, dp_cp=10.0, pp=1.0)) | {"cfg_8b": cfg_8b, "sent": sent(tp=9.0, dp_cp=3.0)}
    even = sent(tp=100.0, dp_cp=50.0, pp=50.0)
    yield "check-node", node, [{"sent": sent(tp=1.0, dp_cp=3.0)}, plan(even.assign(operations=1))]


CELLS = {
    f"{number}:{cell}": (number, cell, facts, wrong)
    for number, made in (("07", lesson_07), ("10", lesson_10), ("11", lesson_11), ("12", lesson_12))
    for cell, facts, wrong in made()
}


@pytest.mark.parametrize("name", CELLS)
def test_each_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """With right facts all claims of the cell hold; for each claim one of the wrong facts makes it fail."""
    falsify(*CELLS[name])


def test_no_check_cell_is_left_out():
    """Every check cell of these lessons stands in the table above."""
    for number in ("07", "10", "11", "12"):
        assert {f"{number}:{cell}" for cell in tagged(number, "check")} <= CELLS.keys()
