"""CUDA-shaped calls land on the CPU, in rank processes and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from course_lib import runs
from course_lib.common.project import PROJECT
from course_lib.ranks import cpu
from course_lib.stack import patches


def python(code: str, **environment: str) -> str:
    """Run code in a fresh process and return what it printed; it fails if the code raises."""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


# ------------------------------------------------------------------------------------------- where it may be active


def test_every_patch_says_what_and_why():
    """The generated table has a row for each patch, with an effect and a reason, and no target stands there twice."""
    rows = cpu.table()
    assert len({row["target"] for row in rows}) == len(rows) > 180
    for row in rows:
        assert row["becomes"] and len(row["why"]) > 5, row
    assert not cpu.active(), "looking at the table must change nothing"


def test_it_refuses_untested_versions_unless_told_otherwise():
    """Other versions than the tested ones stop it before anything is touched; allow_untested goes on."""
    code = """
from course_lib import stack
from course_lib.ranks import cpu
stack.TESTED["torch"] = "1.0.0"
try:
    cpu.activate()
except cpu.Refused as refused:
    print(refused)
import sys
print("torch" in sys.modules)
stack.prepare_imports = lambda: None
cpu.patches = lambda **_: []
cpu.activate(allow_untested=True)
print(cpu.active())
"""
    *message, touched, active = python(code).split("\n")[:-1]
    assert "(tested: 1.0.0)" in message[0] and "COURSE_ALLOW_UNTESTED=1" in message[0]
    assert (touched, active) == ("False", "True")


def test_it_refuses_a_notebook_kernel():
    """A kernel is recognised by ipykernel's own module, before torch is imported."""
    code = """
import sys
import ipykernel.kernelapp
from course_lib import runs
from course_lib.ranks import cpu
try:
    cpu.activate()
except cpu.Refused as refused:
    print(refused)
print("torch" in sys.modules)
"""
    message, touched = python(code).splitlines()
    assert "notebook kernel" in message and "launch.run()" in message
    assert touched == "False"


def test_a_gpu_rank_imports_what_is_missing_and_keeps_the_compiler(bridge, tmp_path):
    """Without Transformer Engine's neighbours a GPU rank reaches pretrain() by itself: no redirection, the real compiler."""
    from support import small

    for part in ("logs", "ranks"):
        (tmp_path / part).mkdir()
    small.config(tp=1, model__transformer_impl="local").to_yaml(str(tmp_path / "config.yaml"))
    runs.write_json(tmp_path / "launch.json", {"device": "cuda", "target": "support.drills:reaches_pretrain"})
    places = f"{PROJECT / 'tests'}{os.pathsep}{PROJECT}"
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "TORCHDYNAMO_DISABLE": "",  # it is set in this process
        "COURSE_ALLOW_UNTESTED": "1",
        "COURSE_TARGET": "support.drills:reaches_pretrain",
    }
    python(f"from course_lib.ranks import train; train.start({str(tmp_path)!r})", **ranks, PYTHONPATH=places)
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "cpu: []" in log and "redirected: False builtin_function_or_method" in log
    assert "helpers: None" in log
    assert "compiler: torch None" in log


def test_the_real_meter_of_a_gpu_run_needs_no_redirection():
    """Importing what a rank imports on a GPU node does not import course_lib.ranks.cpu."""
    code = """
import sys
from course_lib import launch, runs, stack
from course_lib.launch import forkserver
from course_lib.planning import layout
from course_lib.ranks import train
from course_lib.runs import failures, writer
from course_lib.stack import devices
print([name for name in sys.modules if name.startswith("course_lib.ranks.cpu")])
"""
    assert python(code).strip() == "[]"


# --------------------------------------------------------------------------------------------- what calls do then


def test_is_cuda_knows_every_way_to_name_a_gpu():
    """Strings, numbers and torch.device name GPUs; None, booleans, cpu and meta do not."""
    import torch

    from course_lib.ranks.cpu import cuda

    assert all(map(cuda.is_cuda, ("cuda", "cuda:3", 0, 7, torch.device("cuda"), torch.device("cuda", 1))))
    assert not any(map(cuda.is_cuda, (None, True, False, "cpu", "meta", torch.device("cpu"), torch.float32)))


