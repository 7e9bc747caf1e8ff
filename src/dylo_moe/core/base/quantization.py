"""Base models in 4 or 8 bits, by bitsandbytes through transformers.

Only the linear layers of the base are quantized. Experts and router stay in full precision on top: a routed layer
asks its base layer for an output, never for weights.
"""

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import validate_bnb_backend_availability
from transformers.utils.import_utils import is_bitsandbytes_available

from dylo_moe.errors import ModelError


def check_quantization(bits: int) -> None:
    """Check that a model can be loaded in 4 or 8 bits on this machine.

    Raises:
        ModelError: bitsandbytes is missing, or supports none of the devices.
    """
    if bits not in (4, 8):
        raise ModelError(f"`bits` must be 4 or 8, got {bits}")
    if not is_bitsandbytes_available():
        raise ModelError(
            f"`bits`={bits} (`load_in_{bits}bit`) needs bitsandbytes, and it is not installed or too old; "
            "run: pip install 'dylora-moe[quantization]', or leave it out"
        )
    if not validate_bnb_backend_availability():
        raise ModelError(
            f"`bits`={bits} (`load_in_{bits}bit`) needs a device that bitsandbytes supports, and the installed one "
            "supports none of this machine's; leave it out"
        )


def quantization_config(bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration that transformers loads a model in 4 or 8 bits with.

    4 bits are NF4 with the quantization constants quantized too, as in QLoRA (Dettmers et al. 2023, arXiv
    2305.14314); 8 bits are LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    Args:
        bits: 4 or 8.
        compute_dtype: Floating type to which 4-bit weights are dequantized for a product.

    Raises:
        ModelError: See ``check_quantization``.
    """
    check_quantization(bits)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """Let a 4-bit model be trained after an evaluation on a CPU.

    On some CPUs, bitsandbytes 0.50 repacks the weights at the first forward of an evaluation for a product that has no
    gradient. All later training would use it, and nothing below the last quantized layer would get a gradient.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # compared by name: bitsandbytes may not be installed
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
