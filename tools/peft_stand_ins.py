"""Tiny random models that replace those that PEFT's tests load from the Hugging Face Hub.

    python -m tools.peft_stand_ins FOLDER    write them to FOLDER

``write_stand_ins`` writes a folder with the layout of the Hub's download cache. With ``HF_HUB_CACHE`` set to it and
``HF_HUB_OFFLINE=1``, ``from_pretrained`` finds the stand-ins under the real names, and no library is patched. Only the
architectures are real. Sizes, weights and tokenizers are not, so tests that expect the real weights' numbers fail.

Not covered: data sets, diffusers pipelines, quantized checkpoints, processors.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

REVISION = "0" * 40
VOCABULARY = 1024
INITIALIZER_RANGE = 0.1

OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "word_embed_proj_dim": 16}
OPT |= {"max_position_embeddings": 128}
OPT_125M = OPT | {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 12, "word_embed_proj_dim": 64}
GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
BERT = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = LLAMA | {"hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 100}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_source_positions": 32, "num_mel_bins": 16}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}

# Name on the Hub: model class, config class, config values.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", OPT_125M),
    "facebook/opt-125m": ("OPTForCausalLM", "OPTConfig", OPT_125M),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA,
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", "GptOssConfig", EXPERTS),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        EXPERTS | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "attn_temperature_tuning": False},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModel",
        "CLIPTextConfig",
        BERT | {"projection_dim": 32, "max_position_embeddings": 77, "eos_token_id": 2},
    ),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        GROUPED | MAMBA | {"layers_block_type": ["mamba", "attention"]},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "openai/whisper-large": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}

# Adapters on the Hub: base model and PEFT's task type; None if PEFT has no name for the model's class.
ADAPTERS: dict[str, tuple[str, str | None]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/opt-125m-dummy-lora": ("peft-internal-testing/opt-125m", "CAUSAL_LM"),
    "peft-internal-testing/gpt2-lora-random": ("openai-community/gpt2", "CAUSAL_LM"),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("peft-internal-testing/tiny-random-t5", "SEQ_2_SEQ_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "peft-internal-testing/tiny-random-gpt2",
        "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "FEATURE_EXTRACTION",
    ),
    "peft-internal-testing/tiny-random-BertModel-lora": (
        "hf-internal-testing/tiny-random-BertModel",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": ("openai/whisper-large", None),
}

AUTO_CLASSES = {
    None: "AutoModelForSpeechSeq2Seq",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# Further revision names that the tests request.
REVISIONS = {
    "peft-internal-testing/tiny-random-BertModel": ("v2.0.0",),
    "peft-internal-testing/tiny-random-BertModel-lora": ("v1.2.3",),
}


def write_stand_ins(cache: Path) -> None:
    """Write all stand-ins into a folder with the layout of the Hub's cache."""
    tokenizer = _tokenizer()
    for name in MODELS:
        folder = _new_snapshot(cache, name)
        build_model(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, (base, task_type) in ADAPTERS.items():
        folder = _new_snapshot(cache, name)
        auto_class = getattr(transformers, AUTO_CLASSES[task_type])
        torch.manual_seed(1)
        model = auto_class.from_pretrained(_snapshot(cache, base))
        # PEFT has default targets for each of these models except Whisper
        targets = ["q_proj", "v_proj"] if task_type is None else None
        config = LoraConfig(task_type=task_type, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
        _set_base_model(folder / "adapter_config.json", base)


def build_model(name: str) -> PreTrainedModel:
    """Return the stand-in for a model on the Hub, with the same weights each time."""
    model_class, config_class, values = MODELS[name]
    config = getattr(transformers, config_class)(vocab_size=VOCABULARY, **values)
    if hasattr(config, "initializer_range"):
        config.initializer_range = INITIALIZER_RANGE
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _repository(cache: Path, name: str) -> Path:
    return cache / ("models--" + name.replace("/", "--"))


def _snapshot(cache: Path, name: str) -> Path:
    return _repository(cache, name) / "snapshots" / REVISION


def _new_snapshot(cache: Path, name: str) -> Path:
    repository = _repository(cache, name)
    shutil.rmtree(repository, ignore_errors=True)
    (repository / "refs").mkdir(parents=True)
    for revision in ("main", *REVISIONS.get(name, ())):
        (repository / "refs" / revision).write_text(REVISION)
    folder = _snapshot(cache, name)
    folder.mkdir(parents=True)
    return folder


def _set_base_model(path: Path, base: str) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": base}, indent=2))


if __name__ == "__main__":
    write_stand_ins(Path(sys.argv[1]))
