"""What lesson 16 has no time to train, as `data/experts_pay.json`: experts against a dense model, at other lengths and sizes.

`python -m book.builder.sparse ROW` trains the pairs of one row of `ROWS`, by its number, in some minutes; rows that were
measured before stay.
"""

from __future__ import annotations

import copy
import datetime
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from course_lib import launch, recipes, runs, stack
from course_lib.common import files
from course_lib.common.project import DATA
from course_lib.experiments import sweep
from course_lib.text import corpus, indexed, tokenizers

FILE = DATA / "experts_pay.json"
SEEDS, RANKS, BATCH, EXPERTS, TOP_K, VOCABULARY = (1, 2, 3), 1, 32, 16, 2, 1024
REFERENCE, LIBRARY = "language reference", "standard library"
HELD_OUT_TOKENS = 65_536
"""At most so many are evaluated."""
ROWS = (
    {"text": REFERENCE, "steps": 30, "length": 64, "hidden": 64},
    {"text": REFERENCE, "steps": 200, "length": 64, "hidden": 64},
    {"text": LIBRARY, "steps": 200, "length": 64, "hidden": 64},
    {"text": LIBRARY, "steps": 800, "length": 64, "hidden": 64},
    {"text": LIBRARY, "steps": 100, "length": 256, "hidden": 64},
    {"text": LIBRARY, "steps": 200, "length": 64, "hidden": 128},
)


def texts(name: str, folder: Path) -> dict[str, Iterable[str]]:
    """Documents to train on and to hold out: the lesson's text, or the Python library's prose and code, which is larger."""
    if name == REFERENCE:
        text = corpus.language_reference()
        return {"train": text.train, "validation": text.validation}
    built = corpus.python_library(folder / "corpus").directory
    lines = {
        part: [line for file in sorted(built.glob(f"*.{part}.jsonl")) for line in file.read_text().splitlines()]
        for part in ("train", "validation")
    }
    return {part: [json.loads(line)["text"] for line in each] for part, each in lines.items()}


def written(name: str) -> dict[str, indexed.Written]:
    """The text as tokens, by a tokenizer of its own."""
    folder = runs.directory() / f"experts-{name.replace(' ', '-')}"
    parts = texts(name, folder)
    tokenizers.train_bpe(parts["train"], folder / "tokenizer", vocab_size=VOCABULARY)
    encoder = tokenizers.load(folder / "tokenizer")
    return {part: indexed.write_texts(each, folder / part, tokenizer=encoder) for part, each in parts.items()}


def pair(row: Mapping[str, Any], text: Mapping[str, indexed.Written]) -> tuple[Any, Any]:
    """The dense and the sparse configuration of a row; those of lesson 16 but for the row's own fields."""
    from megatron.bridge.recipes.qwen import qwen3_30b_a3b_pretrain_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    with recipes.offline():
        cfg = qwen3_30b_a3b_pretrain_config()
    hidden, length = row["hidden"], row["length"]
    shape = {"num_layers": 2, "hidden_size": hidden, "num_attention_heads": 4, "num_query_groups": 2}
    width = {"moe_ffn_hidden_size": hidden, "ffn_hidden_size": hidden * TOP_K, "num_moe_experts": EXPERTS}
    cfg.model.moe_router_topk = TOP_K
    recipes.shrink(cfg, **shape, **width, seq_length=length, vocab_size=VOCABULARY)
    cfg.model.moe_router_score_function, cfg.model.moe_token_dispatcher_type = "sigmoid", "alltoall"
    cfg.model.moe_router_load_balancing_type, cfg.model.moe_aux_loss_coeff = "aux_loss", 1e-2
    cfg.model.expert_model_parallel_size = 1
    tokenizer = str(text["train"].prefix.parent / "tokenizer")
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer)
    cfg.dataset.split = None
    cfg.dataset.blend_per_split = [([str(text[part].prefix)], None) for part in ("train", "validation")] + [None]
    cfg.train.train_iters = row["steps"]
    cfg.train.micro_batch_size, cfg.train.global_batch_size = BATCH // RANKS, BATCH
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters = 4e-3, 0.0, 3
    cfg.scheduler.lr_decay_iters = max(cfg.scheduler.lr_decay_iters, row["steps"])  # beyond it the rate is 0
    cfg.validation.eval_interval = row["steps"] + 1
    cfg.validation.eval_iters = min(text["validation"].tokens, HELD_OUT_TOKENS) // (BATCH * length)
    cfg.logger.log_interval = 10
    dense = copy.deepcopy(cfg)
    dense.model.num_moe_experts = dense.model.moe_ffn_hidden_size = None
    return dense, cfg


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out nats a token of each seed, dense and sparse."""
    launch.warm_up()
    stack.prepare_imports()
    text = written(row["text"])
    dense, sparse = pair(row, text)
    options = {"tied": ["model.moe_ffn_hidden_size"], "ranks": RANKS}
    found = sweep.compare(dense, sparse, seeds=SEEDS, name="experts", **options)
    within = [after - before for before, after in zip(found.before, found.after, strict=True)]
    return {
        **row,
        "passes": round(row["steps"] * BATCH * row["length"] / text["train"].tokens, 2),
        "dense": [round(one, 4) for one in found.before],
        "sparse": [round(one, 4) for one in found.after],
        "difference": round(statistics.fmean(within), 4),
        "paired_noise": round(found.paired_noise, 4),
    }


if __name__ == "__main__":
    known = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    for number in map(int, sys.argv[1:]):
        same = [{name: one[name] for name in ROWS[number]} == ROWS[number] for one in known]
        known = [one for one, stale in zip(known, same, strict=True) if not stale] + [measured(ROWS[number])]
        print(known[-1])
        content = {
            "about": "Held-out nats a token of a dense model and of one with 16 experts, of which a token visits two, at equal "
            "active feed-forward width and equal tokens, once a seed.",
            "seeds": SEEDS,
            "rows": sorted(known, key=lambda one: [{n: one[n] for n in r} == r for r in ROWS].index(True)),
            "source": "measured by this course: python -m book.builder.sparse, on 2 CPU cores",
            "date": datetime.date.today().isoformat(),
            "versions": {name: metadata.version(name) for name in ("torch", "megatron-bridge", "megatron-core")},
        }
        files.write_text(FILE, json.dumps(content, indent=1) + "\n")
