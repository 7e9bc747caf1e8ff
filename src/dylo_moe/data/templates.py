"""Prompt templates for conversations: the model's own chat template, or a plain one for models that have none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.formats import Message, user_message
from dylo_moe.errors import ConfigError, DatasetError, first_line

TemplateName = Literal["plain", "chat"]
AUTO = "auto"


@dataclass(frozen=True)
class PlainTemplate:
    """Template with Alpaca's headings before each instruction and response.

    Attributes:
        name: Name of the template, as a mixture stores it.
        turn_end: Text after an answer; none.
        identity: Cache key of the template.
    """

    name: TemplateName = "plain"
    turn_end: str = ""
    identity: str = "plain"

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a conversation, up to where the response begins."""
        return "".join(
            f"### Instruction:\n{message['content'].strip()}\n\n### Response:\n"
            if message["role"] == "user"
            else f"{message['content'].strip()}\n\n"
            for message in messages
        )


class ChatTemplate:
    """Template made from the chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer with a chat template.

    Attributes:
        turn_end: Text that the template writes after an answer.
        identity: Cache key of the template.
    """

    name: TemplateName = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.identity = f"chat {tokenizer.chat_template}"
        answer = "the answer"
        messages = [*user_message("a question"), {"role": "assistant", "content": answer}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        # tokenization adds the end-of-text token unless it ends the turn already
        self.turn_end = text.rpartition(answer)[2].rstrip()

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a conversation, including the header of the model's turn.

        Raises:
            DatasetError: The template refuses the conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise DatasetError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
        return str(text)


Template = PlainTemplate | ChatTemplate


def template_of(choice: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template to use with a model.

    Args:
        choice: ``auto`` (the model's own template if it has one), ``chat`` or ``plain``.
        tokenizer: Tokenizer of the model.

    Raises:
        ConfigError: ``choice`` is ``chat`` and the model has no chat template.
    """
    if choice == "plain" or (choice == AUTO and not tokenizer.chat_template):
        return PlainTemplate()
    if not tokenizer.chat_template:
        raise ConfigError("`template` chat needs a model with a chat template, and this one has none; use plain")
    return ChatTemplate(tokenizer)
