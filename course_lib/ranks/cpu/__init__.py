"""CUDA-shaped calls land on the CPU, in a rank process and nowhere else.

`activate()` is the one entry.  It is never called where the ranks have GPUs, and never in a notebook kernel.
Everything it changes is a `Redirection` with a reason; `table()` lists them all.
"""

from __future__ import annotations

from course_lib.stack.redirection import Misfit, Redirection

__all__ = ["Misfit", "Redirection", "Refused", "activate", "active", "table"]


class Refused(RuntimeError):
    """The redirection does not start in this process."""


def active() -> bool:
    """True once `activate()` has run in this process."""
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and getattr(torch.cuda.is_available, "__course_cpu__", False)


def redirections() -> list[Redirection]:
    """Every redirection: torch first, then Megatron, then what only saves time."""
    from course_lib.ranks.cpu import device, fast, fused, megatron, shards

    return [
        *device.redirections(),
        *megatron.redirections(),
        *fast.redirections(),
        *fused.redirections(),
        *shards.redirections(),
    ]


def table() -> list[dict[str, str]]:
    """All redirections as rows `target, becomes, reason`, generated from the code that applies them."""
    return [{"target": r.target, "becomes": r.becomes, "reason": r.reason} for r in redirections()]


def activate(*, allow_untested: bool = False) -> None:
    """Make CUDA-shaped calls land on the CPU in this process; calling it again changes nothing.

    Args:
        allow_untested: Go on although other versions are installed than the tested ones.

    Raises:
        Refused: In a notebook kernel, or if versions differ from `stack.TESTED` and `allow_untested` is false.
        Misfit: If upstream moved and a redirection no longer fits; names each one.
    """
    import os
    import sys

    from course_lib import stack
    from course_lib.stack import redirection

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
    stack.hide_gpu_packages()
    stack.prepare_imports()
    import torch

    redirection.apply(redirections())
    torch.cuda.is_available.__course_cpu__ = True
