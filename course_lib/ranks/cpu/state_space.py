"""Mamba layers on a CPU rank: Core's `MambaMixer` takes the functions of `course_lib.stack.state_space`."""

from __future__ import annotations

from course_lib.stack import state_space
from course_lib.stack.patches import Patches

PATCHES = Patches()
MIXER = "megatron.core.ssm.mamba_mixer"
NEEDS_CUDA = "mamba-ssm and causal-conv1d need CUDA"

PATCHES.sets(True, f"{MIXER}.HAVE_MAMBA_SSM", why=NEEDS_CUDA, late=MIXER)
for function in (
    state_space.mamba_split_conv1d_scan_combined,
    state_space.mamba_chunk_scan_combined,
    state_space.causal_conv1d_fn,
):
    target = f"{MIXER}.{function.__name__}"
    PATCHES.sets(function, target, becomes="torch's matrix products", why=NEEDS_CUDA, late=MIXER)
PATCHES.sets(
    state_space.GatedRMSNorm,
    f"{MIXER}.ExtendedRMSNorm",
    becomes="torch's operations",
    why="a mock without mamba-ssm",
    late=MIXER,
)
PATCHES.sets(
    None,
    f"{MIXER}.selective_state_update",
    f"{MIXER}.causal_conv1d_update",
    why="Core's own kernels for one token need CUDA; without them it takes its own form in torch",
    late=MIXER,
)


@PATCHES.replaces(
    f"{MIXER}._check_mamba_sequence_packing_support", why="upstream asks for the packages' versions", late=MIXER
)
def check_packing(original, for_inference_not_training=True):
    """Training knows documents packed into a row."""
    return original(for_inference_not_training) if for_inference_not_training else (True, None)
