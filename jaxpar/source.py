"""Where a run's batches come from, and how far they have been drawn; changes with what may be iterated over."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from jaxpar.agreement import Agreement, gather
from jaxpar.batch import BatchError
from jaxpar.manifest import shown
from jaxpar.saved_leaves import CheckpointError


class BatchesEnded(Exception):
    """There is no next batch.

    Attributes:
      processes: those whose batches have ended, or failed; empty where there is one process alone.
      error: why this process's failed; None if they only ended.
    """

    def __init__(self, processes: tuple[int, ...] = (), error: Exception | None = None):
        super().__init__(processes, error)
        self.processes, self.error = processes, error


class Source:
    """Batches, drawn one by one; in many processes they end in all as soon as they end in one.

    >>> source = Source(lambda first: itertools.count(first), None, 3)
    >>> source.draw(), source.draw(), source.place()
    (3, 4, {'drawn': 5})
    """

    def __init__(self, batches: Any, place: Any, number: int, mesh: Any = None):
        is_saved = place is not None
        self._drawn, states = _read_place({"drawn": number} if place is None else place)
        is_function = callable(batches) and not hasattr(batches, "set_state")
        given: Any = batches(self._drawn) if is_function else batches
        if isinstance(given, Mapping) or not isinstance(given, Iterable):
            raise BatchError(
                f"batches({self._drawn}) gave a {type(given).__name__}; it gives an iterable of the batches from "
                "that step on."
            )
        iterator: Any = iter(given)
        is_stateful = not is_function and hasattr(iterator, "get_state") and hasattr(iterator, "set_state")
        if not is_function:
            # Each process has its own: of another number of them none says where its part of the rows goes on.
            if is_stateful and len(states) == jax.process_count():
                _set_back(iterator, states[jax.process_index()])
            elif is_saved or iterator is not batches:
                # From the beginning; but an iterator of this run's own is where it is.
                next(itertools.islice(iterator, self._drawn, self._drawn), None)
        self._get_state: Callable[[], Any] | None = iterator.get_state if is_stateful else None
        self._iterator: Any = iterator if jax.process_count() == 1 else _Together(iterator, Agreement(mesh))
        self._state = self._encoded()

    def place(self) -> dict[str, Any]:
        """Where to go on from: what was drawn last has been used."""
        return {"drawn": self._drawn, **self._state}

    def draw(self, more: bool = False) -> Any:
        """Returns the next batch.

        Args:
          more: whether another will be asked for; of many processes each then looks now whether it has it.

        Raises:
          BatchesEnded: there is none, in this process or in another.
        """
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise BatchesEnded from None
        self._drawn += 1
        self._state = self._encoded()
        if more and isinstance(self._iterator, _Together):
            self._iterator.look()
        return batch

    def _encoded(self) -> dict[str, Any]:
        return {} if self._get_state is None else {"iterator": _encode(self._get_state())}


class _Together:
    """The batches of one of many processes.

    One that waits for a batch would keep the others waiting in their step, so each looks a batch ahead, and tells the
    others while the devices are at work.
    """

    def __init__(self, iterator: Iterator[Any], agreement: Agreement):
        self._iterator, self._agreement = iterator, agreement
        self._asked: Any = None
        self._batch: Any = None
        self._error: Exception | None = None

    def __iter__(self) -> "_Together":
        return self

    def look(self) -> None:
        """Draws the next batch, and tells all others whether there is one."""
        has = False
        try:
            self._batch = next(self._iterator)
            has = True
        except StopIteration:
            self._batch = None
        except Exception as error:  # raised once the others know
            self._error = error
        self._asked = self._agreement.ask(has)

    def __next__(self) -> Any:
        if self._asked is None:
            self.look()
        lacking, self._asked = self._agreement.lacking(self._asked), None
        if lacking:
            raise BatchesEnded(lacking, self._error)
        return self._batch


def place_of_all(place: dict[str, Any]) -> dict[str, Any]:
    """Returns a place as it is saved, with the state of every process's iterator; all must ask.

    Raises:
      CheckpointError: JSON doesn't take an iterator's state.
    """
    if "iterator" not in place:
        return place
    try:
        states = gather(json.dumps(place["iterator"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The batches' get_state gave {place['iterator']!r}; it must be what JSON takes."
        ) from error
    return {"drawn": place["drawn"], "iterators": [json.loads(state) for state in states]}


def _read_place(place: Any) -> tuple[int, list[Any]]:
    """How many batches were drawn, and the state of each process's iterator.

    Raises:
      CheckpointError: it is no place that `fit` saves.
    """
    drawn, states = (place.get("drawn"), place.get("iterators", [])) if isinstance(place, dict) else (None, [])
    if type(drawn) is not int or not 0 <= drawn < 2**31 or not isinstance(states, list):
        raise CheckpointError(
            f"The checkpoint's data is {shown(repr(place)[:200])}, but fit goes on from a place in the batches that it "
            "has saved, as {'drawn': 20}; restore the state yourself, and give fit another folder."
        )
    return drawn, states


def _set_back(iterator: Any, state: Any) -> None:
    try:
        iterator.set_state(_decode(state))
    except Exception as error:  # whatever another's state makes it raise
        raise CheckpointError(
            f"The batches' set_state can't take what the checkpoint has of them: {type(error).__name__}: "
            f"{shown(str(error)[:200])}. Give the batches that it was saved with, or a function batches(step)."
        ) from error


def _encode(state: Any) -> Any:
    return {"bytes": state.hex()} if isinstance(state, bytes) else state


def _decode(state: Any) -> Any:
    return bytes.fromhex(state["bytes"]) if isinstance(state, dict) and set(state) == {"bytes"} else state
