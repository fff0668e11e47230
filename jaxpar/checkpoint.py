"""Checkpoints that move: saved under one layout, restored under any other, and refused where a bit has changed."""

import contextlib
import json
import pathlib
import shutil
import tempfile
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpar.agreement import agree, all_ready
from jaxpar.failures import explained, hush_orbax, tell_cause
from jaxpar.integers import is_integer
from jaxpar.layout import format_bytes
from jaxpar.manifest import (
    ManifestError,
    NewerFormatError,
    check_manifest,
    has_manifest,
    list_files,
    read_digest,
    read_manifest,
    write_manifest,
)
from jaxpar.saved_files import BEFORE, FAILED, NEW, check_files, put_back, read_content, remove, replace, step_of
from jaxpar.saved_leaves import (
    CheckpointError,
    abstract_leaf,
    as_key_like,
    check_leaves,
    check_loaded,
    check_step,
    check_stored,
    dtype_of,
    leaves_of,
    size_of,
)
from jaxpar.stacklevel import warn_caller
from jaxpar.state import is_key, named_leaves

# How long a process waits for the others' parts: Orbax doesn't learn that one of them failed. At most its own default.
_LEAST_SECONDS, _BYTES_A_SECOND, _MOST_SECONDS = 120, 10**7, 1200
_GRACE_SECONDS = 2
_NEXT = "; save one first, or give the folder that holds them (its subfolders are numbers)."


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over or could not be written, or a run went back to one: what happened, and what now.

    `warnings.simplefilter("error", CheckpointWarning)` ends a run where it would only be told.
    """


class _Saving(NamedTuple):
    """A save under way, and why it failed if it did."""

    number: int
    thread: threading.Thread
    failed: list[Exception]


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives.

    Attributes:
      state: laid out as the one it was given.
      step: the number under which it was saved.
      data: what was saved beside it; None if nothing was.
    """

    state: Any
    step: int
    data: Any