def test_every_device_constructor_of_torch_is_redirected():
    """Torch itself lists the functions that make tensors on a device; none may be forgotten when torch moves."""
    import torch
    from torch.utils._device import _device_constructors

    from course_lib.ranks.cpu import cuda, rng

    # `__wrapped__`: torch keeps the first list, and transformers replaces a function of it while it makes a model
    targets = {patch.target for patch in (*cuda.PATCHES, *rng.PATCHES) if patch.target.startswith("torch.")}
    reached = {getattr(*patches.locate(t)) for t in targets if not t.startswith("torch.cuda.")}
    missing = [f.__name__ for f in _device_constructors.__wrapped__() if f not in reached]
    assert missing == []
    assert {f"torch.{n}_like" for n in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")} <= targets
    assert {f"torch.Tensor.{n}" for n in dir(torch.Tensor) if n.startswith("new_")} <= targets


def rank_devices(_: str) -> None:
    """Each CUDA-shaped way to make or move a tensor gives one on the CPU."""
    import torch

    assert cpu.active() and torch.cuda.is_available() and torch.cuda.current_device() == 0
    x = torch.ones(2, 2)
    made = [
        *(torch.zeros(2, device=d) for d in ("cuda", "cuda:5", 0, torch.device("cuda"), torch.device("cuda", 1))),
        torch.empty_like(x, device="cuda"),
        torch.rand(2, device="cuda", pin_memory=True),
        torch.hann_window(4, device="cuda"),
        torch.fft.fftfreq(4, device="cuda"),
        x.new_zeros(2, device="cuda"),
        x.to("cuda"),
        x.to(0),
        x.to(device=torch.device("cuda"), dtype=torch.float64),
        x.cuda(non_blocking=True),
        x.pin_memory(),
        torch.cuda.FloatTensor([1.0, 2.0]),
        torch.nn.Linear(2, 2, device="cuda").to("cuda").cuda().weight,
        torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight,
    ]
    with torch.device("cuda"):
        made += [torch.empty(2), torch.nn.Linear(2, 2).weight]
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()), torch.cuda.nvtx.range("step"):
        made.append(torch.tensor([1], device="cuda"))
    assert {t.device.type for t in made} == {"cpu"}
    snapshot = (later := torch.zeros(2)).cpu()
    later += 1
    assert snapshot.tolist() == [0, 0]
    for moved in (torch.arange(3).expand(2, 3).cuda(), torch.arange(3).expand(2, 3).to("cuda:0")):
        moved[1, 0] = 9  # a GPU's copy of a row that stands for many has a place for each
        assert moved.tolist() == [[0, 1, 2], [9, 1, 2]]
    assert x.to("cuda") is x and x.to(torch.float64).dtype == torch.float64
    with torch.device("meta"):  # as Bridge builds a model without memory
        assert torch.empty(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert x.to("meta").device.type == "meta"
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.cuda.LongTensor).dtype == x.type("torch.cuda.LongTensor").dtype == torch.int64
    assert isinstance(x, torch.cuda.FloatTensor) and not isinstance(x, torch.cuda.HalfTensor)
    assert not x.is_cuda, "code decides by this how to treat real memory"
    torch.save({"x": x}, path := f"{_}/saved.pt")
    assert torch.load(path, map_location="cuda")["x"].device.type == "cpu"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert (x @ x).dtype == torch.bfloat16
    with torch.autocast(device_type="cuda", enabled=False):
        assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled()
    assert torch.cuda.current_stream(torch.cuda.Stream().device).device.type == "cpu"
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    end.record(torch.cuda.current_stream())
    assert begin.elapsed_time(end) >= 0 and end.query()
    x.record_stream(torch.cuda.default_stream())
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == torch.cuda.max_memory_allocated() == 0
    assert "allocated_bytes.all.current" not in torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory


def test_cuda_shaped_calls_land_on_the_cpu(in_ranks, tmp_path):
    """In a rank, every way to name CUDA makes CPU tensors, and what is not about CUDA stays as it was."""
    in_ranks(rank_devices, tmp_path)


