"""Programs kept on disk: read back, damaged, too many, a folder that others can write, and none."""

import errno
import os

import pytest

from jaxpar import program_cache

CONTENT = {"text": "HloModule m", "temp_bytes": 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAR_CACHE_DIR", str(tmp_path / "programs"))
    return tmp_path / "programs"


def test_what_is_written_is_read_back_from_the_users_own_folder(folder):
    assert program_cache.read("a") is None
    program_cache.write("a", CONTENT)
    assert program_cache.read("a") == CONTENT
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["a.json.gz"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"flipped", None])
def test_what_is_damaged_is_as_if_it_was_not_there(folder, damage):
    program_cache.write("a", CONTENT)
    path = folder / "a.json.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({None: data[:-9], b"flipped": data}.get(damage, damage))
    assert program_cache.read("a") is None


def test_the_oldest_are_dropped(folder, monkeypatch):
    monkeypatch.setattr(program_cache, "_MOST", 2)
    for number, key in enumerate("abc"):
        program_cache.write(key, CONTENT)
        os.utime(folder / f"{key}.json.gz", (number, number))
    program_cache.write("d", CONTENT)
    assert [program_cache.read(key) for key in "abcd"] == [None, None, CONTENT, CONTENT]


def test_a_folder_that_others_can_write_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="can be written by others, so compiled programs are not kept"):
        program_cache.write("a", CONTENT)
    assert not list(folder.iterdir())


def test_no_folder_is_no_cache(monkeypatch):
    monkeypatch.setenv("JAXPAR_CACHE_DIR", "")
    program_cache.write("a", CONTENT)
    assert program_cache.read("a") is None


def test_without_a_named_folder_it_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXPAR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program_cache.write("a", CONTENT)
    assert (tmp_path / "jaxpar" / "a.json.gz").exists()


def test_a_folder_that_cannot_be_made_is_named_and_none_is_kept(folder):
    folder.write_text("a file")
    with pytest.warns(
        UserWarning, match="programs is no folder that can be made: .*; name another by JAXPAR_CACHE_DIR"
    ):
        program_cache.write("a", CONTENT)


def test_a_program_that_cannot_be_written_is_named_and_leaves_no_part(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="can't be kept in .*programs: No space left on device; name another folder"):
        program_cache.write("a", CONTENT)
    assert not list(folder.iterdir())
