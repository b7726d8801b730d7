"""Text from a trained model: a rank continues prompts with the last checkpoint of a run."""

from __future__ import annotations

import os
import types
from collections.abc import Sequence
from pathlib import Path

from course_lib import launch, runs, stack
from course_lib.runs import checkpoints

__all__ = ["rank", "texts"]


def texts(
    run: runs.Run,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.7,
    seed: int = 1234,
    wait_seconds: float = 300.0,
) -> list[str]:
    """Continue prompts with the run's last checkpoint, on one rank.

    The checkpoint may come from any layout: Megatron reshards it to TP=1 while loading.

    Args:
        run: A run that was launched with `save=True` and a Hugging Face tokenizer.
        temperature: Below 1 is more cautious; 0 always takes the likeliest token.

    Returns:
        Prompt and continuation, one text for each prompt.

    Raises:
        NoCheckpoint: If the run has no checkpoint.
        WrongCheckpoint: If it is torn, or reading it could run code.
        RunFailed: If the rank fails; names the cause.
    """
    request = {
        "run": str(run.path),
        "checkpoint": str(checkpoints.require(run).path),
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    # What CPU ranks trained is read where no GPU is needed for it, and GPU ranks' work on the CPU if there is none here.
    device = "cpu" if run.launch.get("device") == "cpu" else stack.device(1)
    (continued,) = launch.call(
        "course_lib.experiments.generate:rank", request, ranks=1, device=device, limit_seconds=wait_seconds
    )
    return continued


def rank(request: dict) -> list[str]:
    """What the one rank does: load the checkpoint at TP=1, and sample."""
    import torch
    from megatron.bridge.training.model_load_save import (
        load_megatron_model,
        load_model_config,
        temporary_distributed_context,
    )

    from course_lib.stack import devices
    from course_lib.text import tokenizers

    run, device = runs.Run(Path(request["run"])), stack.device(1)
    tokenizer = tokenizers.load(Path(run.config["tokenizer"]["tokenizer_model"]))
    length = run.config["dataset"]["seq_length"]
    end = tokenizers.end_of_document(tokenizer)
    generator = torch.Generator().manual_seed(request["seed"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    saved = types.SimpleNamespace(model=load_model_config(request["checkpoint"])[0])
    fields = {row.field.removeprefix("model."): row.in_ranks for row in devices.differences(saved, device)}
    with temporary_distributed_context(backend="nccl" if device == "cuda" else "gloo"):
        model = load_megatron_model(
            request["checkpoint"], use_cpu_init=device == "cpu", skip_temp_dist_context=True, mp_overrides=fields
        )
        model = (model[0] if isinstance(model, list) else model).eval()
        texts = []
        for prompt in request["prompts"]:
            ids = tokenizer.encode(prompt).ids
            for _ in range(request["max_new_tokens"]):
                window = torch.tensor([ids[-length:]], device="cuda")
                places = torch.arange(window.shape[1], device="cuda")[None]
                with torch.no_grad():
                    logits = model(window, places, None)[0, -1, : tokenizer.get_vocab_size()]
                ids.append(_sample(logits.float().cpu(), request["temperature"], generator))
                if ids[-1] == end:
                    break
            texts.append(tokenizer.decode(ids))
    return texts


def _sample(logits: object, temperature: float, generator: object) -> int:
    import torch

    if temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator))
