"""Write with an older version of this package what people keep: mixtures, checkpoints, skills, samples, recipes.

    git worktree add /tmp/older eda6999
    PYTHONPATH=/tmp/older/src python tests/earlier_versions/write.py tests/earlier_versions/eda6999

It uses only what both that version and today's have. ``test_earlier_versions.py`` reads the files.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main

ROUTINGS = ["final", "prefix:1", "context:1", "per_layer"]
IDS = [[5, 9, 77, 30, 41, 8, 200, 13], [6, 60, 61, 62, 63, 64, 65, 66]]
TRAINING = {
    "model_name": "base",
    "datasets": "one=one.jsonl,two=two.jsonl",
    "training_subset": 100,
    "eval_subset": 20,
    "max_seq_length": 48,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_experts": 2,
    "lora_r": 2,
    "lora_dropout": 0.2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_steps": 2,
    "max_steps": 4,
    "output_dir": "run",
    "report_to": "none",
}
SKILLS = {
    "model_name": "base",
    "skills": "one=one.jsonl,two=two.jsonl",
    "max_seq_length": 48,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lora_r": 2,
    "learning_rate": 5e-3,
    "max_steps": 2,
    "sample_rows": 16,
    "output_dir": "skills",
    "report_to": "none",
}
BENCHMARK = {
    "trained_model": "mixture-per_layer",
    "benchmarks": "humaneval",
    "prompt_style": "complete",
    "max_samples": 2,
    "max_new_tokens": 8,
    "output": "result.json",
}


def run(program: str, flags: dict[str, object], *more: str) -> None:
    """Run a program and stop unless it succeeds."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if code := main([program, *words, *more]):
        sys.exit(code)


def write_base() -> None:
    """Write a random Llama of four narrow layers, and a tokenizer of bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("base")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    ).save_pretrained("base")


def write_mixtures() -> None:
    """Write a mixture in each routing mode, and what each of them answers."""
    expected = {}
    for number, routing in enumerate(ROUTINGS):
        torch.manual_seed(number)
        model = DyLoRA_MoE("base", 2, rank=2, routing=routing, top_k=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or name.startswith("router."):
                    parameter.normal_(std=0.3)
        model.eval()
        if number % 2:
            model.set_maturity()
        name = f"mixture-{routing.partition(':')[0]}"
        model.save_pretrained(name)
        ids = torch.tensor(IDS)
        with torch.no_grad():
            expected[f"{name}.logits"] = model(ids).logits
            expected[f"{name}.tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False)
        trained = {name: value for name, value in model.state_dict().items() if "lora_" in name or "router" in name}
        expected |= {f"{name}.weights.{key}": value.clone() for key, value in trained.items()}
    save_file(expected, "expected.safetensors")


def write_all() -> None:
    """Write everything into the current folder."""
    write_base()
    for name, word in (("one", "Say"), ("two", "Print")):
        rows = [json.dumps({"instruction": f"{word} {n}.", "output": f"{name}({n})"}) for n in range(60)]
        Path(f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    write_mixtures()
    run("train", TRAINING)
    Path("train.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in TRAINING.items()))
    run("acquire", SKILLS)
    run("benchmark", BENCHMARK, "--no_evalplus")
    remove_what_no_test_reads()


def remove_what_no_test_reads() -> None:
    """Keep the folder small: of the last checkpoint only the weights, of the skills only the mixture."""
    for folder in ("run/best_model", "skills/stages", "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in Path("run/checkpoint-4").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            file.unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    destination = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        # elsewhere, so that the files name no folder of the one who writes them
        os.chdir(folder)
        os.environ["DYLO_MOE_CACHE"] = str(Path("cache").resolve())
        write_all()
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(folder, destination)
