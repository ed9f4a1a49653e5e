"""What training adapters on a base quantised by bitsandbytes takes."""


def keep_differentiable_(model):
    """Keep 4-bit weights in the layout that they are trained with; nothing happens to other models.

    On CPUs with AVX512-BF16, bitsandbytes repacks them for inference at the first forward in evaluation mode,
    and its product with those has no gradient: the adapters below would silently not train.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # has the side effect of undoing it
            module.support_avx512bf16_for_cpu = False