def rank_random(_: str) -> None:
    """A GPU's machine has two streams."""
    import torch
    from megatron.core.extensions.transformer_engine import TECudaRNGStatesTracker
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed

    def draw() -> torch.Tensor:
        return torch.rand(4)

    torch.manual_seed(5)
    expected = [draw(), draw()]
    torch.manual_seed(5)
    first = draw()
    torch.rand(9, device="cuda")
    torch.nn.functional.dropout(torch.ones(9), 0.5)
    torch.cuda.manual_seed(3)
    torch.cuda.manual_seed_all(4)
    model_parallel_cuda_manual_seed(77, tp_rank=1, ep_rank=0, etp_rank=0)
    assert torch.equal(first, expected[0]) and torch.equal(draw(), expected[1]), "the GPU's stream shifted the CPU's"

    torch.cuda.manual_seed(3)
    a = torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    b = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(b, torch.rand(4, device="cuda")) and not torch.equal(a, b)
    torch.manual_seed(3)  # seeds both, as torch does on a GPU
    assert torch.equal(a, torch.rand(4, device="cuda"))
    generator = torch.Generator("cuda").manual_seed(1)
    assert torch.equal(
        torch.rand(3, device="cuda", generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(1))
    )
    assert isinstance(generator, torch.Generator) and hasattr(torch.Generator, "graphsafe_get_state")

    trackers = [CudaRNGStatesTracker(use_cudagraphable_rng=graph_safe) for graph_safe in (False, True)]
    for tracker in [*trackers, TECudaRNGStatesTracker()]:
        tracker.add("one", 1)
        tracker.add("two", 2)
        torch.manual_seed(5)
        drawn = []
        with tracker.fork("one"):
            drawn.append(torch.empty(4).normal_())  # in place: nothing says CUDA but the fork
            with tracker.fork("two"):
                drawn.append(draw())
            drawn.append(torch.randn(4, device="cuda"))
        with tracker.fork("one"):
            drawn.append(torch.randn(4))
        assert torch.equal(draw(), expected[0]), "a fork shifted the CPU's stream"
        one = torch.Generator().manual_seed(1)
        for sample in (drawn[0], drawn[2], drawn[3]):
            assert torch.equal(sample, torch.randn(4, generator=one)), "a fork's stream does not continue"
        assert torch.equal(drawn[1], torch.rand(4, generator=torch.Generator().manual_seed(2)))


def test_there_are_two_random_streams(in_ranks, tmp_path):
    """What Megatron draws or seeds on a GPU never shifts the CPU's stream, from which weights are initialised."""
    in_ranks(rank_random, tmp_path)


def rank_recompute(_: str) -> None:
    """Selective recomputation, as Nemotron's recipes use it for norms and expert activations."""
    import torch
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    def body(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.nn.functional.silu(x), 0.3)

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(9)
        x = torch.linspace(-2, 2, 64, requires_grad=True)
        weight = torch.linspace(0, 1, 64, requires_grad=True)
        checkpoint = CheckpointWithoutOutput()
        inner = checkpoint.checkpoint(body, x) if recompute else body(x)
        outer = inner * weight
        if recompute:
            checkpoint.discard_output_and_register_recompute(outer)
            assert inner.untyped_storage().nbytes() == 0
        outer.sum().backward()
        gradients.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_selective_recomputation_gives_the_same_gradients(in_ranks, tmp_path):
    """Outputs that are discarded and computed again, dropout mask included, change no gradient."""
    in_ranks(rank_recompute, tmp_path)


