"""What stands around a conversation."""

import pytest

from dylo_moe.data.rows import asked
from dylo_moe.data.templates import ChatTemplate, PlainTemplate, template_of
from dylo_moe.errors import ConfigError, DatasetError
from tiny_folder import tiny_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [*asked("one"), {"role": "assistant", "content": "two"}, *asked("three")]


def chatting() -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    template = template_of("auto", tokenizer)
    assert isinstance(template, ChatTemplate)
    return template


def test_the_models_own_template_is_used_where_it_has_one() -> None:
    template = chatting()
    assert template.name == "chat"
    assert template.render(TALK) == "<|user|>one<eos>\n<|assistant|>two<eos>\n<|user|>three<eos>\n<|assistant|>"
    assert template.turn_end == "<eos>"


def test_a_model_without_one_gets_the_plain_one() -> None:
    template = template_of("auto", tiny_tokenizer())
    assert template == PlainTemplate()
    assert template.render(TALK) == (
        "### Instruction:\none\n\n### Response:\ntwo\n\n### Instruction:\nthree\n\n### Response:\n"
    )


def test_the_choice_is_the_users() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="--template chat needs a model with a chat template"):
        template_of("chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert template_of("plain", tokenizer) == PlainTemplate()


def test_a_conversation_that_the_template_refuses_is_the_datas_fault() -> None:
    with pytest.raises(DatasetError, match="the model's chat template refuses the conversation: no system turn"):
        chatting().render([{"role": "system", "content": "s"}, *asked("q")])
