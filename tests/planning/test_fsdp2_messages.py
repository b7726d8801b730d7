"""The closed forms of FSDP2 and DDP against what eight ranks recorded, DDP's own reducer, and arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from course_lib.planning import fsdp2_messages

LAYER = {
    **{f"self_attn.{one}_proj.weight": (64, 64) for one in "qkvo"},
    **{f"mlp.{one}_proj.weight": (128, 64) for one in ("gate", "up")},
    "mlp.down_proj.weight": (64, 128),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()}
SHAPES |= {"model.embed_tokens.weight": (1024, 64), "model.norm.weight": (64,)}


def counted(**options):
    """Bytes and count by phase and operation."""
    rows = fsdp2_messages.expected(SHAPES, ranks=8, **options)
    return {(r.phase, r.operation, r.bytes): r.count for r in rows.query("bytes > 8").itertuples(index=False)}


def test_a_step_of_a_small_llama():
    """As eight ranks recorded it on 2026-11-27: two layers of 41,088 numbers, and 65,600 in no layer."""
    assert counted() == {
        ("forward", "all_gather", 262_400): 1,
        ("forward", "all_gather", 164_352): 2,
        ("backward", "all_gather", 164_352): 1,
        ("backward", "reduce_scatter", 262_400): 1,
        ("backward", "reduce_scatter", 164_352): 2,
    }


def test_micro_batches_gather_again_and_reduce_once():
    """Gradients wait for the last micro-batch; weights do not stay."""
    twice = counted(microbatches=2)
    assert twice["forward", "all_gather", 164_352] == 4 and twice["backward", "reduce_scatter", 164_352] == 2


def test_narrow_weights_and_wide_gradients():
    """AutoModel's default sends weights in bf16 and reduces gradients in fp32."""
    rows = counted(element_bytes=2)
    assert rows["forward", "all_gather", 82_176] == 2 and rows["backward", "reduce_scatter", 164_352] == 2


def test_what_does_not_divide_is_padded():
    """The last rank's part is as long as the others', 3 of 8 x 3 rows: 24 for 20."""
    assert fsdp2_messages.units({"model.norm.weight": (20,)}, ranks=8) == [24]


def test_shapes_are_those_of_transformers(bridge):
    """By name and without a weight; the tied output layer of Llama 3.2 is there once."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    assert fsdp2_messages.shapes({"model_type": "llama", **sizes, **heads}) == SHAPES


SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1024}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS = [
    SIZES | {"num_hidden_layers": layers, "tie_word_embeddings": tied} for layers, tied in ((2, True), (3, False))
]
CAPS = [0.02, 0.05, 0.1, 0.2, None]
"""Where a bucket is full: inside a layer, between layers, and never."""


def reduce_them(directory: str) -> None:
    """Write what DDP's reducer asks to be reduced, in a process whose group no other test can meet."""
    import torch
    import transformers
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def reduced(sizes: dict, cap: float | None) -> list[int]:
        def note(_, bucket):
            found.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        model = DistributedDataParallel(model, bucket_cap_mb=cap)
        model.register_comm_hook(None, note)
        for _ in range(3):
            found: list[int] = []
            tokens = torch.zeros(1, 8, dtype=torch.long)
            model(input_ids=tokens, labels=tokens).loss.backward()
        return found

    found = [[reduced(sizes, cap) for cap in CAPS] for sizes in MODELS]
    (Path(directory) / "reduced.json").write_text(json.dumps(found), encoding="utf-8")


def test_buckets_are_those_of_the_reducer(bridge, in_ranks, tmp_path):
    """Sizes and order, for caps that are met inside a layer, between layers, and never; tied embeddings and untied ones."""
    in_ranks(reduce_them, tmp_path)
    found = json.loads((tmp_path / "reduced.json").read_text(encoding="utf-8"))
    shapes = [fsdp2_messages.shapes({"model_type": "llama"} | sizes) for sizes in MODELS]
    assert [[fsdp2_messages.buckets(one, bucket_cap_mib=cap) for cap in CAPS] for one in shapes] == found
    assert len(found[0][0]) > len(found[0][2]) > len(found[0][-1])


def test_a_step_of_ddp_reduces_each_gradient_once():
    """One bucket below a MiB, as eight ranks recorded it on 2026-11-27; bf16 gradients are half of the bytes."""
    rows = fsdp2_messages.replicas(SHAPES, ranks=8).query("bytes > 8")
    assert rows[["operation", "group", "bytes", "count"]].values.tolist() == [["all_reduce", "world", 591_104, 1]]
    small = fsdp2_messages.replicas(SHAPES, ranks=8, bucket_cap_mib=0.05, gradient_bytes=2).query("bytes > 8")
    assert (small.bytes * small["count"]).sum() == 2 * sum(map(math.prod, SHAPES.values())) == 295_552
    assert small["count"].sum() > 1


def test_a_parameter_without_a_place_in_the_order_is_refused():
    """An expert's or a bias of another family: the message names it."""
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.gate_up_proj"):
        fsdp2_messages.buckets({"model.layers.0.mlp.experts.gate_up_proj": (4, 4)})
