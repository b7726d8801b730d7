"""Closed forms about a model: how many parameters it has, and how many weights a token is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from course_lib.common.config import Fields
from course_lib.planning.layout.stages import stage_layers

__all__ = [
    "Mixers",
    "attention_weights",
    "feed_forward_sizes",
    "feed_forward_weights",
    "flops_per_token",
    "has_experts",
    "layer_weights",
    "mixers",
    "parameter_count",
    "stage_kinds",
    "state_space",
]


def parameter_count(model: Any, *, vocab_size: int | None = None) -> int:
    """How many parameters has a dense model shaped like Llama or Qwen (RMSNorm, rotary positions)?

    With hidden size h, heads of c channels, a query heads, g key-value heads, feed-forward width f, L layers, V rows::

        V h  +  L (h c (2 a + 2 g)  +  3 h f  +  2 h)  +  h  [+ V h if input and output embeddings differ]

    (2 h f instead of 3 h f without a gate; c (a + 2 g) more in a layer whose projections to queries, keys and values
    have biases, as in Qwen 2; 2 c more in one that normalises queries and keys, as in Qwen 3.)

    Args:
        model: A Bridge model provider, a ``ConfigContainer``, or a mapping with Megatron's field names.
        vocab_size: Rows of the embedding, padded already (``layout.padded_vocab_size``); default the model's.

    Returns:
        The number of parameters, each counted once however many ranks hold it.

    Raises:
        ValueError: If the model has parts that this formula does not count.

    >>> llama = dict(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192)
    >>> llama |= dict(normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False)
    >>> llama |= dict(position_embedding_type="rope", share_embeddings_and_output_weights=True)
    >>> parameter_count(llama, vocab_size=128256)
    1235814400
    """
    fields = Fields.of(model)
    get = fields.model
    wanted = {
        "normalization": ("RMSNorm", "LayerNorm"),
        "add_bias_linear": (False, True),
        "multi_latent_attention": (False, False),
        "num_moe_experts": (None, None),
        "mtp_num_layers": (None, None),
        "hybrid_layer_pattern": (None, None),
    }
    if (positions := get("position_embedding_type", "learned_absolute")) not in ("rope", "yarn", "none"):
        raise ValueError(
            f"position_embedding_type={positions!r} has parameters of its own: count the built model instead"
        )
    for name, (counted, default) in wanted.items():
        if (value := get(name, default)) != counted:
            raise ValueError(
                f"{name}={value!r} adds or removes parameters that this formula does not count (it wants {counted!r}): "
                "count the built model instead"
            )
    hidden, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_layers")
    groups = get("num_query_groups", heads)
    rows = vocab_size if vocab_size is not None else get("vocab_size")
    if rows is None:
        raise ValueError("the model has no vocab_size: give vocab_size=")
    channels = fields.head_channels
    layer = layer_weights(fields) + 2 * hidden
    if get("add_qkv_bias", False):
        layer += channels * (heads + 2 * groups)
    if get("qk_layernorm", False):
        layer += 2 * channels
    embeddings = rows * hidden * (1 if get("share_embeddings_and_output_weights", True) else 2)
    return embeddings + layers * layer + hidden


def layer_weights(fields: Fields) -> int:
    """How many weights stand in the matrices of a dense layer: attention's four, and the feed-forward's two or three.

    Args:
        fields: The model's fields; those with a default of Megatron's may be missing.
    """
    width = fields.model("ffn_hidden_size", 4 * fields.model("hidden_size"))
    return attention_weights(fields) + feed_forward_weights(fields, width)


def attention_weights(fields: Fields) -> int:
    """How many weights stand in the matrices of one attention layer."""
    return _attention(fields)[0]


def feed_forward_weights(model: Any, width: int, inputs: int | None = None) -> int:
    """How many weights stand in the two matrices of a feed-forward, three with a gate: a layer's, or one expert's.

    Args:
        model: A Bridge model provider, a `ConfigContainer`, or fields of one.
        width: Features between the matrices.
        inputs: Features before and after them; the hidden size by default.
    """
    return sum(feed_forward_sizes(model, width, inputs))


def feed_forward_sizes(model: Any, width: int, inputs: int | None = None) -> tuple[int, int]:
    """As `feed_forward_weights`, by matrix: the one into `width`, with the gate if there is one, and the one out of it."""
    fields = Fields.of(model)
    one = (inputs or fields.model("hidden_size")) * width
    return one * (2 if fields.model("gated_linear_unit", False) else 1), one


@dataclass(frozen=True)
class Mixers:
    """What one token passes on its way through a model, its output layer left out.

    Attributes:
        parts: Weights that it is multiplied with by kind: ``attention``, ``mlp``, ``moe`` (the chosen experts and the router),
            ``shared_experts``, ``mamba``, and ``ahead``, which joins a predicted token's layers to the model's.
        score_channels: Channels of each attention layer's scores and of its weighted values, summed over heads.
        windows: Tokens back that each attention layer looks at, None for all; as many as `score_channels`.
        scan: Multiplications and additions of state-space layers beside their matrices, forward.
        heads: How often the token meets the output layer: once, and once for each token predicted ahead.
    """

    parts: dict[str, int]
    score_channels: tuple[int, ...]
    windows: tuple[int | None, ...]
    scan: int
    heads: int

    @property
    def weights(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def mixers(fields: Fields) -> Mixers:
    """Read from a model's fields what a token is multiplied with, layer by layer.

    Args:
        fields: The model's fields; those with a default of Megatron's may be missing.

    Raises:
        ValueError: If a layer is of a kind that is not counted; the message names the field.

    Source: megatron-core 0.19.2 ``transformer/multi_latent_attention.py``, ``transformer/moe``, ``ssm/mamba_mixer.py``,
    ``transformer/multi_token_prediction.py``, ``models/hybrid/hybrid_layer_allocation.py``.
    """
    get = fields.model
    for name, why in {
        "experimental_attention_variant": "has layers of its own",
        "heterogeneous_block_specs": "gives every layer its own shape",
        "vision_config": "has an encoder for pictures",
    }.items():
        if (value := get(name)) is not None and value is not False:
            raise ValueError(
                f"{name}={str(value)[:40]} {why}, whose operations are not counted: count a model without it"
            )
    hidden, ahead = get("hidden_size"), get("mtp_num_layers") or get("hybrid_layer_pattern", "").count("/")
    layers = _layers(fields)
    attention, channels = _attention(fields)
    kinds = "".join(layers)
    routed, shared = _experts(fields) if "E" in kinds else (0, 0)
    mamba, scan = _met_state_space(fields) if "M" in kinds else (0, 0)
    parts = {
        "attention": kinds.count("*") * attention,
        "mlp": kinds.count("-") * feed_forward_weights(fields, get("ffn_hidden_size", 4 * hidden)),
        "moe": kinds.count("E") * routed,
        "shared_experts": kinds.count("E") * shared,
        "mamba": kinds.count("M") * mamba,
        "ahead": ahead * 2 * hidden * hidden,
    }
    attending = [number for number, layer in enumerate(layers, start=1) if "*" in layer]
    windows = tuple(_window(fields, number) for number in attending)
    return Mixers(parts, (channels,) * len(attending), windows, kinds.count("M") * scan, 1 + ahead)


def _layers(fields: Fields) -> list[str]:
    """Each layer's parts: `*` attention, `-` feed-forward, `E` experts, `M` state space; those of tokens ahead come last."""
    get = fields.model
    ahead = get("mtp_num_layers", 0)
    if pattern := get("hybrid_layer_pattern") or get("hybrid_override_pattern"):
        layers = list(pattern.replace("|", "").replace("/", ""))
        if "/" not in pattern:
            layers += list(get("mtp_hybrid_override_pattern", "")) * ahead
        if other := sorted(set(layers) - set("*-EM")):
            raise ValueError(
                f"hybrid_layer_pattern: layers of kind {', '.join(other)} are not counted: only *, -, E and M are"
            )
        return layers
    count, frequency = get("num_layers"), get("moe_layer_freq", 1)
    if not get("num_moe_experts"):
        sparse: Sequence[object] = [False] * count
    else:
        sparse = frequency if isinstance(frequency, Sequence) else [not number % frequency for number in range(count)]
    kinds = ["*E" if one else "*-" for one in sparse]
    return kinds + kinds[-1:] * ahead