def rank_rate(_: str) -> None:
    """An optimizer that learns its rate later takes the same step then, and none before."""
    import torch

    for rate in (None, 0.1):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.full((3,), 2.0)
        optimizer = torch.optim.AdamW([weight], lr=None, weight_decay=0.5)
        optimizer.param_groups[0]["lr"] = rate
        if rate is None:
            with pytest.raises(TypeError):
                optimizer.step()
            assert torch.equal(weight, torch.ones(3))
        else:
            optimizer.step()
            torch.testing.assert_close(weight, torch.full((3,), 1 - 0.1 * 0.5 - 0.1))

    both = []
    for made in (True, False):  # Megatron makes moments without a step before it loads a checkpoint
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.full((3,), 2.0)
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if made:
            optimizer.state[weight] = {name: torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.load_state_dict(torch.optim.Optimizer.state_dict(optimizer))
            assert optimizer.state_dict()["state"][0]["step"] == 0
        optimizer.step()
        both.append((weight, *(optimizer.state[weight][name] for name in ("step", "exp_avg", "exp_avg_sq"))))
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_the_scheduler_may_bring_the_learning_rate(in_ranks, tmp_path):
    """Megatron's own configuration has no rate until its scheduler sets it, and states that it makes have no step."""
    in_ranks(rank_rate, tmp_path)


def rank_defaults(_: str) -> None:
    """What a function took as a default before the redirection is redirected, too."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    tensor = ShardedTensor.from_rank_offsets("weight", torch.ones(2))
    tensor.data = None
    tensor.init_data("cuda")
    assert tensor.data.device.type == "cpu" and tensor.data.shape == (2,)

    from megatron.core import parallel_state

    assert not parallel_state.is_initialized()
    first, again = (parallel_state.get_global_memory_buffer().get_tensor((2,), torch.float32, "mpu") for _ in range(2))
    assert first.data_ptr() == again.data_ptr()


def test_a_default_value_is_redirected(in_ranks, tmp_path):
    """A fully parallel load makes its empty tensors with a default that was bound when Megatron was imported."""
    in_ranks(rank_defaults, tmp_path)


def rank_again(_: str) -> None:
    """Calling it again changes nothing, and others may wrap what it put in place."""
    import functools

    import torch

    before = torch.empty, torch.cuda.is_available, torch.Tensor.to
    cpu.activate(allow_untested=True)
    assert before == (torch.empty, torch.cuda.is_available, torch.Tensor.to)
    torch.cuda.is_available = functools.wraps(torch.cuda.is_available)(lambda: True)
    assert cpu.active()


@pytest.mark.parametrize("fields", [{"tp": 2}, {"tp": 2, "model__sequence_parallel": True}, {"tp": 1, "pp": 2}])
def test_a_shared_sequence_trains_as_a_whole_one(bridge, runs_directory, fields):
    """CP=2 beside tensor, sequence and pipeline parallelism: losses and gradient norms of CP=1, wherever the keys are."""
    from course_lib import launch, runs
    from support import small

    few = {"train_iters": 2, "train__global_batch_size": 4}
    whole, shared = (
        launch.run(small.config(**fields, **few, model__context_parallel_size=cp), ranks=4, name=f"cp{cp}", show=None)
        for cp in (1, 2)
    )
    assert shared.launch["layout"]["context_parallel_size"] == 2 and runs.difference(shared, whole) < 1e-5


def test_activating_twice_changes_nothing(in_ranks, tmp_path):
    """The mark survives functools.wraps, so that no wrapper is ever wrapped in itself."""
    in_ranks(rank_again, tmp_path)


def test_the_compiler_still_imports_afterwards():
    """torch._dynamo refuses to import when two torch names are one object; no two patches may share one."""
    code = """
from course_lib import stack
stack.prepare_imports = lambda: []
import torch
from course_lib.ranks import cpu
from course_lib.stack import patches
patches.apply(patch for patch in cpu.patches() if patch.target.startswith("torch."))
import torch._dynamo
import torch._dynamo.trace_rules as rules
rules.get_torch_obj_rule_map()
print(type(torch._dynamo).__name__, "torch._dynamo.eval_frame" in __import__("sys").modules)
"""
    assert python(code, TORCHDYNAMO_DISABLE="1").split() == ["module", "True"]


def test_without_a_patch_the_process_is_untouched(bridge):
    """This process imported Megatron-Bridge with stand-ins only: torch.cuda answers as torch itself does."""
    import torch

    assert not cpu.active()
    assert not hasattr(torch.cuda.is_available, "__wrapped__")
    assert torch.ones(2).type() == "torch.FloatTensor"
