"""generation_config.json's sampler settings: kept where their type holds them, else refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from converters.errors import SourceError
from converters.sources import open_checkpoint
from converters.targets.gguf.metadata import file_keys
from tests.tiny import write_tiny


def sampling(folder: Path, text: str) -> dict[str, object]:
    checkpoint = open_checkpoint(str(write_tiny(folder)))
    files = {"generation_config.json": text.encode()}
    keys = file_keys(dataclasses.replace(checkpoint, side_files=files), file_type=1, quantizer="")
    return {key: value for key, value in keys.items() if ".sampling." in key}


def test_settings_are_carried(tmp_path: Path) -> None:
    found = sampling(tmp_path, '{"top_k": 50.0, "top_p": 0.9, "temperature": 1}')
    assert found == {
        "general.sampling.top_k": 50,
        "general.sampling.top_p": 0.9,
        "general.sampling.temp": 1,
    }
    assert isinstance(found["general.sampling.top_k"], int)


@pytest.mark.parametrize("setting", ["top_k\": 1.7", "top_k\": 1000000000000", "top_p\": NaN",
                                     "temperature\": 1e39", "top_k\": 1" + "0" * 400])  # fmt: skip
def test_a_setting_beyond_its_type_is_refused(tmp_path: Path, setting: str) -> None:
    key = setting.split('"', maxsplit=1)[0]
    with pytest.raises(SourceError, match=rf"generation_config\.json: {key} is") as error:
        sampling(tmp_path, '{"' + setting + "}")
    assert error.value.hint


@pytest.mark.parametrize("text", ["[" * 200_000, "[1]", "{", "\xff"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match="is no JSON object") as error:
        sampling(tmp_path, text)
    assert error.value.hint