def stage_kinds(fields: Fields) -> list[list[str]]:
    """The letters of each pipeline stage's model chunks, those of tokens predicted ahead left out.

    >>> stage_kinds(Fields.of({"hybrid_layer_pattern": "ME|M*-", "pipeline_model_parallel_size": 2}))
    [['ME'], ['M*-']]
    >>> stage_kinds(Fields.of({"num_layers": 2, "num_moe_experts": 4, "moe_layer_freq": [0, 1]}))
    [['*-*E']]
    """
    layers, counts = iter(_layers(fields)), stage_layers(fields)
    found: list[list[str]] = [[] for _ in counts]
    for chunk in range(len(counts[0])):  # the layers pass all stages before they come back to the first
        for stage, each in enumerate(counts):
            found[stage].append("".join(islice(layers, each[chunk])))
    return found


def has_experts(fields: Fields) -> bool:
    """Whether a layer of any stage has experts; those of tokens predicted ahead left out."""
    return "E" in "".join(chain(*stage_kinds(fields)))


def _attention(fields: Fields) -> tuple[int, int]:
    """Weights of one attention layer, and the channels of its scores and values over all heads."""
    get = fields.model
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    if not get("multi_latent_attention", False):
        each, groups = fields.head_channels, get("num_query_groups", heads)
        gate = heads if get("attention_output_gate", False) else 0
        return hidden * each * (2 * heads + 2 * groups + gate), 2 * heads * each
    keys, turned, values = get("qk_head_dim", 128), get("qk_pos_emb_head_dim", 64), get("v_head_dim", 128)
    latent, queries = get("kv_lora_rank", 512), heads * (keys + turned)
    rank = get("q_lora_rank")
    weights = rank * (hidden + queries) if rank else hidden * queries
    weights += hidden * (latent + turned) + latent * heads * (keys + values) + heads * values * hidden
    return weights, heads * (keys + turned + values)


