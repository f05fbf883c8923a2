"""Files and folders are whole or absent, locks exclude, and a model is found where it lies."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mor import MorError, disk, run_files


class Killed(Exception):
    pass


def write_half(path: Path) -> None:
    path.write_text("half")
    raise Killed


def make_file(path: Path, content: str) -> None:
    with disk.replace_file(path) as fresh:
        write_half(fresh) if content == "half" else fresh.write_text(content)


def make_folder(out: Path, content: str) -> None:
    with disk.replace_folder(out) as fresh:
        write_half(fresh / "a") if content == "half" else (fresh / "a").write_text(content)


def hold(place: Path) -> None:
    with disk.lock(place, "busy"):
        pass


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    disk.write_whole(path, "old ü")
    with pytest.raises(Killed):
        make_file(path, "half")
    assert path.read_bytes() == "old ü".encode()
    disk.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("contended", [False, True])
def test_what_a_kill_left_does_not_stand_in_the_way(tmp_path: Path, contended: bool) -> None:
    path = tmp_path / "a.txt"
    (tmp_path / "a.txt.partial").write_text("left by a kill")
    with disk.replace_file(path, contended=contended) as fresh:
        assert (fresh.name == "a.txt.partial") is not contended
        fresh.write_text("whole")
    assert path.read_text() == "whole"


def test_a_refused_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.mkdir()  # a file cannot take the place of a folder
    with pytest.raises(IsADirectoryError if os.name == "posix" else PermissionError):
        disk.write_whole(path, "new")
    assert path.is_dir()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(Killed):
        make_folder(out, "half")
    assert os.listdir(tmp_path / "deep") == []
    make_folder(out, "whole")
    assert (out / "a").read_text() == "whole"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_folder_with_something_in_it_goes_only_where_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    disk.check_new(out)
    (out / "old").write_text("old")
    with pytest.raises(MorError, match="is a folder that is not empty; give a new folder"):
        disk.check_new(out)
    with pytest.raises(OSError, match="not empty"):
        make_folder(out, "new")
    assert os.listdir(out) == ["old"]
    with disk.replace_folder(out, overwrite=True, contended=False) as fresh:
        (fresh / "new").write_text("new")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(MorError, match="is a file; give a new folder"):
        disk.check_new(out / "new")


def test_digest_is_the_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert disk.digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_excludes_and_is_given_back(tmp_path: Path, kind: str) -> None:
    place = tmp_path if kind == "folder" else tmp_path / "lock"
    with disk.lock(place, "busy"), pytest.raises(MorError, match="busy"):
        hold(place)
    hold(place)


def test_a_model_is_found_in_its_folder_and_in_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="nor is it that of a finished run"):
        run_files.model_folder(tmp_path)
    inner = tmp_path / run_files.MODEL
    inner.mkdir()
    (inner / "config.json").write_text('{"model_type": "mor"}')
    assert run_files.model_folder(tmp_path) == run_files.model_folder(inner) == inner
    assert run_files.beside_model(tmp_path, "x.json") is None
    (inner / "x.json").write_text("{}")
    found = inner / "x.json"
    assert run_files.beside_model(tmp_path, "x.json") == found
    assert run_files.beside_model(inner, "x.json") == found


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_folder_gives_its_rights_to_what_is_in_it(tmp_path: Path, umask: int) -> None:
    """safetensors, for one, writes files that nobody but their owner may read."""
    before = os.umask(umask)
    try:
        with disk.replace_folder(tmp_path / "model") as fresh:
            (fresh / "inner").mkdir(mode=0o700)
            for path in (fresh / "model.safetensors", fresh / "inner" / "run.sh"):
                path.write_text("x")
                path.chmod(0o700 if path.suffix == ".sh" else 0o600)
            (fresh / "link").symlink_to(tmp_path)
        disk.write_whole(tmp_path / "a.txt", "x")
        disk.append_jsonl(tmp_path / "b.jsonl", {})
        with disk.lock(tmp_path / "lock", "busy"):
            pass
    finally:
        os.umask(before)
    found = {
        path.name: path.stat().st_mode & 0o777
        for path in [*(tmp_path / "model").rglob("*"), *tmp_path.iterdir()]
        if not path.is_symlink()
    }
    folder, file = 0o777 & ~umask, 0o666 & ~umask
    assert found == {
        "model": folder,
        "inner": folder,
        "run.sh": folder,
        "model.safetensors": file,
        "a.txt": file,
        "b.jsonl": file,
        "lock": file,
    }
