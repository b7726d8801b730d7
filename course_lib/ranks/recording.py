"""In a rank: write down the numbers of each step; and, if asked, every message, and when work was done.

Every function of `torch.distributed` ends in a method of `ProcessGroup`, under whatever name a library imported it.  So
the recorder wraps those methods and nothing else, and works with gloo and NCCL alike.  A run that does not ask for it
runs upstream's code untouched.

Times are the process's own: on a GPU they say when work was launched, not when the GPU did it.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common import files
from course_lib.stack.patches import Patches, applied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron.bridge.training.callbacks import CallbackContext

    from course_lib.runs.writer import Writer

GROUPS = (
    ("tp", "_TENSOR_MODEL_PARALLEL_GROUP"),
    ("pp", "_PIPELINE_MODEL_PARALLEL_GROUP"),
    ("cp", "_CONTEXT_PARALLEL_GROUP"),
    ("dp", "_DATA_PARALLEL_GROUP"),
    ("dp-cp", "_DATA_PARALLEL_GROUP_WITH_CP"),
    ("dp-cp", "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"),
    ("embedding", "_EMBEDDING_GROUP"),
    ("embedding", "_POSITION_EMBEDDING_GROUP"),
    ("tp-pp", "_MODEL_PARALLEL_GROUP"),
    ("tp-cp", "_TENSOR_AND_CONTEXT_PARALLEL_GROUP"),
    ("tp-dp", "_TENSOR_AND_DATA_PARALLEL_GROUP"),
    ("tp-dp-cp", "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"),
    ("ep", "_EXPERT_MODEL_PARALLEL_GROUP"),
    ("expert-tp", "_EXPERT_TENSOR_PARALLEL_GROUP"),
    ("expert-tp-ep", "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"),
    ("expert-dp", "_EXPERT_DATA_PARALLEL_GROUP"),
    ("expert-dp", "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP"),
    ("optimizer", "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"),
)
"""Kinds of groups and the variables of `megatron.core.parallel_state` that hold them.

Source: megatron-core parallel_state.py @ 0.19.2
"""


def _first(arguments: tuple) -> list[list]:
    return [[tensor] for tensor in arguments[0]]


def _parts_out(arguments: tuple) -> list[list]:
    return list(arguments[0])


def _parts_in(arguments: tuple) -> list[list]:
    return list(arguments[1])


def _out(arguments: tuple) -> list[list]:
    return [[arguments[0]]]


def _in(arguments: tuple) -> list[list]:
    return [[arguments[1]]]


def _many_in(arguments: tuple) -> list[list]:
    return [[tensor] for tensor in arguments[1]]


METHODS: dict[str, tuple[str, Callable[[tuple], list[list]]]] = {
    "allreduce": ("all_reduce", _first),
    "allreduce_coalesced": ("all_reduce", _first),
    "broadcast": ("broadcast", _first),
    "reduce": ("reduce", _first),
    "allgather": ("all_gather", _parts_out),
    "all_gather_single": ("all_gather", _out),
    "_allgather_base": ("all_gather", _out),
    "all_gather_single_coalesced": ("all_gather", _first),
    "allgather_into_tensor_coalesced": ("all_gather", _first),
    "reduce_scatter": ("reduce_scatter", _parts_in),
    "reduce_scatter_single": ("reduce_scatter", _in),
    "_reduce_scatter_base": ("reduce_scatter", _in),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _many_in),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _many_in),
    "alltoall": ("all_to_all", lambda arguments: [arguments[1]]),
    "all_to_all_single": ("all_to_all", _in),
    "alltoall_base": ("all_to_all", _in),
    "gather": ("gather", _many_in),
    "scatter": ("scatter", _first),
    "send": ("send", _first),
    "recv": ("recv", _first),
    "barrier": ("barrier", lambda arguments: [[]]),
}
"""Methods of `torch.distributed.ProcessGroup`: the operation's name, and which tensors are the whole that it moves.