def _experts(fields: Fields) -> tuple[int, int]:
    """Weights of one sparse layer that a token meets: its chosen experts with the router, and the shared expert."""
    get = fields.model
    hidden, latent = get("hidden_size"), get("moe_latent_size")
    width = get("moe_ffn_hidden_size") or get("ffn_hidden_size", 4 * hidden)
    routed = get("moe_router_topk", 2) * feed_forward_weights(fields, width, latent)
    shared = feed_forward_weights(fields, get("moe_shared_expert_intermediate_size", 0))
    return routed + hidden * get("num_moe_experts") + (2 * hidden * latent if latent else 0), shared


@dataclass(frozen=True)
class StateSpace:
    """Sizes of one Mamba 2 layer.

    Attributes:
        inner: Channels of all heads together.
        cut: Parameters by tensor, each of which tensor parallelism cuts: projections in and out, convolution with its bias,
            steps, decays, skips, and the norm before the projection out.

    Source: megatron-core 0.19.2 ``ssm/mamba_mixer.py``.
    """

    heads: int
    groups: int
    state: int
    inner: int
    cut: tuple[int, ...]


def state_space(fields: Fields) -> StateSpace:
    """Read the sizes of a model's Mamba layers; those with a default of Megatron's may be missing."""
    get = fields.model
    hidden, each = get("hidden_size"), get("mamba_head_dim", 64)
    heads = get("mamba_num_heads") or 2 * hidden // each
    inner, state, groups = heads * each, get("mamba_state_dim", 128), get("mamba_num_groups", 8)
    convolved = inner + 2 * groups * state
    matrices = (hidden * (inner + convolved + heads), inner * hidden)
    return StateSpace(heads, groups, state, inner, (*matrices, 4 * convolved, convolved, heads, heads, heads, inner))


