"""The closed form of FSDP2 against numbers that eight ranks recorded, and against arithmetic by hand."""

from __future__ import annotations

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


def test_shapes_are_those_of_transformers():
    """By name and without a weight; the tied output layer of Llama 3.2 is there once."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    assert fsdp2_messages.shapes({"model_type": "llama", **sizes, **heads}) == SHAPES
