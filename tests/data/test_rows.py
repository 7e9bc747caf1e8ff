"""What a row of each format becomes, and what is said of one that is of none."""

import pytest

from dylo_moe.data.rows import FORMATS, Exchange, Row, by_columns
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
def test_a_format_is_known_by_its_columns(title: str) -> None:
    (exchange,) = by_columns(KNOWN[title])
    assert exchange == Exchange(ASK if title.startswith("prompt") else [USER], ANSWER)
    assert exchange.key == ASK


def test_input_is_shown_only_where_there_is_some() -> None:
    def asked(given: str | None) -> str:
        (exchange,) = by_columns({"instruction": ASK, "input": given, "output": ANSWER})
        return exchange.key

    assert asked("1, 2") == f"{ASK}\n\n### Input:\n1, 2"
    assert asked("  ") == asked("") == asked(None) == ASK


def test_every_answer_of_a_conversation_is_learned_after_all_turns_before_it() -> None:
    turns = [("system", "Be brief."), ("human", "first"), ("gpt", "one"), ("human", "second"), ("gpt", "two")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    exchanges = list(by_columns(row))
    assert [exchange.response for exchange in exchanges] == ["one", "two"]
    assert [len(exchange.prompt) for exchange in exchanges] == [2, 4]
    assert {exchange.key for exchange in exchanges} == {"first"}, "one conversation, one split"


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
def test_what_is_wrong_is_said(row: Row, said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        list(by_columns(row))
    assert said in str(caught.value)
