"""Tests of the file readers: the rows of each kind of file, and messages that name file and line."""

import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset

from dylo_moe.data import readers
from dylo_moe.data.readers import data_files, digest_of, rows_of
from dylo_moe.errors import DatasetError

ROWS = [{"prompt": f"prompt {index} \u00e9\n", "response": f'"{index}"'} for index in range(25)]


def write(path: Path, kind: str) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        Dataset.from_list(ROWS).to_parquet(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_each_kind_of_file_gives_its_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}", kind)
    assert [dict(row) for _, row in rows_of(path)] == ROWS


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_an_array_is_read_in_windows_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = write(tmp_path / "rows.json", "json")
    found = list(rows_of(path))
    assert [dict(row) for _, row in found] == ROWS
    lines = path.read_text().splitlines()
    for where, row in found:
        number = int(where.rpartition(" ")[2])
        assert lines[number - 1].strip() == "{" and json.dumps(row["prompt"], ensure_ascii=False) in lines[number]


def test_a_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "response": "r"}\n\n{"prompt": "q", "response": "s"}\n')
    assert list(rows_of(path)) == [
        (f"{path} line 1", {"prompt": "p", "response": "r"}),
        (f"{path} line 3", {"prompt": "q", "response": "s"}),
    ]


def test_a_folder_stands_for_its_data_files_sorted_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    names = ["c.jsonl", "a.jsonl", "b/z.jsonl"]
    for name in names:
        write(tmp_path / name, "jsonl")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    assert data_files(tmp_path) == [tmp_path / name for name in ("a.jsonl", "b/z.jsonl", "c.jsonl")]


def test_a_digest_depends_on_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "jsonl")
    before = digest_of([path])
    assert digest_of([path]) == before
    path.write_text(path.read_text() + "\n")
    assert digest_of([path]) != before


def broken(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        list(rows_of(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


GOOD = b'{"prompt": "p", "response": "r"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", GOOD + b"\n{broken\n", "line 2 is broken JSON"),
        ("a.jsonl", GOOD + b"\n[1, 2]\n", "line 2 must be an object with columns, got a list"),
        ("a.jsonl", GOOD + b"\n\xff\xfe\n", "line 2 is not UTF-8 (byte 0xff)"),
        ("a.json", b"[" + GOOD + b",\n" + GOOD[:-1], "line 2 is broken JSON"),
        ("a.json", b"[" + GOOD + b",\n" + GOOD, "line 2 is broken JSON: the list does not end"),
        ("a.json", b"[" + GOOD + b",\n\n17]", "line 3 must be an object with columns, got a int"),
        ("a.json", b"[" + GOOD + b',\n{"prompt": "\xe4"}]', "line 2 is not UTF-8 (byte 0xe4)"),
        ("a.csv", b"prompt,response\na,b\nc\n", "line 3 does not have as many fields as the header"),
        ("a.csv", b'prompt,response\na,"b\n', "broken CSV"),
        ("a.csv", b"prompt,response\na,\xfc\n", "line 2 is not UTF-8 (byte 0xfc)"),
        ("a.jsonl.gz", b"no gzip at all", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"no parquet", "is not a Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    message = broken(tmp_path / name, content)
    assert str(tmp_path / name) in message and said in message


@pytest.mark.parametrize("name", ["long.jsonl", "long.json", "long.csv"])
def test_a_row_of_100_mb_is_refused_without_being_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    before, after = {
        "long.jsonl": (b'{"prompt": "p", "response": "', b'"}\n'),
        "long.json": (b'[\n{"prompt": "p", "response": "', b'"}]'),
        "long.csv": (b"prompt,response\np,", b"\n"),
    }[name]
    with path.open("wb") as file:
        file.write(before)
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(after)
    tracemalloc.start()
    with pytest.raises(DatasetError, match=r"line [12] is longer than 8 MB") as caught:
        list(rows_of(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 80 * 2**20


def test_a_cycle_of_links_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "rows.jsonl", "jsonl")
    (folder / "again").symlink_to(folder)
    with pytest.raises(DatasetError, match=r"the link .*again leads back to .*folder"):
        data_files(folder)
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(DatasetError, match=r"one cannot be followed"):
        data_files(tmp_path / "one")


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    write(tmp_path / "there" / "rows.jsonl", "jsonl")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    assert data_files(tmp_path / "here") == [tmp_path / "here" / "link" / "rows.jsonl"]


def test_paths_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no file or folder .*missing"):
        data_files(tmp_path / "missing")
    with pytest.raises(DatasetError, match="has no data file"):
        data_files(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"notes.txt is not a data file; give a folder or a file of .jsonl"):
        data_files(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DatasetError, match=r"pipe.jsonl is not a data file"):
        data_files(tmp_path / "pipe.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "jsonl")
    path.chmod(0)
    with pytest.raises(DatasetError, match=r"rows.jsonl cannot be read: .*Permission"):
        list(rows_of(path))
