"""Tests of the prompt templates."""

import pytest

from dylo_moe.data.formats import user_message
from dylo_moe.data.templates import ChatTemplate, PlainTemplate, template_of
from dylo_moe.errors import ConfigError, DatasetError
from tests.support.tiny_folder import tiny_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [*user_message("one"), {"role": "assistant", "content": "two"}, *user_message("three")]


def chatting() -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    template = template_of("auto", tokenizer)
    assert isinstance(template, ChatTemplate)
    return template


def test_auto_uses_the_chat_template_of_a_model() -> None:
    template = chatting()
    assert template.name == "chat"
    assert template.render(TALK) == "<|user|>one<eos>\n<|assistant|>two<eos>\n<|user|>three<eos>\n<|assistant|>"
    assert template.turn_end == "<eos>"


def test_auto_uses_the_plain_template_for_a_model_without_one() -> None:
    template = template_of("auto", tiny_tokenizer())
    assert template == PlainTemplate()
    assert template.render(TALK) == (
        "### Instruction:\none\n\n### Response:\ntwo\n\n### Instruction:\nthree\n\n### Response:\n"
    )


def test_the_user_can_choose_the_template() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="`template` chat needs a model with a chat template"):
        template_of("chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert template_of("plain", tokenizer) == PlainTemplate()


def test_a_conversation_that_the_template_refuses_is_a_dataset_error() -> None:
    with pytest.raises(DatasetError, match="the model's chat template refuses the conversation: no system turn"):
        chatting().render([{"role": "system", "content": "s"}, *user_message("q")])
