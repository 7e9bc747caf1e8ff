"""Tiny models for the tests of the evaluation."""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dylo_moe import DyLoRA_MoE
from tests.support.tiny_folder import tiny_config, tiny_tokenizer


def tiny_base(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a random model with large logits, so that it can be taught and rounding changes few samples."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    base = LlamaForCausalLM(tiny_config(len(tokenizer), positions=2048)).eval()
    base.lm_head.weight.data.mul_(20)
    return base, tokenizer


def tiny_mixture(routing: str = "per_layer", seed: int = 0) -> tuple[DyLoRA_MoE, PreTrainedTokenizerFast]:
    """Return a mixture of two mature experts that change the base's output."""
    base, tokenizer = tiny_base(seed)
    model = DyLoRA_MoE(base, 2, rank=4, routing=routing, top_k=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.set_maturity()
    return model.eval(), tokenizer


def taught_mixture(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> DyLoRA_MoE:
    """Return a mixture of two mature experts, trained to answer ``prompt`` with ``answer`` and the end token."""
    torch.manual_seed(1)
    model = DyLoRA_MoE(base, 2, rank=16, target_modules="all-linear", top_k=2)
    prompt_ids, answer_ids = tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([prompt_ids + answer_ids])
    labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
    for _ in range(400):
        output = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        if output.lm_loss < 0.05:
            break
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert output.lm_loss < 0.05, "it did not learn its answer"
    model.set_maturity()
    return model.eval()
