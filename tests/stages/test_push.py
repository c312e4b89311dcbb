"""``push``: what is uploaded, and what is said where the hub refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from typer.testing import CliRunner

import weaver.cli.app
from weaver.errors import WeaverError
from weaver.stages import push as stage


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


class FakeHub:
    """Records what it is asked for, or raises an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repository: str, **values: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((repository, values))

    def upload_folder(self, **values: Any) -> SimpleNamespace:
        self.calls.append((values.pop("repo_id"), values))
        return SimpleNamespace(commit_url="https://hub/me/name/commit/1")


def test_the_model_is_uploaded_without_the_stages_own_files(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr(stage, "HfApi", lambda: hub)

    words = ["push", str(model), "me/name", "--private"]
    result = CliRunner().invoke(weaver.cli.app.app, words)

    assert result.exit_code == 0, result.output
    assert result.stdout == "https://hub/me/name/commit/1\n"
    (made, uploaded) = hub.calls
    assert made == ("me/name", {"private": True, "exist_ok": True})
    assert uploaded[0] == "me/name"
    assert uploaded[1]["folder_path"] == model
    assert uploaded[1]["ignore_patterns"] == ["stage.json", "manifest.json"]


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (LocalTokenNotFoundError("no token"), "nobody is logged in", "hf auth login"),
        (OSError("no network"), "the hub did not take", "check the name"),
    ],
)
def test_what_the_hub_refuses(
    error: Exception, what: str, fix: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "HfApi", lambda: FakeHub(error))
    with pytest.raises(WeaverError, match=f"me/name: {what}") as caught:
        stage.push(str(model), "me/name")
    assert caught.value.fix.startswith(fix)


def test_only_local_folders_are_uploaded() -> None:
    with pytest.raises(WeaverError, match="somebody/model: no such folder"):
        stage.push("somebody/model", "me/name")
