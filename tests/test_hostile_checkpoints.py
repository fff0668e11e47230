"""Checkpoints made to do harm: each is refused by name, or harmless, even where every digest fits.

No other exception leaves `restore` or `jaxpar checkpoint --verify`, nothing large is taken in, and nothing outside of
the folder is read or written.
"""

import gc
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpar.__main__ import main
from jaxpar.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from jaxpar.manifest import NAME, _digest_of, write_manifest

GIB = 2**30
# What JAX, Orbax and a compile take by the way.
SLACK = 2**27
ORBAX = ["_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding", "state/array_metadatas/process_0"]
OTHERS = ["commit_success.txt", "orbax.checkpoint", "state/manifest.ocdbt", "state/ocdbt.process_0/manifest.ocdbt"]
REMEDIES = ("copy it again", "delete its folder", "estore another", "Is it of another model", "upgrade jaxpar")

# What Orbax leaves of a load that fails halfway: a coroutine that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

opened: list[str] = []


def note(event, given):
    if event == "open" and isinstance(given[0], str | bytes):
        opened.append(os.fsdecode(given[0]))


# It stays for as long as Python does.
sys.addaudithook(note)


def make_state():
    return {
        "w": jnp.arange(12.0).reshape(3, 4),
        "layer/kernel": jnp.ones((8, 8), jnp.bfloat16),
        "n": jnp.int32(3),
        "key": jax.random.key(1),
    }


def like():
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state())


def bits(state):
    return {
        path: np.asarray(jax.random.key_data(leaf) if path == "key" else leaf).tobytes() for path, leaf in state.items()
    }


@pytest.fixture(autouse=True, scope="module")
def _coroutines_end_here():
    yield
    # Once: it goes through all that earlier files left, which took longer than the test before it.
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2, and JAX and Orbax warm."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, every=1) as checkpoints:
        for number in (1, 2):
            checkpoints.save(make_state(), step=number, data={"drawn": number})
        checkpoints.restore(like())
    return folder


class Place:
    """A copy of the folder, and a folder outside of it that must not be touched."""

    def __init__(self, saved, where):
        self.folder, self.outside = where / "run", where / "outside"
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.outside, ignore_errors=True)
        shutil.copytree(saved, self.folder)
        shutil.copytree(saved / "2", self.outside / "2")
        (self.outside / "secret").write_text("{}")
        self.last = self.folder / "2"

    def reseal(self):
        """Writes a manifest that fits what is there now, as one who means harm does."""
        content = json.loads((self.last / NAME).read_text())["content"]
        (self.last / NAME).unlink()
        write_manifest(self.last, content)

    def seen(self):
        return {path: path.read_bytes() for path in sorted(self.outside.rglob("*")) if path.is_file()}


def check(place, capsys, *, same=True):
    """Nothing but a CheckpointError that says what and what to do, or the very state (or one of its shapes)."""
    outside = place.seen()
    for path in outside:
        # Read again, it would be newer.
        os.utime(path, (0, path.stat().st_mtime))
    opened.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = "harmless"
    with Checkpoints(place.folder, every=1) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CheckpointWarning)
        for step in (2, None):
            try:
                found = checkpoints.restore(like(), step=step)
            except CheckpointError as error:
                outcome = "refused"
                check_message(str(error), place)
            else:
                assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found.state) == jax.tree.map(
                    lambda leaf: (leaf.shape, leaf.dtype), make_state()
                )
                assert not same or bits(found.state) == bits(make_state())
    assert main(["checkpoint", str(place.folder), "--verify"]) in (0, 1, 2)
    told = capsys.readouterr()
    assert "Traceback" not in told.out
    told.out.encode()
    assert main(["checkpoint", str(place.folder), "--json"]) in (0, 1, 2)
    json.loads(capsys.readouterr().out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < SLACK
    assert not [path for path in opened if path.startswith(str(place.outside))]
    # TensorStore opens files that Python doesn't see.
    assert not [path for path in outside if path.stat().st_atime]
    assert place.seen() == outside
    return outcome


def check_message(message, place):
    assert str(place.folder) in message or "Checkpoint 2 " in message
    assert any(remedy in message for remedy in REMEDIES), message
    assert "\n" not in message
    message.encode()


# a manifest that is none


def sparse(path, size=2**29):
    """Zeros that take no room on the disk."""
    path.unlink()
    with path.open("wb") as file:
        file.truncate(size)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_link(path):
    target = path.parent.parent / "elsewhere"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)


