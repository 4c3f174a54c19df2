"""Hub ids that give no model: each is one clear error with the line that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors

from converters.errors import SourceError
from converters.sources import open_checkpoint

HUB_ID = "some-org/Tiny-1M"
COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub" / "models--some-org--Tiny-1M"


def refused(
    monkeypatch: pytest.MonkeyPatch, error: Exception, revision: str | None = None
) -> SourceError:
    def snapshot_download(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SourceError) as raised:
        open_checkpoint(HUB_ID, revision=revision)
    assert raised.value.message.startswith(HUB_ID)
    return raised.value


def answer(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """The error without the response that it is made from, whose library depends on the version."""
    error = kind.__new__(kind)
    error.args = (f"{status} from the hub\n\nwith more below",)
    return error


def test_a_wrong_id(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, answer(errors.RepositoryNotFoundError, 404))
    assert "no such model on the hub" in error.message
    assert "https://huggingface.co/models?search=Tiny-1M" in error.hint
    assert "hf auth login" in error.hint


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, answer(errors.GatedRepoError, 403))
    assert "licence" in error.message
    assert f"https://huggingface.co/{HUB_ID}, then run: hf auth login" in error.hint


def test_a_wrong_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, answer(errors.RevisionNotFoundError, 404), "v9")
    assert "at revision v9: the hub has no such revision" in error.message
    assert f"https://huggingface.co/{HUB_ID}/commits/main" in error.hint


def test_an_answer_that_nobody_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, answer(errors.HfHubHTTPError, 503))
    assert error.message == f"{HUB_ID}: 503 from the hub with more below"
    assert error.hint == f"Check the network and try again: hf download {HUB_ID}"


def test_no_network_and_nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, errors.LocalEntryNotFoundError("no network"), "v 9")
    assert "the model is not in the cache" in error.message
    assert "the hub is out of reach" in error.message
    line = f"hf download {HUB_ID} --revision 'v 9'"
    assert error.hint == f"Run once with a network: {line}"


def test_a_revision_that_is_not_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in (COMMIT, OLDER):
        (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs" / "pr").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    (cache / "refs" / "pr" / "1").write_text("e" * 40)  # a branch whose snapshot is not here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(monkeypatch, errors.LocalEntryNotFoundError("offline"), "v9")
    assert "the revision is not in the cache" in error.message
    assert "HF_HUB_OFFLINE is set" in error.message
    assert f"HF_HUB_OFFLINE=0 hf download {HUB_ID} --revision v9; or " in error.hint
    assert error.hint.endswith(f"give a --revision that is cached: main, {OLDER}")


def test_what_is_no_hub_id() -> None:
    with pytest.raises(SourceError, match="it is no hub id") as raised:
        open_checkpoint("some--org/Tiny-")
    assert "organization/name" in raised.value.hint