The whole is what all ranks of the group hold together afterwards or before: the output of a gather, the input of a
scatter, the tensor of an all-reduce.
"""


class Recorder:
    """What one rank sends, and when it computes.

    Attributes:
        path: The run directory; `collectives.jsonl` and `timeline.jsonl` are appended there after each step.
        step: The step under way; `None` between steps, when nothing is recorded.
        phase: `"forward"`, `"backward"`, or `"update"` for the rest of a step.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.step: int | None = None
        self.phase = "update"
        self.sent: list[tuple] = []
        self.worked: list[tuple] = []
        self.kinds: dict[str, str] = {}
        self.groups: dict[int, tuple[Any, str, int]] = {}
        self.callers: dict[Any, str | None] = {}
        self.texts: dict[tuple, str] = {}
        self.directions: dict[int, str] = {}
        self.microbatches: dict[int, tuple[int, int]] = {}
        self.chunks: dict[int, int] = {}
        self.modules: dict[int, str] = {}
        self.stack: list[str] = []
        self.undo = ExitStack()

    # ------------------------------------------------------------------------------------------------- what is called

    def install(self, *, megatron: bool = True) -> None:
        """Wrap torch's process groups, and Megatron's forward, backward and transfer functions, in this process.

        Args:
            megatron: False for another trainer, which says itself when it is in a forward pass.
        """
        import torch

        mine, group = Patches(), torch.distributed.ProcessGroup
        why = "recording"
        for name, (operation, whole) in METHODS.items():
            if hasattr(group, name):
                noted = functools.partial(self._noted, operation=operation, whole=whole)
                mine.makes(f"torch.distributed.ProcessGroup.{name}", why=why)(noted)
        if megatron:
            pipeline = "megatron.core.pipeline_parallel"
            mine.makes(f"{pipeline}.schedules.forward_step", why=why)(self._timed_forward)
            mine.makes(f"{pipeline}.schedules.backward_step", why=why)(self._timed_backward)
            for name in ("_batched_p2p_ops", "_p2p_ops"):
                mine.makes(f"{pipeline}.p2p_communication.{name}", why=why)(self._with_directions)
        else:
            mine.makes("torch.Tensor.backward", why=why)(self._marked_backward)
        self.undo.enter_context(applied(mine))
        self._node = torch._C._current_autograd_node

    def remove(self) -> None:
        """Put back what `install` and `know` changed."""
        self.undo.close()

    def _noted(self, original: Callable, operation: str, whole: Callable[[tuple], list[list]]) -> Callable:
        @functools.wraps(original)
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            if self.step is not None:
                known = self.groups.get(id(group)) or self._group(group)
                if known[2] > 1:
                    self._note(known, operation, whole(args), args)
            return original(group, *args, **kwargs)

        return method

    def _group(self, group: Any) -> tuple[Any, str, int]:
        """A group with its name and size; kept, so that no other gets its id."""
        known = self.groups[id(group)] = (group, group.group_name, group.size())
        return known

    def _note(self, known: tuple[Any, str, int], operation: str, messages: list[list], args: tuple) -> None:
        """Remember one call.  This is on the path of every message: what can wait is done in `write`."""
        now = time.time()
        phase, peer = self.phase, None
        if operation in ("send", "recv"):
            peer = args[1]
            phase = self.directions.get(id(messages[0][0]), phase)
        node = self._node()
        module = (self.stack[-1] if self.stack else "") if node is None else node.metadata.get("module", "")
        caller = self._caller(sys._getframe(2))
        for tensors in messages:
            size_bytes, dtype = 0, None
            for tensor in tensors:
                size_bytes += tensor.nbytes
                dtype = tensor.dtype
            self.sent.append((now, (phase, operation, known, dtype, size_bytes, peer, module, caller)))

    def _caller(self, frame: Any) -> str:
        """The function outside torch and this course that asked for the operation, as `module.function`."""
        callers = self.callers
        while frame is not None:
            code = frame.f_code
            if code not in callers:
                module = frame.f_globals.get("__name__", "")
                own = module.startswith(("torch.", "course_lib.", "contextlib", "typing_extensions"))
                callers[code] = None if own else f"{module}.{code.co_qualname}"
            if (name := callers[code]) is not None:
                return name
            frame = frame.f_back
        return ""

    def _with_directions(self, original: Callable) -> Callable:
        """Activations travel to the next stage and gradients to the previous one, also where both are the same rank."""

        @functools.wraps(original)
        def transfer(**kwargs: Any) -> Any:
            forward = (kwargs["tensor_send_next"], kwargs["tensor_recv_prev"])
            backward = (kwargs["tensor_send_prev"], kwargs["tensor_recv_next"])
            self.directions = {id(t): "forward" for t in forward if t is not None}
            self.directions |= {id(t): "backward" for t in backward if t is not None}
            return original(**kwargs)

        return transfer

    # -------------------------------------------------------------------------------------------------- when work is done

    def _timed_forward(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def forward_step(forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.step is None:
                return original(forward_step_func, data_iterator, model, *args, **kwargs)
            chunk = self.chunks.get(id(model), 0)
            microbatch = kwargs.get("current_microbatch") or 0
            with self._working("forward", microbatch, chunk):
                output, tokens = original(forward_step_func, data_iterator, model, *args, **kwargs)
            self.microbatches[id(output)] = (microbatch, chunk)
            return output, tokens

        return forward_step

    def _timed_backward(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def backward_step(input_tensor: Any, output_tensor: Any, *args: Any) -> Any:
            microbatch, chunk = self.microbatches.pop(id(output_tensor), (0, 0))
            with self._working("backward", microbatch, chunk):
                return original(input_tensor, output_tensor, *args)

        return backward_step

    def _marked_backward(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def backward(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, "backward"
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self.phase = before

        return backward

    @contextmanager
    def _working(self, kind: str, microbatch: int, chunk: int) -> Iterator[None]:
        self.phase = kind
        begin, busy = time.time(), time.thread_time()
        yield
        self.worked.append((kind, microbatch, chunk, begin, time.time(), time.thread_time() - busy))
        self.phase = "update"

    # ----------------------------------------------------------------------------------------------------- names of things

    def know(self, model: list) -> None:
        """Learn the names of groups and modules, once the model is built."""
        import torch
        from megatron.core import parallel_state

        for kind, variable in reversed(GROUPS):
            groups = getattr(parallel_state, variable, None)
            for group in groups if isinstance(groups, list) else [groups]:
                if isinstance(group, torch.distributed.ProcessGroup):
                    self.kinds[group.group_name] = kind
        self.kinds[torch.distributed.group.WORLD.group_name] = "world"
        for number, chunk in enumerate(model):
            self.chunks[id(chunk)] = number
            for name, module in chunk.named_modules():
                if _sends(module):
                    self.modules[id(module)] = ".".join(part for part in name.split(".") if part != "module")
                    hooks = module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)
                    for hook in hooks:
                        self.undo.callback(hook.remove)

    def _enter(self, module: Any, _: Any) -> None:
        self.stack.append(self.modules[id(module)])

    def _leave(self, module: Any, _: Any, output: Any) -> None:
        """Mark the graph node of a module's output, so that its backward can be told apart."""
        name = self.stack.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        node = getattr(first, "grad_fn", None)
        if node is not None:
            node.metadata.setdefault("module", name)

    # ------------------------------------------------------------------------------------------------------------- writing

    def write(self) -> None:
        """Append the step's rows; one call each, so that ranks do not cut each other's lines."""
        head = f'{{"rank": {self.rank}, "step": {self.step}, '
        texts = self.texts
        rows = [f'{head}"time": {now!r}, {texts.get(what) or self._text(what)}}}' for now, what in self.sent]
        files.append_lines(self.path / "collectives.jsonl", rows)
        columns = "kind microbatch chunk begin end busy_seconds".split()
        common = {"rank": self.rank, "step": self.step}
        rows = [json.dumps(common | dict(zip(columns, row, strict=True))) for row in self.worked]
        files.append_lines(self.path / "timeline.jsonl", rows)
        self.sent.clear()
        self.worked.clear()
        self.microbatches.clear()

    def _text(self, what: tuple) -> str:
        """The part of a line that many calls share, made once: all but rank, step and time."""
        from torch.distributed import get_global_rank

        phase, operation, (group, name, size), dtype, size_bytes, peer, module, caller = what
        row = {
            "phase": phase,
            "operation": operation,
            "group": self.kinds.get(name, name),
            "group_size": size,
            "dtype": str(dtype).removeprefix("torch.") if dtype else "",
            "bytes": size_bytes,
            "peer": None if peer is None else get_global_rank(group, peer),
            "module": module,
            "caller": caller,
        }
        text = self.texts[what] = json.dumps(row)[1:-1]
        return text


def _sends(module: Any) -> bool:
    """True for a module that may send: one with a matrix of its own, or attention that shares a sequence.

    Hooks on all modules would cost more than all the rest of the recorder.
    """
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return True
    return hasattr(module, "scale_mask_softmax") and module.config.context_parallel_size > 1


class Messages:
    """Bridge's events for a `Recorder`."""

    def __init__(self, path: Path, rank: int) -> None:
        self._recorder = Recorder(path, rank)
        self._recorder.install()

    def on_train_start(self, context: CallbackContext) -> None:
        self._recorder.know(context.model)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._recorder.step = context.state.train_state.step + 1

    def on_train_step_end(self, context: CallbackContext) -> None:
        self._recorder.write()
        self._recorder.step = None


# --------------------------------------------------------------------------------------------- the numbers of each step


class Clock:
    """Bridge's events for a writer: when a step begins and ends, and its memory."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def on_data_init_start(self, context: CallbackContext) -> None:
        self._writer.stage("loading data")

    def on_train_start(self, context: CallbackContext) -> None:
        self._writer.begin(context.state.train_state.step)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._writer.begin_step()

    def on_train_step_end(self, context: CallbackContext) -> None:
        if self._writer.leads:
            import torch

            torch.cuda.synchronize()  # a GPU may still be at work; no effect in a CPU rank
        self._writer.end_step(context.state.train_state.step + 1)  # Bridge counts the step after this event


class Metrics:
    """Bridge's events for a writer: losses and tokens; after `Clock` and `Messages`, for it may send a message itself."""

    def __init__(self, writer: Writer, tokens: Tokens) -> None:
        self._writer, self._tokens = writer, tokens

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._tokens.here = None

    def on_train_step_end(self, context: CallbackContext) -> None:
        state = context.state
        full = state.cfg.train.global_batch_size * state.cfg.model.seq_length
        self._writer.metrics(
            state.train_state.step + 1,
            loss=_number((context.loss_dict or {}).get("lm loss")),
            grad_norm=_number(context.grad_norm),
            learning_rate=max((group["lr"] for group in context.optimizer.param_groups if group), default=None),
            tokens=full if self._tokens.here is None else self._tokens.of_all_ranks(context.model),
            skipped=bool(context.skipped_iter),
        )

    def on_eval_end(self, context: CallbackContext) -> None:
        loss = _number((context.total_loss_dict or {}).get("lm loss"))
        self._writer.validation(context.state.train_state.step, loss=loss)


class Tokens:
    """Counts what the batches of a step hold beside padding, in a rank of the last pipeline stage.

    Batches of whole samples say it themselves (`token_count`); a batch without it is full.
    Source: megatron-bridge 0.6.2 `data/datasets/gpt_sft.py`, `data/collators/sft.py`
    """

    def __init__(self) -> None:
        self.here: int | None = None

    def counting(self, forward_step: Callable) -> Callable:
        """Bridge's `forward_step`, which takes its batches from an iterator that counts them."""
        from megatron.core.utils import unwrap_model

        @functools.wraps(forward_step)
        def counted(state: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if data_iterator is not None and getattr(unwrap_model(model), "post_process", True):
                batches = iter(functools.partial(next, data_iterator), self)  # Megatron's own has no __iter__
                data_iterator = map(self._count, batches)
            return forward_step(state, data_iterator, model, *args, **kwargs)

        return counted

    def _count(self, batch: Any) -> Any:
        counts = batch.get("token_count") if isinstance(batch, dict) else None
        if counts is not None:
            self.here = (self.here or 0) + int(sum(counts))
        return batch

    def of_all_ranks(self, model: list) -> int:
        """The sum over the data-parallel ranks, which read different batches."""
        import torch
        from megatron.bridge.training.utils.pg_utils import get_pg_collection

        count = torch.tensor(self.here, device=torch.cuda.current_device())
        torch.distributed.all_reduce(count, group=get_pg_collection(model).dp)
        return int(count)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "numel") and value.numel() == 2:  # Bridge may hand over (sum of losses, number of tokens)
        return float(value[0] / value[1])
    return float(value)
