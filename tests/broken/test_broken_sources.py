"""Every bad input is one clear error, with what to do; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import ConvertError
from converters.sources import open_checkpoint
from converters.targets.huggingface import write_folder
from tests.broken.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opening_or_writing_is_one_clear_error(tmp_path: Path, case: Case) -> None:
    reference = case.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConvertError) as error:
        if case.found_on == "open":
            open_checkpoint(reference)
        else:
            checkpoint = open_checkpoint(reference)  # negative control: it opens
            write_folder(checkpoint.interpolate(8), tmp_path / "out")
    for text in case.says:
        assert text in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 1000
    assert error.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_checkpoint_that_the_cases_spoil_is_right(tmp_path: Path) -> None:
    """Negative control: what each case is built from opens and is written."""
    from tests.tiny import write_tiny
    from tests.tiny_gguf import write_tiny_gguf

    folder = write_tiny(tmp_path / "Tiny-Model")
    write_tiny(tmp_path / "Sharded", shards=3)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", folder)
    for name, reference in (("a", folder), ("b", tmp_path / "Sharded"), ("c", path)):
        write_folder(open_checkpoint(str(reference)).interpolate(8), tmp_path / name)
