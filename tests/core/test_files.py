"""Nothing half-written under its final name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core import files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "first")

    def fail() -> None:
        with files.staged_file(target) as staging:
            staging.write_text("second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with files.staged_folder(target) as staging:
        (staging / "old").write_text("1")
    with files.staged_folder(target) as staging:
        (staging / "new").write_text("2")
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_killed_between_the_two_renames_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with files.staged_folder(target) as staging:
        (staging / "old").write_text("1")
    real = files.os.rename
    moves: list[str] = []

    def rename(source: Path, to: Path) -> None:
        if moves:
            raise KeyboardInterrupt  # as if the process ended here
        moves.append(str(to))
        real(source, to)

    fresh = tmp_path / ".partial-x-model"
    fresh.mkdir()
    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        files.replace_folder(fresh, target)
    monkeypatch.undo()
    assert not target.exists()
    removed = files.remove_staging(tmp_path)
    assert (target / "old").read_text() == "1"
    assert removed == [fresh]


def test_remove_staging_of_nothing(tmp_path: Path) -> None:
    assert files.remove_staging(tmp_path / "absent") == []
