"""Base models in 4 or 8 bits, by bitsandbytes through transformers.

Only the linear layers of the base are quantised. Experts and router stay in full precision, on top of it: the routed
layer asks its base layer for an output, and not for weights.
"""

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import validate_bnb_backend_availability
from transformers.utils.import_utils import is_bitsandbytes_available

from dylo_moe.errors import ModelError


def check_quantisation(bits: int) -> None:
    """Makes sure that a model can be loaded in 4 or 8 bits here.

    Raises:
        ModelError: bitsandbytes is missing, or supports none of the devices.
    """
    if bits not in (4, 8):
        raise ModelError(f"a base model is quantised to 4 or 8 bits, got {bits}")
    if not is_bitsandbytes_available():
        raise ModelError(
            f"--load_in_{bits}bit needs bitsandbytes, and it is not installed or too old; "
            "run: pip install 'dylora-moe[quantisation]', or leave the flag out"
        )
    if not validate_bnb_backend_availability():
        raise ModelError(
            f"--load_in_{bits}bit: the installed bitsandbytes supports none of this machine's devices; "
            "leave the flag out"
        )


def quantisation(bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What a model is loaded with.

    4 bits are NF4 with the quantisation constants quantised too, as in QLoRA (Dettmers et al. 2023, arXiv
    2305.14314); 8 bits are LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    Args:
        bits: 4 or 8.
        compute_dtype: What 4-bit weights are dequantised to for a product.

    Raises:
        ModelError: As ``check_quantisation``.
    """
    check_quantisation(bits)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """Lets a 4-bit model be trained after an evaluation on a CPU.

    On some CPUs, bitsandbytes 0.50 repacks the weights at the first forward of an evaluation, for a product that has no
    gradient: all later training would run through it, and everything below the last quantised layer would get none.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # by its name, as bitsandbytes may not be installed
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
