"""A GPU node without GPUs, for one test process: torchrun forks, CUDA's calls land on the CPU, `pretrain()` is played.

Run as a script it takes every entry of the lessons that starts ranks, and prints what they met as one line of JSON.
Nothing here is `course_lib.ranks.cpu`: that a rank on a GPU never imports it is what the script finds out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

STEPS = 3


class Forked:
    """As much of `subprocess.Popen` as a launcher's process needs."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            try:
                os._exit(work())
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = 0  # what a rank has to say stands in the run directory
        return self.returncode

    def wait(self, seconds: float = 300.0) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("torchrun", seconds)
            time.sleep(0.01)
        return self.returncode


def torchrun(run: object, words: list[str]) -> Forked:
    """What `torchrun.start_process` would do with these words, by forking this process."""
    from course_lib.launch import torchrun
    from course_lib.ranks import train

    assert words[1:3] == ["-m", "torch.distributed.run"] and words[-3:-1] == ["-m", "course_lib.ranks.train"], words
    ranks = int(words[words.index("--nproc-per-node") + 1])

    def rank(number: int) -> int:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= torchrun.settings(run)
        with gpu():
            train.main(words[-1:])
        faked = [name for name in sys.modules if name.startswith("course_lib.ranks.cpu")]
        (Path(words[-1]).parent / "ranks" / f"{number}.faked").write_text(json.dumps(faked))
        return 0

    def agent() -> int:
        return max(process.wait() for process in [Forked(lambda number=n: rank(number)) for n in range(ranks)])

    from course_lib.launch import cluster

    port = cluster.free_port()
    return Forked(agent)


def gpu() -> object:
    """A block in which a CUDA device is the CPU.  `torch.device("cuda")` stays what it is: only torch's functions listen."""
    import torch
    from torch.overrides import TorchFunctionMode

    names = dict.fromkeys(("set_device", "synchronize", "reset_peak_memory_stats", "current_stream"), None)
    names |= {"is_available": True, "current_device": "cuda", "memory_allocated": 0, "max_memory_allocated": 0}
    for name, answer in names.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    meet = torch.distributed.init_process_group

    def over_nccl(backend: str, **options: object) -> None:
        assert backend == "nccl", backend
        meet("gloo", **options)

    torch.distributed.init_process_group = over_nccl

    class OnCpu(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable, _: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if function is torch.Tensor.cuda:
                return args[0]
            if function is torch.Tensor.type and len(args) == 1:
                return "torch.cuda.FloatTensor" if args[0].dtype == torch.float32 else "torch.cuda.BFloat16Tensor"
            kwargs = {name: "cpu" if name == "device" else value for name, value in (kwargs or {}).items()}
            return function(*args, **kwargs)

    torch.nn.Module.cuda = lambda self, *_: self
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed = lambda seed: None
    return OnCpu()


def pretrain(cfg: object, _: object, callbacks: list) -> None:
    """Bridge's loop as the callbacks see it, with a matrix for a model."""
    import torch

    assert cfg.dist.distributed_backend == "nccl" and cfg.mixed_precision == "bf16_mixed", "the recipe's own"
    assert cfg.model.gradient_accumulation_fusion is False, "there is no Apex here"
    if cfg.checkpoint.load:
        assert cfg.checkpoint.load_rng is False, "this checkpoint is from CPU ranks"
    torch.distributed.init_process_group("nccl")
    matrix = type("Matrix", (torch.nn.Linear,), {"buffers": [], "expert_parallel_buffers": []})(8, 8)
    optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.1)
    of_core = types.SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)
    progress = types.SimpleNamespace(step=0)
    context = types.SimpleNamespace(model=[matrix], optimizer=of_core, grad_norm=1.0, skipped_iter=False)
    context.state, context.loss_dict = types.SimpleNamespace(train_state=progress, cfg=cfg), {}

    def tell(event: str) -> None:
        for callback in callbacks:
            if (listener := getattr(callback, event, None)) is not None:
                listener(context)

    tell("on_data_init_start")
    tell("on_train_start")
    for progress.step in range(STEPS):
        tell("on_train_step_start")
        loss = matrix(torch.ones(8)).square().sum()
        loss.backward()
        optimizer.step()
        context.loss_dict = {"lm loss": loss.detach()}
        tell("on_train_step_end")
    context.total_loss_dict = context.loss_dict
    tell("on_eval_end")
    torch.distributed.barrier()  # nobody leaves while others still connect to it


class _Counting:
    """A model whose next token is the last one plus one."""

    def eval(self) -> _Counting:
        return self

    def __call__(self, window: object, places: object, _: object) -> object:
        import torch

        return torch.nn.functional.one_hot(window + 1, 260).float()