def _met_state_space(fields: Fields) -> tuple[int, int]:
    """Weights of one Mamba 2 layer, and the operations of its scan: seven for each channel and state, as Bridge takes it."""
    shape = state_space(fields)
    return sum(shape.cut[:2]), 7 * shape.inner * shape.state


def _window(fields: Fields, number: int) -> int | None:
    """Tokens that a layer looks back at, itself included, by its number from 1; None for all."""
    window, skip = fields.model("window_size"), fields.model("window_attn_skip_freq")
    if window is None:
        return None
    listed = skip is None or (not isinstance(skip, int) and number <= len(skip) and bool(skip[number - 1]))
    slides = number % skip != 0 if isinstance(skip, int) else listed
    tokens = sum(window) + 1 if isinstance(window, Sequence) else window
    return tokens if slides else None


def flops_per_token(model: Any, *, vocab_size: int, seq_length: int | None = None, causal: bool = True) -> float:
    """How many floating-point operations does a model need to train on one token?

    With M weights that a token is multiplied with, L attention layers, a heads of c channels and s tokens in a sequence::

        6 M  +  6 L s a c      attention counted as it is masked: each token looks at s/2 tokens on average
        6 M  + 12 L s a c      the whole square counted

    M leaves out the norms and, where input and output embeddings differ, the input one: it is a lookup.  Of experts M holds
    the chosen ones at their own width, the shared one and the router; latent attention and each token predicted ahead count
    by their own matrices.  A Mamba layer adds 21 operations for each inner channel and state.

    Args:
        model: A Bridge model provider, a `ConfigContainer`, or a mapping with Megatron's field names.
        vocab_size: Rows of the output layer, padded already.
        seq_length: Tokens in a sequence; the model's own by default.
        causal: Count only the half of attention that is not masked, and of a window what it shows.

    Returns:
        FLOPs per token, forward and backward; optimizer and norms are not counted.

    Raises:
        ValueError: If a layer is of a kind that is not counted; the message names the field.

    Source: megatron-bridge 0.6.2 training/utils/flop_utils.py, which leaves the router out and takes a Mamba layer's inner
    width for twice the model's.

    >>> tiny = dict(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, gated_linear_unit=True)
    >>> tiny |= dict(normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope")
    >>> flops_per_token(tiny, seq_length=4, vocab_size=32) == 6 * (32 * 8 + 4 * 8 * 8 + 3 * 8 * 16) + 6 * 1 * 4 * 8
    True
    >>> llama = dict(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8)
    >>> llama |= dict(ffn_hidden_size=14336, gated_linear_unit=True, seq_length=8192)
    >>> [round(flops_per_token(llama, vocab_size=128256, causal=causal) / 1e9, 1) for causal in (True, False)]
    [51.5, 57.9]
    >>> sparse = llama | dict(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=4096)
    >>> round(flops_per_token(sparse, vocab_size=128256) / 1e9, 1)
    37.0
    """
    fields = Fields.of(model)
    met, tokens = mixers(fields), seq_length or fields.model("seq_length")
    seen = 0.0
    for channels, window in zip(met.score_channels, met.windows, strict=True):
        if window is None or window >= tokens or not causal:
            seen += channels * tokens / (2 if causal else 1)
        else:
            seen += channels * (window - window * (window - 1) / (2 * tokens))
    multiplied = met.weights + met.heads * fields.model("hidden_size") * vocab_size
    return 6 * (multiplied + seen) + 3 * met.scan