TEXTS = {
    "empty": b"",
    "no utf-8": b"\xff\xfe{",
    "null": b"null",
    "number": b"3",
    "list": b"[]",
    "string": b'"text"',
    "half": b'{"format": 1,',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep whole": b"[" * 100_000 + b"]" * 100_000,
    "deep inside": b'{"files":{},"format":1,"digest":"","content":' + b"[" * 900 + b"]" * 900 + b"}",
    "long number": b"9" * 10_000,
    "not a number": b'{"format": NaN, "files": {}, "content": {}}',
    "infinite": b'{"format": 1e999, "files": {}, "content": {}}',
    "no dtype": b'{"format": 1, "files": {}, "content": {"leaves": {"w": [[3, 4], "\\ud800"]}}}',
    "lone surrogate": b'{"format": 1, "files": {"\\ud800": [1, "x"]}, "content": {}}',
    "twice": b'{"format": 1, "format": 2, "files": {}, "files": [], "content": {}}',
}
SHAPES = {"sparse": sparse, "folder": as_folder, "pipe": as_pipe, "link": as_link, "gone": pathlib.Path.unlink}


# All of the manifest; of Orbax's files, what differs between them and it.
FAST = {(NAME, kind) for kind in (*TEXTS, *SHAPES)} | {
    ("state/_METADATA", kind) for kind in ("null", "deep whole", "link", "pipe", "no utf-8")
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in FAST else pytest.mark.slow)
        for name in (NAME, *ORBAX, *OTHERS)
        for kind in (*TEXTS, *SHAPES)
    ],
)
def test_a_file_that_is_something_else(saved, tmp_path, capsys, name, kind):
    for is_sealed in (False, True):
        place = Place(saved, tmp_path)
        path = place.last / name
        if name == NAME and is_sealed:
            continue
        path.write_bytes(TEXTS[kind]) if kind in TEXTS else SHAPES[kind](path)
        if is_sealed:
            try:
                place.reseal()
            except ValueError:
                # Who means harm doesn't ask jaxpar to: but what it would not write, it doesn't read either.
                continue
        outcome = check(place, capsys)
        if not is_sealed and (kind, name) != ("empty", "orbax.checkpoint"):
            assert outcome == "refused"


# one value changed for another, its digests right


VALUES = [
    None, True, -1, 0, 1, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../../outside", "/etc/passwd",
    "\ud800", "a\0b", "9" * 1000, [], {}, [[]], [-1], [2**40], [2**40] * 3, ["x"], {"a": None}, {"../../outside": 1},
]  # fmt: skip
KEYS = ["../../outside/2", "/etc/passwd", "", "a\0b", "\ud800", "..", "state", "x" * 5000]


def spots(value, path=()):
    """Where a JSON value can be changed."""
    yield path
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(part, (*path, name))


def changed(value, path, change, new):
    """A JSON value with another one, or another key, or nothing in one place."""
    if not path:
        return new
    first, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[first] = changed(copy[first], rest, change, new)
    elif change == "drop":
        del copy[first]
    elif change == "rename" and isinstance(copy, dict):
        copy = {(new if name == first else name): part for name, part in copy.items()}
    elif change == "add" and isinstance(copy, dict):
        copy[new] = copy[first]
    else:
        copy[first] = new
    return copy


def alter(place, name, pick, change, value, key):
    """Changes one value of a file and makes every digest fit; returns what it did."""
    path = place.last / name
    told = json.loads(path.read_text())
    places = list(spots(told))
    where = places[pick % len(places)]
    new = key if change in ("rename", "add") and where else value
    told = changed(told, where, change, new)
    if name == NAME:
        if isinstance(told, dict) and where != ("digest",):
            told.pop("digest", None)
            told["digest"] = _digest_of(told)
        path.write_text(json.dumps(told))
    else:
        path.write_text(json.dumps(told))
        place.reseal()
    return where, change, new


