"""Text whose tokens fill windows exactly: every file is one window, alone as in the joined text.

usage: python benchmarks/aligned_text.py MODEL.gguf FOLDER WINDOW COUNT
Writes 0.txt, 1.txt, ... and joined.txt: the Python documentation with single spaces, every window
filled up with " the". Whoever reads the files one by one and whoever cuts the joined text into
windows feeds the same tokens.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pi_convert.evaluate.texts import default_documents
from pi_convert.runtimes.llamacpp import LlamaCppTokenizer

FILLER = " the"  # one token


def main(model: str, folder: str, window: str, count: str) -> None:
    tokenizer = LlamaCppTokenizer(Path(model))

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special=False, parse_special=False))

    if tokenizer.add_bos or length(FILLER) != 1:
        sys.exit(
            "the tokenizer adds BOS, or has no token for the filler: windows cannot be aligned"
        )
    texts = list(itertools.islice(windows(int(window), length), int(count)))
    joined = "".join(texts)
    if length(joined) != int(window) * int(count) or {length(t) for t in texts} != {int(window)}:
        sys.exit("the tokens of the joined text are not those of its parts")
    for number, text in enumerate(texts):
        (Path(folder) / f"{number}.txt").write_text(text)
    (Path(folder) / "joined.txt").write_text(joined)


def windows(size: int, length: Callable[[str], int]) -> Iterator[str]:
    """Words with the space before them are tokenised each for itself, so lengths add up."""
    text, used = "", 0
    words = (word for document in default_documents() for word in document.text.split())
    for word in itertools.cycle(words):
        tokens = length(f" {word}")
        if used + tokens > size:
            yield text + FILLER * (size - used)
            text, used = "", 0
        text, used = f"{text} {word}", used + tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
