"""Windows cover every token once, at the right positions, in chunks that runtimes take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.errors import SourceError
from pi_convert.evaluate.texts import Document, default_documents, read_documents
from pi_convert.evaluate.windows import TokenStream, Window, encode_documents, in_lockstep
from pi_convert.runtimes.base import CHUNK_TOKENS


class Recorder:
    """A session that writes down what it is fed and answers with the token itself."""

    def __init__(self) -> None:
        self.fed: list[tuple[int, int, bool]] = []

    def feed(self, tokens: np.ndarray, *, position: int, logits: bool) -> np.ndarray | None:
        assert 0 < len(tokens) <= CHUNK_TOKENS
        self.fed.append((position, len(tokens), logits))
        return tokens[:, None].astype(np.float32) if logits else None

    def close(self) -> None: ...


def stream(count: int) -> TokenStream:
    tokens = np.arange(count, dtype=np.int32)
    return TokenStream(tokens, tokens // 100)


@pytest.mark.parametrize(
    ("count", "position", "scored_from"),
    [(1300, 0, 700), (1300, 65_000, 65_000), (5, 0, 4), (512, 0, 256)],
)
def test_scored_positions_come_once_with_the_token_that_follows(
    count: int, position: int, scored_from: int
) -> None:
    session = Recorder()
    window = Window("w", stream(count), position, scored_from)
    chunks = list(in_lockstep(window, [session, Recorder()], "stage"))
    seen = np.concatenate([chunk.logits[1][:, 0] for chunk in chunks])
    following = np.concatenate([chunk.following for chunk in chunks])
    assert np.array_equal(seen, np.arange(scored_from - position, count))
    assert np.array_equal(following[:-1], seen[1:])
    assert following[-1] == -1
    assert window.scored == len(seen)
    starts = [p for p, _, _ in session.fed]
    assert starts == [position + n for n in np.cumsum([0, *(n for _, n, _ in session.fed[:-1])])]
    assert sum(n for _, n, _ in session.fed) == count


def test_documents_are_encoded_until_there_is_enough_and_start_over() -> None:
    documents = [Document(str(i), "ab" * 10) for i in range(5)]
    found = encode_documents(documents, lambda text: list(text.encode()), at_least=30)
    assert len(found.tokens) == 44  # two documents of 20 bytes and two newlines
    longer = found.take(100)
    assert np.array_equal(longer.tokens[44:88], found.tokens)
    assert np.array_equal(np.unique(found.document), [0, 1])


def test_documents_are_cut_and_single_tokens_left_out() -> None:
    numbers = np.array([0, 0, 0, 1, 2, 2], dtype=np.int32)
    runs = TokenStream(np.arange(6, dtype=np.int32), numbers).documents(5, 2)
    assert [list(run.tokens) for run in runs] == [[0, 1], [4, 5]]


def test_the_default_text_is_in_one_order() -> None:
    names = [document.name for document in default_documents()]
    assert names == sorted(names)
    assert len(names) > 50


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/a.md", "a.TXT", "weights.bin", "b/b.json", ".DS_Store"):
        (tmp_path / name).write_text(name)
    (tmp_path.parent / "alone.json").write_text("alone")
    given = [tmp_path.parent / "alone.json", tmp_path]
    assert [d.text for d in read_documents(given)] == ["alone", "a.TXT", "b/a.md", "c.txt"]


def test_a_text_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary.txt", "missing.txt"):
        with pytest.raises(SourceError, match=name):
            read_documents([tmp_path / name])