CASES = {
    "name": st.sampled_from([NAME, NAME, *ORBAX]),
    "pick": st.integers(0, 400),
    "change": st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add"]),
    "value": st.sampled_from(VALUES),
    "key": st.sampled_from(KEYS),
}
QUICK = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=12, **QUICK)
@given(**CASES)
def test_a_value_changed_for_another(saved, tmp_path, capsys, name, pick, change, value, key):
    place = Place(saved, tmp_path)
    alter(place, name, pick, change, value, key)
    check(place, capsys)


@pytest.mark.slow
@settings(max_examples=150, **QUICK)
@given(**CASES)
def test_many_values_changed_for_others(saved, tmp_path, capsys, name, pick, change, value, key):
    place = Place(saved, tmp_path)
    alter(place, name, pick, change, value, key)
    check(place, capsys)


BYTES = {
    "name": st.sampled_from([*ORBAX, "state/manifest.ocdbt", "state/ocdbt.process_0/manifest.ocdbt", "d", "d", "d"]),
    "at": st.floats(0, 1, exclude_max=True),
    "how": st.sampled_from(["flip", "flip", "cut", "grow", "zero"]),
    "bit": st.integers(0, 7),
}


def damage(place, name, at, how, bit):
    """Changes bytes of a file, and makes every digest fit."""
    path = next((place.last / "state" / "d").iterdir()) if name == "d" else place.last / name
    data = bytearray(path.read_bytes())
    spot = int(at * len(data))
    if how == "flip":
        data[spot] ^= 1 << bit
    elif how == "zero":
        data[spot : spot + 8] = bytes(8)
    path.write_bytes(data[:spot] if how == "cut" else data + b"\0" * 99 if how == "grow" else data)
    place.reseal()


@settings(max_examples=10, **QUICK)
@given(**BYTES)
def test_bytes_changed_with_their_digests(saved, tmp_path, capsys, name, at, how, bit):
    place = Place(saved, tmp_path)
    damage(place, name, at, how, bit)
    check(place, capsys, same=False)


@pytest.mark.slow
@settings(max_examples=75, **QUICK)
@given(**BYTES)
def test_many_bytes_changed_with_their_digests(saved, tmp_path, capsys, name, at, how, bit):
    place = Place(saved, tmp_path)
    damage(place, name, at, how, bit)
    check(place, capsys, same=False)


# what lies in the folder


def link_file(place):
    path = place.last / "state" / "_sharding"
    path.unlink()
    path.symlink_to(place.outside / "2" / "state" / "_sharding")


def link_folder(place):
    shutil.rmtree(place.last / "state" / "d")
    (place.last / "state" / "d").symlink_to(place.outside / "2" / "state" / "d")


def link_state(place):
    shutil.rmtree(place.last / "state")
    (place.last / "state").symlink_to(place.outside / "2" / "state")


def link_step(place):
    shutil.rmtree(place.last)
    place.last.symlink_to(place.outside / "2")


def link_round(place):
    (place.last / "state" / "more").symlink_to(place.last)


def file_for_step(place):
    shutil.rmtree(place.last)
    place.last.write_text("a file")


def deep_folders(place):
    where = place.last
    for _ in range(40):
        where = where / "a"
    where.mkdir(parents=True)


def odd_names(place):
    (place.last / "a\nb\x1b[31m").write_text("")
    (place.last / os.fsdecode(b"\xff\xfe")).write_text("")


TREES = {
    function.__name__: function
    for function in (
        link_file,
        link_folder,
        link_state,
        link_step,
        link_round,
        file_for_step,
        deep_folders,
        odd_names,
    )
}


@pytest.mark.parametrize("kind", TREES)
def test_a_folder_that_holds_something_else(saved, tmp_path, capsys, kind):
    place = Place(saved, tmp_path)
    TREES[kind](place)
    assert check(place, capsys) == "refused"


def test_folders_too_deep_to_remove_stop_no_run(saved, tmp_path):
    place = Place(saved, tmp_path)
    before = pathlib.Path.cwd()
    os.chdir(place.last)
    try:
        for _ in range(1500):
            os.mkdir("a")
            os.chdir("a")
        os.chdir(before)
        with Checkpoints(place.folder, every=1, keep=1) as checkpoints:
            with pytest.raises(CheckpointError, match="lies more than 16 folders deep"):
                checkpoints.restore(like(), step=2)
            for number in (3, 4):
                checkpoints.save(make_state(), step=number)
            checkpoints.wait()
            assert checkpoints.restore(like()).step == 4
    finally:
        os.chdir(before)
        # Python's own would go too deep, and pytest's after it.
        subprocess.run(["rm", "-rf", str(place.folder)], check=True)