def main(work: Path) -> None:
    """Take every entry, and print what each met."""
    from course_lib import stack

    stack.prepare_imports()
    import torch.distributed.checkpoint
    from megatron.bridge.training import finetune, gpt_step, initialize, model_load_save  # noqa: F401
    from megatron.bridge.training import pretrain as module

    from course_lib import launch, runs
    from course_lib.experiments import by_hand, generate, hello, sweep, tensors
    from course_lib.launch import forkserver
    from course_lib.launch import torchrun as starter
    from course_lib.text import tokenizers
    from support import small

    os.environ |= {"COURSE_DEVICE": "cuda", "COURSE_RUNS": str(work / "runs")}
    stack.missing_modules = lambda: []  # as on a node where the extra `gpu` is installed
    module.pretrain = pretrain
    model_load_save.load_model_config = lambda path: (small.config().model, None)
    model_load_save.load_megatron_model = lambda path, **options: [_Counting()] if not options["use_cpu_init"] else None
    model_load_save.temporary_distributed_context = lambda backend: nullcontext({"nccl": None}[backend])
    directories = []
    starter.start_process = lambda run, words: directories.append(run.path) or torchrun(run, words)
    forkserver.lease = None  # whoever asks for the fork server fails
    launch.shutil = types.SimpleNamespace(rmtree=lambda path: None)  # calls clear up; here they are looked at

    met = {}
    launch.warm_up()
    greeted = hello.ranks(8)
    met["hello"] = [greeted["sum"].tolist(), bool(greeted.cuda.all())]
    table = by_hand.compare_tensor_parallel(ranks=2, hidden_size=16, ffn_hidden_size=32)
    met["tensor parallel"] = float(table[["by hand", "Megatron Core"]].max(axis=None))
    met["data parallel"] = float(by_hand.compare_data_parallel(ranks=2, features=16)["largest difference"].max())
    met["optimizer"] = by_hand.optimizer_bytes(ranks=2)["bytes per parameter"].tolist()
    cfg = small.config(tp=2, train_iters=STEPS)
    cfg.model.gradient_accumulation_fusion = True  # as Transformer Engine's presence sets it
    met["differences"] = list(launch.differences(cfg).index)
    met["run"] = len(launch.run(cfg, ranks=8, name="plain", show=None).metrics)
    held = launch.run(cfg, ranks=2, name="held", show=None, target=tensors.TARGET)
    met["tensors"] = tensors.read(held).weights_bytes.tolist()
    met["leak"] = len(
        launch.run(cfg, ranks=4, name="leak", show=None, target="course_lib.experiments.faults:rank_main").metrics
    )
    recorded = launch.run(cfg, ranks=2, name="record", show=None, record=True)
    met["record"] = recorded.launch["record"]
    met["sweep"] = [len(run.metrics) for run in sweep.repeat(cfg, seeds=[1, 2], name="sweep", ranks=2)]

    tokenizers.train_bpe(["one two three"] * 9, work / "tokenizer", vocab_size=260)
    cfg.tokenizer.tokenizer_model = str(work / "tokenizer")
    trained = launch.run(cfg, ranks=2, name="trained", show=None)
    step = trained.path / "checkpoints" / "iter_0000003"
    torch.distributed.checkpoint.save({"weight": torch.zeros(1)}, checkpoint_id=step, no_dist=True)
    torch.save({}, step / "train_state.pt")
    (step / "metadata.json").write_text("{}")
    shutil.copyfile(trained.path / "config.yaml", step / "run_config.yaml")
    (step.parent / "latest_checkpointed_iteration.txt").write_text("3")
    met["generate"] = generate.texts(trained, ["one"], max_new_tokens=3, temperature=0)

    about = json.loads((trained.path / "launch.json").read_text())
    runs.write_json(trained.path / "launch.json", about | {"device": "cpu"})  # had CPU ranks saved it
    import warnings

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resumed = launch.run(cfg, ranks=2, name="resumed", show=None, load=trained)
    met["resumed"] = (
        [str(w.message) for w in warned if "load_rng" in str(w.message)],
        resumed.config["checkpoint"]["load_rng"],
    )

    faked = {path.name: [json.loads(f.read_text()) for f in (path / "ranks").glob("*.faked")] for path in directories}
    met["directories"] = [len(directories), sum(map(len, faked.values()))]
    met["faked"] = {name: found for name, found in faked.items() if any(found)}
    met["faked in the kernel"] = [name for name in sys.modules if name.startswith("course_lib.ranks.cpu")]
    for path in directories:
        shutil.rmtree(path)
    print(json.dumps(met))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
