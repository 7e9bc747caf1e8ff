"""What stands around a conversation: the model's own chat template, or a plain one for models that have none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.rows import Message
from dylo_moe.errors import ConfigError, DatasetError, first_line

TemplateName = Literal["plain", "chat"]
AUTO = "auto"


@dataclass(frozen=True)
class PlainTemplate:
    """Alpaca's headings around each turn."""

    name: TemplateName = "plain"
    turn_end: str = ""
    identity: str = "plain"

    def render(self, messages: Sequence[Message]) -> str:
        """The text before the response."""
        return "".join(
            f"### Instruction:\n{message['content'].strip()}\n\n### Response:\n"
            if message["role"] == "user"
            else f"{message['content'].strip()}\n\n"
            for message in messages
        )


class ChatTemplate:
    """The chat template that comes with a tokenizer.

    Args:
        tokenizer: One with a chat template.

    Attributes:
        turn_end: What the template writes after an answer.
        identity: Tells this template from others.
    """

    name: TemplateName = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.identity = f"chat {tokenizer.chat_template}"
        answer = "the answer"
        asked = [{"role": "user", "content": "a question"}]
        whole = str(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False))
        # the end-of-text token is added where it is not what ends a turn already
        self.turn_end = whole.rpartition(answer)[2].rstrip()

    def render(self, messages: Sequence[Message]) -> str:
        """The text before the response, with what tells the model that it is its turn.

        Raises:
            DatasetError: The template knows no such conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise DatasetError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
        return str(text)


Template = PlainTemplate | ChatTemplate


def template_of(choice: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template to use with a model.

    Args:
        choice: ``auto`` (the model's own where it has one), ``chat`` or ``plain``.
        tokenizer: The model's.

    Raises:
        ConfigError: ``chat`` is asked for, and the model has no chat template.
    """
    if choice == "plain" or (choice == AUTO and not tokenizer.chat_template):
        return PlainTemplate()
    if not tokenizer.chat_template:
        raise ConfigError("--template chat needs a model with a chat template, and this one has none; use plain")
    return ChatTemplate(tokenizer)
