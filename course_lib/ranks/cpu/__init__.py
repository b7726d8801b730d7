"""CUDA-shaped calls land on the CPU, in a rank process and nowhere else.

`activate()` is the one entry.  It is never called where the ranks have GPUs, and never in a notebook kernel.
Everything it changes is a patch with a reason; `table()` lists them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.stack.patches import Patch

_active = False


class Refused(RuntimeError):
    """CUDA-shaped calls are left as they are in this process."""


def active() -> bool:
    """True once `activate()` has run in this process."""
    return _active


def patches(*, torch_alone: bool = False) -> list[Patch]:
    """Every patch of a CPU rank; or what a rank needs that imports no Megatron: torch's devices and collectives."""
    from course_lib.ranks.cpu import cuda, gloo, mailbox, rng

    parts: tuple[Any, ...] = (cuda, rng, gloo, mailbox)
    if torch_alone:
        return [patch for part in parts for patch in part.PATCHES if patch.target.startswith("torch.")]
    from course_lib.ranks.cpu import attention, kernels, megatron, saving, state_space

    parts += (attention, state_space, kernels, megatron, saving)
    return [patch for part in parts for patch in part.PATCHES]


def table() -> list[dict[str, str]]:
    """All patches as rows `target, becomes, why`, from the code that applies them."""
    return [{"target": patch.target, "becomes": patch.becomes, "why": patch.why} for patch in patches()]


def activate(*, allow_untested: bool = False, torch_alone: bool = False) -> None:
    """Make CUDA-shaped calls land on the CPU in this process; calling it again changes nothing.

    Args:
        allow_untested: Go on although other versions are installed than the tested ones.
        torch_alone: Change torch and nothing else: no stand-ins, which a trainer without Megatron would take for Transformer
            Engine.

    Raises:
        Refused: In a notebook kernel, or if versions differ from `stack.TESTED` and `allow_untested` is false.
        Misfit: If upstream moved and a patch no longer fits; names each one.
    """
    import gc
    import os
    import sys

    from course_lib import stack
    from course_lib.stack import patches as upstream

    global _active

    if "ipykernel.kernelapp" in sys.modules:
        raise Refused(
            "course_lib.ranks.cpu works in rank processes only, and this is a notebook kernel. Use launch.run()."
        )
    if active():
        return
    installed = stack.versions()
    wrong = [f"{n} {installed[n]} (tested: {v})" for n, v in stack.TESTED.items() if installed[n] != v]
    if wrong and not allow_untested:
        raise Refused(
            f"untested versions: {'; '.join(wrong)}. Run `make setup` to get the tested ones, "
            "or set COURSE_ALLOW_UNTESTED=1 and check the results yourself."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there takes no part in it
    if not torch_alone:
        stack.hide_gpu_packages()
        stack.prepare_imports()
    gc.unfreeze()  # default values are looked for in all functions that there are
    upstream.apply(patches(torch_alone=torch_alone))
    _active = True
