"""Which modules of the stack wait until they are needed, and why: the table behind `course_lib.stack.lazy`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deferred:
    """One module whose body waits until it is needed.

    Attributes:
        functions: Names that others import at the top of their files; each is answered by a function that loads the
            real module when it is *called*, so that the import alone stays free.
        re_exports: True if the body only imports names from elsewhere.  Then a name is resolved on its own, without
            running the rest.
    """

    module: str
    reason: str
    functions: tuple[str, ...] = ()
    re_exports: bool = False


DEFERRED: tuple[Deferred, ...] = (
    Deferred("megatron.bridge", "re-exports every model family", re_exports=True),
    Deferred("megatron.bridge.models", "imports every model family", re_exports=True),
    Deferred("megatron.bridge.models.conversion", "its parts import each other in a circle", re_exports=True),
    Deferred("megatron.bridge.models.hf_pretrained", "as above", re_exports=True),
    Deferred("megatron.bridge.recipes", "imports the recipes of every model family", re_exports=True),
    Deferred("megatron.bridge.recipes.llama", "imports recipes for four GPU generations", re_exports=True),
    Deferred("megatron.bridge.diffusion.models", "imports the diffusion models", re_exports=True),
    Deferred("modelopt", "quantisation and pruning: a run that never asked for them needs none of it"),
    Deferred("modelopt.torch", "as above"),
    Deferred("modelopt.torch.opt", "as above"),
    Deferred(
        "modelopt.torch.opt.plugins",
        "as above; Bridge's checkpoint code imports three functions",
        functions=("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state"),
    ),
    Deferred("modelopt.torch.distill", "as above"),
    Deferred("modelopt.torch.distill.plugins", "as above"),
    Deferred(
        "modelopt.torch.distill.plugins.megatron",
        "as above; Bridge's training loop imports one function",
        functions=("get_tensor_shapes_adjust_fn_for_distillation",),
    ),
    Deferred(
        "megatron.bridge.training.post_training.distillation",
        "imports all of modelopt; the GPT step imports one function",
        functions=("loss_func_kd",),
    ),
    Deferred("rfc3987_syntax", "compiles a URL grammar for three seconds", functions=("is_valid_syntax",)),
    Deferred(
        "megatron.bridge.data.energon.base_energon_datamodule",
        "imports all of Energon and its object stores, for data sets of pictures; the configuration names one class",
        functions=("EnergonMultiModalDataModule",),
    ),
    Deferred("multistorageclient", "object stores: compiles a URL grammar for three seconds"),
    Deferred("httpx._main", "a command line with its own colours; httpx names its one function", functions=("main",)),
    Deferred("wandb", "experiment tracker, used only when a run names a project"),
    Deferred("datasets", "Hugging Face datasets", functions=("load_dataset", "concatenate_datasets")),
    Deferred("datasets.builder", "as above; Bridge sets one attribute here"),
    Deferred(
        "transformers.quantizers.quantizer_torchao",
        "imports all of torchao, which only AutoModel needs; transformers wants one class for quantised models",
        functions=("TorchAoHfQuantizer",),
    ),
    Deferred("sklearn.metrics", "transformers wants one function for assisted generation", functions=("roc_curve",)),
    Deferred("sklearn", "as above"),
    Deferred("scipy.optimize", "transformers wants one function", functions=("linear_sum_assignment",)),
    Deferred(
        "torch._dynamo",
        "the compiler, switched off here",
        functions=("disable", "allow_in_graph", "assume_constant_result", "graph_break"),
    ),
    Deferred(
        "torch._dynamo.trace_rules", "as above; torch.distributed clears its cache", functions=("clear_lru_cache",)
    ),
    Deferred(
        "torch._dynamo._trace_wrapped_higher_order_op",
        "as above; transformers wants one context manager",
        functions=("TransformGetItemToIndex",),
    ),
)
