"""Tests of the row formats, and of the messages for rows without one."""

import pytest

from dylo_moe.data.formats import FORMATS, PromptResponse, Row, detect_format
from dylo_moe.errors import DatasetError

ASK, ANSWER = "Add 1 and 2.", "print(1 + 2)"
USER = {"role": "user", "content": ASK}

KNOWN: dict[str, Row] = {
    "chat messages": {"messages": [USER, {"role": "assistant", "content": ANSWER}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
    "Alpaca": {"instruction": ASK, "input": "", "output": ANSWER},
    "instruction and response": {"instruction": ASK, "response": ANSWER},
    "query and answer": {"query": ASK, "answer": ANSWER},
    "question and answer": {"question": ASK, "answer": ANSWER},
    "prompt and completion": {"prompt": ASK, "completion": ANSWER},
    "prompt and response": {"prompt": ASK, "response": ANSWER},
}


def test_every_format_has_a_row_here() -> None:
    assert set(KNOWN) == set(FORMATS)


@pytest.mark.parametrize("title", FORMATS)
def test_a_format_is_detected_by_its_columns(title: str) -> None:
    (pair,) = detect_format(KNOWN[title])
    assert pair == PromptResponse(ASK if title.startswith("prompt") else [USER], ANSWER)
    assert pair.key == ASK


def test_an_empty_input_is_left_out_of_the_prompt() -> None:
    def prompt_with(given: str | None) -> str:
        (pair,) = detect_format({"instruction": ASK, "input": given, "output": ANSWER})
        return pair.key

    assert prompt_with("1, 2") == f"{ASK}\n\n### Input:\n1, 2"
    assert prompt_with("  ") == prompt_with("") == prompt_with(None) == ASK


def test_every_answer_of_a_conversation_is_learned_after_all_turns_before_it() -> None:
    turns = [("system", "Be brief."), ("human", "first"), ("gpt", "one"), ("human", "second"), ("gpt", "two")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    pairs = list(detect_format(row))
    assert [pair.response for pair in pairs] == ["one", "two"]
    assert [len(pair.prompt) for pair in pairs] == [2, 4]
    assert {pair.key for pair in pairs} == {"first"}, "one conversation, one split"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q"}, "its columns are question, and no known format has them"),
        ({}, "its columns are none"),
        ({"instruction": 5, "output": "o"}, "column 'instruction' must be text, got a int"),
        ({"instruction": "i", "input": 3, "output": "o"}, "column 'input' must be text, got a int"),
        ({"prompt": "p", "response": None}, "column 'response' must be text, got nothing"),
        ({"messages": "hello"}, "column 'messages' must be a list of turns, got a str"),
        ({"messages": []}, "column 'messages' must be a list of turns"),
        ({"messages": ["hello"]}, "turn 1 must be an object with a role and a text, got a str"),
        ({"messages": [USER]}, "must have an answer after a turn of the user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must have an answer after a turn of the user"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "turn 2 is by 'bot'; known are system, human"),
        ({"conversations": [{"from": "human"}]}, "there is no column 'value'"),
    ],
)
def test_the_fault_of_a_row_is_named(row: Row, said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        list(detect_format(row))
    assert said in str(caught.value)
