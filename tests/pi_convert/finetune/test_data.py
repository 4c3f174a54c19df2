"""Texts, shards and windows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from converters.errors import SourceError, TokenizerError
from pi_convert.finetune import data
from pi_convert.finetune.data import Encoder, tokenise, windows
from pi_convert.finetune.documents import documents, text_files

EOS = 0


def encoder(vocabulary: int = 256) -> Encoder:
    return Encoder(lambda text: list(text.encode()), EOS, vocabulary)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["first\n", "zweite ä"]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.md").write_text(texts[1])
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pq.write_table(pa.table({"text": texts, "other": [1, 2]}), tmp_path / "d.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "e"))
    plain = [tmp_path / "a.txt", tmp_path / "b.md"]
    for given in (plain, *([tmp_path / name] for name in ("c.jsonl", "d.parquet", "e"))):
        assert list(documents(text_files(given))) == texts


def test_lines_of_jsonl_end_at_newlines_only(tmp_path: Path) -> None:
    texts = ["one\u2028two\u0085three", "four"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(rows.encode())
    assert list(documents(text_files([tmp_path]))) == texts


def test_datasets_inside_a_folder_are_found_and_damaged_ones_named(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"text": ["a b"]})
    made.save_to_disk(str(tmp_path / "in" / "one"))
    (tmp_path / "in" / "two.txt").write_text("c")
    assert list(documents(text_files([tmp_path / "in"]))) == ["a b", "c"]
    (tmp_path / "in" / "one" / "state.json").write_text("{")
    with pytest.raises(SourceError, match="no whole datasets folder"):
        list(documents(text_files([tmp_path / "in"])))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"a\0b", "binary"),
        ("x.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("x.jsonl", b'{"txt": "a"}\n', "line 1"),
        ("x.jsonl", b"{", "line 1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b \\ud800"}\n', "line 2: half a surrogate pair"),
        ("x.parquet", b"no parquet", "x.parquet"),
        ("x.json", b'[{"text": "a"}]', "x.json is a table"),
        ("x.csv", b"text\na\n", "x.csv is a table"),
        ("x.txt", b" \n", r"x\.txt: no text but white space"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=said):
        tokenise(documents(text_files([tmp_path / name])), encoder(), tmp_path / "tokens")


def test_a_folder_that_links_in_circles_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.txt").write_text("a")
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "up").symlink_to("..")
    (tmp_path / "two.txt").write_text("b")
    assert list(documents(text_files([tmp_path]))) == ["a", "b"]


def test_damaged_pages_of_parquet_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    texts = [f"a text of number {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": texts}), file, use_dictionary=False)
    assert list(documents([file])) == texts
    whole = file.read_bytes()
    for start in (4, len(whole) // 2):
        file.write_bytes(whole[:start] + b"\xff" * 200 + whole[start + 200 :])
        with pytest.raises(SourceError, match=r"x\.parquet: ") as refused:
            list(documents([file]))
        assert refused.value.hint == "Expected a whole Parquet file."


def test_a_long_document_gives_windows_of_its_own_and_short_ones_are_joined(tmp_path: Path) -> None:
    texts = ["a" * 3, "b" * 25, "c" * 4, "d" * 9]
    store = tokenise(texts, encoder(), tmp_path)
    found = [
        b"".join(bytes(store.read(*segment).astype(np.uint8)) for segment in window)
        for window in windows(store, 10)
    ]
    # In order of completion: b's own two; the rest is a, what b left, c; then d with its EOS.
    assert found == [b"b" * 10, b"b" * 10, b"aaa\0bbbbb\0", b"d" * 9 + b"\0"]


def test_text_shorter_than_a_window_is_refused_with_both_numbers(tmp_path: Path) -> None:
    store = tokenise(["abc"], encoder(), tmp_path)
    with pytest.raises(SourceError, match="4 tokens, fewer than one window of 5"):
        windows(store, 5)


def test_ids_past_the_embedding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="id 122, the embedding has 100 rows"):
        tokenise(["z"], encoder(100), tmp_path)


def test_tokenising_goes_on_at_the_first_missing_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_DOCUMENTS", 2)
    texts = ["one", "two", "three", "four", "five"]
    whole = tokenise(texts, encoder(), tmp_path / "whole")

    def broken(text: str) -> list[int]:
        if text == "four":
            raise KeyboardInterrupt
        return list(text.encode())

    with pytest.raises(KeyboardInterrupt):
        tokenise(texts, Encoder(broken, EOS, 256), tmp_path / "cut")
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return list(text.encode())

    cut = tokenise(texts, Encoder(counting, EOS, 256), tmp_path / "cut")
    assert seen == ["three", "four", "five"]
    assert np.array_equal(cut.read(0, cut.tokens), whole.read(0, whole.tokens))
    names = [path.name for path in sorted((tmp_path / "whole").iterdir())]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_pipe_is_no_text_to_train_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        text_files([tmp_path / "pipe"])