class Checkpoints:
    """A folder of checkpoints, the last few kept: of states of any strategy, mesh and number of processes.

    Orbax writes them, while the steps go on. Then a manifest with a SHA-256 digest of each file is written; a
    checkpoint without one was not finished, and one with another digest is damaged: neither is restored. Every process
    calls the same methods, in the same order. Use it in a `with`, or `close` it.

    Args:
      directory: the folder, one that all processes see; it is made if it isn't there.
      every: `save` saves where the step divides by it.
      keep: how many to keep, the latest; None for all.

    Raises:
      CheckpointError: the folder can't be made or written, or a number can't be.

    >>> import jaxpar, optax, tempfile
    >>> from flax import nnx
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.adam(1e-3))
    >>> one, all_of_them = jaxpar.data_parallel(), jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP)
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, every=1) as checkpoints:
    ...     _ = checkpoints.save(one.init(init_fn, jax.random.key(0)))
    ...     restored = checkpoints.restore(all_of_them.abstract_state(init_fn))
    >>> restored.step, restored.state.params["kernel"].sharding.spec
    (0, P('fsdp', None))
    """

    def __init__(self, directory: str | pathlib.Path, *, every: int = 1000, keep: int | None = 3):
        if not isinstance(directory, str | pathlib.Path) or not str(directory) or "\0" in str(directory):
            raise CheckpointError(f"directory is {directory!r}; give the path of a folder.")
        if "://" in str(directory):
            raise CheckpointError(
                f"directory is {str(directory)!r}, a store's address; give a folder, as of a mounted bucket, that all "
                "processes see."
            )
        for name, number in (("every", every), ("keep", keep)):
            if number is None and name == "keep":
                continue
            if not is_integer(number):
                raise CheckpointError(f"{name} is {number!r}; give a whole number, 1 or more.")
        self.directory, self.every, self.keep = pathlib.Path(directory).expanduser().absolute(), int(every), keep
        self._saving: _Saving | None = None
        # What is of this run is not pruned before what was there already, whose steps may be later ones.
        self._written: set[int] = set()
        # Begun, and not known to be whole.
        self._unfinished: int | None = None
        with explained(f"The checkpoint folder {self.directory} can't be made"):
            self.directory.mkdir(parents=True, exist_ok=True)
        put_back(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps that are there and finished, in order."""
        try:
            found = [step_of(path.name) for path in self.directory.iterdir()]
            return sorted(step for step in found if step is not None and has_manifest(self._folder(step)))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint folder {self.directory} can't be read: {error.strerror}. Give a folder that this user "
                "may read."
            ) from error

    def save(self, state: Any, *, step: int | None = None, data: Any = None, force: bool = False) -> bool:
        """Saves a state if its step is one to save; returns whether it does. The steps may go on meanwhile.

        A save that failed since the last call raises now: the checkpoints before it are as they were.

        Args:
          state: a `TrainState`, or any pytree of arrays.
          step: its number; by default `state.step`.
          data: plain data to keep beside it, as a data iterator's place: what JSON takes.
          force: save whatever the step is.

        Raises:
          CheckpointError: the one before, or this one, can't be written.
        """
        if step is None and (step := getattr(state, "step", None)) is None:
            # What is no state at all is named as that.
            leaves_of(state)
            raise CheckpointError("The state has no step of its own; give save(state, step=n).")
        number = check_step(step)
        if not force and number % self.every:
            return False
        named = leaves_of(state)
        # Orbax writes no array of size 0; its shape says all there is to it.
        leaves = {
            path: jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in named.items() if leaf.size
        }
        if not leaves:
            raise CheckpointError("The state has no array that holds anything; give one that does.")
        if _as_json(data) != data:
            raise CheckpointError(f"data is {data!r}; give what JSON takes.")
        content = {
            "step": number,
            "data": data,
            "leaves": {path: [list(leaf.shape), dtype_of(leaf)] for path, leaf in named.items()},
            "devices": len(next(iter(named.values())).sharding.device_set),
            "processes": jax.process_count(),
        }
        all_ready(lambda: self._get_ready(number, sum(leaf.nbytes for leaf in leaves.values())))
        # Orbax would remove the one that is there before it writes.
        is_there = agree(lambda: has_manifest(self._folder(number)))
        folder = self._folder(number).with_name(f"{number}{NEW}") if is_there else self._folder(number)
        with explained(f"Step {number} can't be saved in {self.directory}"):
            response = _save_async(folder, leaves)
        if jax.process_index() == 0:
            # By now all processes have seen it.
            for path in self.directory.glob(f"*{FAILED}"):
                remove(path)
        failed: list[Exception] = []
        thread = threading.Thread(target=self._finish, args=(response, folder, content, failed), daemon=True)
        self._saving = _Saving(number, thread, failed)
        thread.start()
        return True

    def wait(self) -> None:
        """Returns once what is being saved is there, and what is too old is gone.

        Raises:
          CheckpointError: it can't be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None and (failed := self._join(saving)) is not None:
            self._unfinished = saving.number
            raise CheckpointError(
                f"A checkpoint in {self.directory} can't be written: {tell_cause(failed)}"
            ) from failed
        # A folder that is only read from keeps what it has.
        if self._written and self.keep and jax.process_index() == 0:
            for step in sorted(self.steps, key=lambda step: (step in self._written, step))[: -self.keep]:
                remove(self._folder(step))

    def close(self) -> None:
        """Waits for what is being saved, and lets the folder go."""
        self.wait()

    def latest(self) -> int | None:
        """Returns the latest finished checkpoint's step, None without any: the same answer in every process."""
        found = agree(lambda: 1 + max(self.steps, default=-1))
        return found - 1 if found else None

    def verify(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint's manifest tells, once every file has the digest that it had when it was saved.

        Raises:
          CheckpointError: it is damaged, unfinished or not there.
        """
        try:
            return check_manifest(self._folder(check_step(step)))
        except ManifestError as error:
            raise CheckpointError(_told_of(step, error)) from error

    def restore(self, like: Any, *, step: int | None = None, verify: bool = True) -> Restored:
        """Returns the state of a checkpoint, laid out as another one is; that one's static part is kept.

        Args:
          like: a state, or what `strategy.abstract_state(init_fn)` gives: its leaves say what is needed and where.
          step: which; by default the latest that is whole. Damaged ones are passed over, with a `CheckpointWarning`.
          verify: whether to compare every file's digest first.

        Raises:
          CheckpointError: there is none, it is damaged, or its leaves, shapes or dtypes are not those that are needed.
        """
        step = None if step is None else check_step(step)
        self.wait()
        chosen = agree(lambda: self._choose(step, verify))
        folder, name = self._folder(chosen), f"Checkpoint {chosen} in {self.directory}"
        content, wanted = read_content(folder), leaves_of(like)
        check_leaves(content["leaves"], like, name)
        check_files(folder, wanted, sum(size_of(leaf) for leaf in wanted.values()))
        with explained(f"{name} can't be read", f" Restore another one, or {ManifestError.remedy}."):
            check_stored(_orbax().metadata(folder).metadata, content["leaves"], chosen)
            numbers = {path: abstract_leaf(leaf) for path, leaf in wanted.items() if leaf.size}
            loaded = check_loaded(_orbax().load(folder, numbers), numbers, name)
        empty = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        leaves = [
            empty(leaf) if not leaf.size else as_key_like(loaded[path], leaf) if is_key(leaf) else loaded[path]
            for path, leaf in named_leaves(like)
        ]
        return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves), chosen, content["data"])

    def _choose(self, step: int | None, verify: bool) -> int:
        """The step to restore: the one that is asked for, or the latest that is whole."""
        check = check_manifest if verify else read_manifest
        passed: list[str] = []
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                check(self._folder(candidate))
            except ManifestError as error:
                # The run would go on before a newer one's steps, and write over them.
                if step is None and not isinstance(error, NewerFormatError):
                    passed.append(_told_of(candidate, error))
                    continue
                others = [other for other in self.steps if other != candidate]
                rest = (
                    f"Others in {self.directory} are {others}." if others else f"{self.directory} has no other{_NEXT}"
                )
                raise CheckpointError(f"{_told_of(candidate, error)} {rest}") from error
            for message in passed:
                warn_caller(f"{message} An older one, {candidate}, is taken.", CheckpointWarning)
            return candidate
        told = f": {' '.join(passed)}" if passed else _NEXT
        raise CheckpointError(f"{self.directory} has no checkpoint that can be restored{told}")

    def _finish(self, response: Any, folder: pathlib.Path, content: dict[str, Any], failed: list[Exception]) -> None:
        number = content["step"]
        try:
            response.result()
            if jax.process_index() == 0:
                write_manifest(folder, content)
                if folder != self._folder(number):
                    replace(self._folder(number), folder)
            self._written.add(number)
        except Exception as error:  # told by the next call, in the thread that can do something about it
            is_first = not failed
            failed.append(error)
            if is_first and jax.process_count() > 1:
                # A file that holds nothing can be made though the disk is full.
                with contextlib.suppress(OSError):
                    (self.directory / f"{number}{FAILED}").touch()

    def _join(self, saving: "_Saving") -> Exception | None:
        """Waits for a save, and returns why it failed: here, or elsewhere, which Orbax learns minutes later."""
        marker = self.directory / f"{saving.number}{FAILED}"
        while saving.thread.is_alive():
            saving.thread.join(1)
            if jax.process_count() > 1 and marker.exists() and saving.thread.is_alive():
                saving.thread.join(_GRACE_SECONDS)
                if not saving.failed:
                    saving.failed.append(CheckpointError("another process can't, and says why"))
                break
        return saving.failed[0] if saving.failed else None

    def _get_ready(self, number: int, size: int) -> None:
        """Waits for the save before, and sees that this one can be made; raises CheckpointError."""
        self.wait()
        with explained(f"Step {number} can't be saved in {self.directory}"):
            if jax.process_index() == 0:
                self._clear_up()
            if self._folder(number).is_symlink():
                raise CheckpointError(
                    f"Step {number} can't be saved: {self._folder(number)} is a link, to a folder elsewhere; remove it."
                )
            self._check_folder(size)

    def _clear_up(self) -> None:
        """Removes what a save that failed or was cut off has left: it takes room. Only the one that writes does so."""
        put_back(self.directory)
        left = [path for end in (".orbax-checkpoint-tmp*", NEW, BEFORE) for path in self.directory.glob(f"*{end}")]
        if self._unfinished is not None and not has_manifest(self._folder(self._unfinished)):
            left.append(self._folder(self._unfinished))
        self._unfinished = None
        for path in left:
            remove(path)

    def _check_folder(self, size: int) -> None:
        """Raises OSError or CheckpointError unless the folder takes files, and so much of them.

        Orbax would wait for a folder that it can't make for five minutes.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            file.write(b"\0" * 4096)
            file.flush()
        if (free := shutil.disk_usage(self.directory).free) < size:
            raise CheckpointError(
                f"The disk of {self.directory} has {format_bytes(free)} free, but a checkpoint takes up to "
                f"{format_bytes(size)}; make room, or keep fewer."
            )

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)


def _orbax() -> Any:
    # It takes a second to import.
    from orbax.checkpoint import v1

    hush_orbax()
    return v1


def _save_async(folder: pathlib.Path, leaves: dict[str, Any]) -> Any:
    orbax = _orbax()
    size = sum(leaf.nbytes for leaf in leaves.values()) // jax.process_count()
    seconds = min(_LEAST_SECONDS + size // _BYTES_A_SECOND, _MOST_SECONDS)
    context = orbax.Context()
    context.async_options.timeout_secs = seconds
    with context:
        return orbax.save_async(folder, leaves, overwrite=True)


def describe_checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a checkpoint's step, bytes, digest, leaves and processes, as its manifest tells; nothing is verified.

    Raises:
      CheckpointError: it has no manifest that can be read.
    """
    content = read_content(folder)
    try:
        return {**content, "bytes": sum(size for _, size in list_files(folder)), "digest": read_digest(folder)}
    except ManifestError as error:
        raise CheckpointError(f"{error}; {error.remedy}.") from error


def _told_of(step: int, error: ManifestError) -> str:
    return f"Checkpoint {step} must not be restored: {error}; {error.remedy}."


def _as_json(data: Any) -> Any:
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"data is {data!r}; give what JSON takes: {error}.") from error
