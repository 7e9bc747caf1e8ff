"""A fingerprint of a base model: short enough for a checkpoint's description, and the same in every dtype.

It is compared when a checkpoint meets a base model. Quantization and rounding do not change the result.
"""

import hashlib

import torch
from torch import Tensor, nn

from dylo_moe.core.base.offload import parameters_in_place

FINGERPRINT_PATTERN = r"^[0-9a-f]{16}(:([0-9a-f]{4})*){2}$"


def fingerprint(model: nn.Module) -> str:
    """Return a string that identifies a base model in whatever dtype or quantization it was loaded.

    It has three hexadecimal parts: a digest of the shapes of embeddings and vector parameters (norms, biases), which
    quantization leaves unchanged; a sample of their values as bfloat16; and a sample of the other matrices, which is
    empty if those are quantized.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    shapes = hashlib.sha256()
    vectors, matrices = "", ""
    for name, parameter in parameters_in_place(model):
        if "lora_" in name:
            continue
        if parameter.dim() == 1 or name in embeddings:
            shapes.update(f"{tuple(parameter.shape)}".encode())
            vectors += _sample(parameter, 32)
        elif parameter.is_floating_point():
            matrices += _sample(parameter, 4)
    return f"{shapes.hexdigest()[:16]}:{vectors}:{matrices}"


def same_base_model(one: str, other: str) -> bool:
    """Return whether two fingerprints are of the same model: equal shapes, and samples equal up to rounding."""
    (shapes, vectors, matrices), (other_shapes, other_vectors, other_matrices) = one.split(":"), other.split(":")
    if shapes != other_shapes or not _nearly_equal(vectors, other_vectors):
        return False
    # a quantized model has fewer matrices to compare, or none
    return len(matrices) != len(other_matrices) or _nearly_equal(matrices, other_matrices)


def _sample(parameter: Tensor, count: int) -> str:
    values = parameter.detach().flatten()
    indices = torch.linspace(0, values.numel() - 1, min(values.numel(), count), dtype=torch.float64).long()
    sample = values[indices.to(values.device)].to("cpu", torch.bfloat16)
    return sample.view(torch.uint8).numpy().tobytes().hex()


def _nearly_equal(one: str, other: str) -> bool:
    if len(one) != len(other) or not one:
        return one == other
    values, others = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).double() for text in (one, other))
    # neighbors in bfloat16 are 2^-7 of a value apart; below 1e-6 float16 has rounded more coarsely
    return torch.allclose(values, others, rtol=2**-7, atol=1e-6)
