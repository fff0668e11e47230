"""Text: read in one order, split in one way, drawn by the seed alone."""

import os
import socket

import numpy as np
import pytest

from jaxpar import text
from jaxpar.text import TextError, draw_batches, even_batches, read_text

FILES = {f"{letter}/{number}.txt": f"{letter}{number};" for letter in "ba" for number in range(6)}
LEFT_OUT = {".hidden": "no", ".git/config": "no", "c/binary": "no\0no", "c/empty": ""}


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_files_come_in_the_order_of_their_paths_and_every_tenth_is_held_out(tmp_path):
    read = read_text(write_files(tmp_path, FILES | LEFT_OUT))
    assert read.train.tobytes() == b"a0;a1;a2;a3;a4;a5;b0;b1;b2;b4;b5;"
    assert read.held_out.tobytes() == b"b3;"
    assert read.num_files == 12


def test_of_fewer_than_ten_files_the_last_tenth_is_held_out(tmp_path):
    read = read_text(write_files(tmp_path, {"1": "abcde", "2": "fghij"}))
    assert (read.train.tobytes(), read.held_out.tobytes()) == (b"abcdefghi", b"j")


def test_one_file_is_text_whatever_its_name(tmp_path):
    read = read_text(write_files(tmp_path, {".notes": "0123456789" * 3}) / ".notes")
    assert len(read.train) == 27
    assert read.held_out.tobytes() == b"789"


def test_by_default_the_standard_library_of_this_python_is_read():
    read = read_text()
    assert read.num_files > 100
    assert b"def namedtuple(" in read.train.tobytes() + read.held_out.tobytes()


def test_of_the_standard_library_tests_and_installed_packages_are_left_out(tmp_path, monkeypatch):
    left_out = ["test/a.py", "json/tests/a.py", "site-packages/a/b.py", "dist-packages/a.py", "config.txt"]
    write_files(tmp_path, dict.fromkeys(left_out, "no") | {"json/a.py": "0123456789"})
    monkeypatch.setattr(text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    read = read_text()
    assert (read.num_files, read.train.tobytes(), read.held_out.tobytes()) == (1, b"012345678", b"9")


def test_reading_twice_gives_the_same():
    first, second = read_text(), read_text()
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.held_out, second.held_out)


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "none", "none' does not exist; give a file or a folder."),
        ({}, "", "gives 0 bytes to train on and 0 held out, from 0 text files, but each part needs at least 9;"),
        ({"tiny": "hello"}, "tiny", "gives 5 bytes to train on and 0 held out, from 1 text file,"),
        ({"binary": "\0" * 999}, "binary", "gives 0 bytes to train on and 0 held out, from 0 text files,"),
    ],
)
def test_text_that_is_not_there_or_too_short_is_named(tmp_path, files, path, message):
    write_files(tmp_path, files)
    with pytest.raises(TextError) as error:
        read_text(tmp_path / path, min_bytes=9)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_is_neither_file_nor_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(TextError, match=r"Text 'socket' is neither a file nor a folder; give one of them."):
            read_text("socket")


def test_text_too_long_for_memory_is_named_before_it_is_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        os.truncate(file.fileno(), text.MAX_BYTES + 1)
    with pytest.raises(TextError, match=r"has 1,073,741,825 bytes, but at most 1,073,741,824 are read; give a part"):
        read_text(tmp_path / "sparse")


def test_batches_come_from_the_seed_alone():
    data = np.arange(1000)
    draw = lambda seed, steps: [
        batch["x"].tolist() for batch in draw_batches(data, batch_size=4, seq_len=5, seed=seed, steps=steps)
    ]
    assert draw(0, 5)[:3] == draw(0, 3)
    assert draw(0, 3) != draw(1, 3)
    assert len({str(rows) for rows in draw(0, 5)}) == 5


def test_each_byte_is_followed_by_its_target_to_the_very_end():
    seen = set()
    for batch in draw_batches(np.arange(6), batch_size=50, seq_len=5, seed=0, steps=2):
        assert np.array_equal(batch["y"], batch["x"] + 1)
        seen |= set(batch["y"].ravel().tolist())
    assert seen == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("max_windows", [1, 3, 7, 100])
def test_held_out_windows_never_overlap_and_spread_over_the_data(max_windows):
    data = np.arange(10 * 8 + 3)
    batches = list(even_batches(data, batch_size=4, seq_len=8, max_windows=max_windows))
    rows = np.concatenate([batch["x"] for batch in batches])
    assert len(rows) == min(max_windows, 10)
    assert len(np.unique(rows)) == rows.size
    assert rows[0, 0] == 0
    assert max_windows == 1 or rows[-1, -1] == 79
