"""``generate``: generate text with a trained mixture, one of its experts, or its base model."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from dylo_moe.config import GenerateArgs, parse
from dylo_moe.core import DyLoRA_MoE
from dylo_moe.data import AUTO, encode_prompt, template_of, user_message
from dylo_moe.errors import ConfigError
from dylo_moe.runs import load_mixture


def main(arguments: Sequence[str], program: str = "dylora-moe generate") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    args = parse(GenerateArgs, program, "Generate text with a trained mixture.", arguments)
    transformers.logging.disable_progress_bar()
    prompt = sys.stdin.read() if args.prompt is None and args.instruction is None else args.prompt
    if prompt == "":
        raise ConfigError("--prompt must not be empty: give --prompt, --instruction or text on standard input")
    model, tokenizer = load_mixture(args.trained_model, args.base_model)
    if prompt is None:
        prompt = template_of(model.prompt_template or AUTO, tokenizer).render(user_message(str(args.instruction)))
    if args.expert is not None:
        model.experts.set_active(args.expert)
    set_seed(args.seed)
    if args.base_only:
        with model.base_only():
            _generate(model, tokenizer, prompt, args)
    else:
        _generate(model, tokenizer, prompt, args)
    return 0


def _generate(model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, prompt: str, args: GenerateArgs) -> None:
    """Write the prompt and its completion to standard output, token by token unless there are several beams."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if args.num_beams == 1 else None
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        route=args.route,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    if streamer is None:
        sys.stdout.write(f"{tokenizer.decode(output[0], skip_special_tokens=True)}\n")