def test_a_link_is_refused_though_no_digest_is_compared(saved, tmp_path):
    for kind in ("link_file", "link_folder", "link_state", "link_step"):
        place = Place(saved, tmp_path)
        TREES[kind](place)
        with Checkpoints(place.folder) as checkpoints:
            with pytest.raises(CheckpointError, match=r"/run/2.* is a link; .*copy it again"):
                checkpoints.restore(like(), step=2, verify=False)
            with pytest.warns(CheckpointWarning, match="is a link") if kind != "link_step" else pytest.warns():
                assert checkpoints.restore(like()).step == 1


@pytest.mark.parametrize("name", ["007", "-1", "1e3", "+3", "٣", "3.0", "0x5", " 5", "2147483648", "9" * 200, "²"])
def test_names_that_are_no_steps(saved, tmp_path, capsys, name):
    place = Place(saved, tmp_path)
    shutil.copytree(place.last, place.folder / name)
    with Checkpoints(place.folder) as checkpoints:
        assert checkpoints.steps == [1, 2]
    assert check(place, capsys) == "harmless"
    main(["checkpoint", str(place.folder), "--json"])
    assert [told["step"] for told in json.loads(capsys.readouterr().out)] == [1, 2]


def test_a_save_writes_through_no_link(saved, tmp_path):
    place = Place(saved, tmp_path)
    for name in ("5", "6.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp"):
        (place.folder / name).symlink_to(place.outside / "2")
    before = place.seen()
    with Checkpoints(place.folder, every=1, keep=1) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"Step 5 can't be saved: .*run/5 is a link, to a folder elsewhere; remo"
        ):
            checkpoints.save(make_state(), step=5)
        for number in (6, 7, 8):
            checkpoints.save(make_state(), step=number)
        checkpoints.wait()
        assert 8 in checkpoints.steps
    assert place.seen() == before


# arrays that are larger than they say


def store_of(place):
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{place.last}/state/"}).result()


def change_array(place, name, change):
    """Changes what the store itself tells of an array, as nobody does by accident."""
    store = store_of(place)
    told = json.loads(store.read(f"{name}/zarr.json").result().value)
    change(told)
    store.write(f"{name}/zarr.json", json.dumps(told).encode()).result()
    place.reseal()


def huge_part(told):
    told["chunk_grid"]["configuration"]["chunk_shape"] = [2**14, 2**14]
    told["codecs"] = told["codecs"][0]["configuration"]["codecs"]


def huge_inner_part(told):
    told["chunk_grid"]["configuration"]["chunk_shape"] = [2**14, 2**14]
    told["codecs"][0]["configuration"]["chunk_shape"] = [2**14, 2**14]


def huge_array(told):
    told["shape"] = [2**15, 2**15]


def other_dtype(told):
    told["data_type"] = "float64"


def no_dims(told):
    told["shape"] = []


def no_codec(told):
    told["codecs"] = [{"name": "nothing"}]


ARRAYS = {
    function.__name__: function for function in (huge_part, huge_inner_part, huge_array, other_dtype, no_dims, no_codec)
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_of_another_size_is_refused_before_it_is_read(saved, tmp_path, capsys, kind):
    place = Place(saved, tmp_path)
    change_array(place, "w", ARRAYS[kind])
    assert check(place, capsys) == "refused"


def zeros_in_zstd(size):
    """Zeros as a Zstandard frame: runs of 128 KiB, four bytes each."""
    count = size // 2**17
    blocks = ((2**17 << 3 | 1 << 1 | (number == count - 1)).to_bytes(3, "little") + b"\0" for number in range(count))
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(blocks)


def test_a_part_that_unpacks_to_a_gibibyte_is_refused(saved, tmp_path, capsys):
    place = Place(saved, tmp_path)

    def unpacked(told):
        told["codecs"] = told["codecs"][0]["configuration"]["codecs"]

    store_of(place).write("w/c/0/0", zeros_in_zstd(GIB)).result()
    change_array(place, "w", unpacked)
    assert check(place, capsys) == "refused"
