"""How long a collective takes on the links of its own axis: rings, lines and split dims of a torus, and the network.

W is what a link carries one way. On a ring of n chips each gathers what n-1 others have by both of its links: B (n-1)/n
bytes at 2 W. On a line the chip at its end has one: W. Axes that fill several dims of the torus use all of their links
at once. An all-reduce is a reduce-scatter and a gather; an all-to-all sends a fourth of a gather's bytes over a ring's
busiest link (https://jax-ml.github.io/scaling-book/sharding).
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from jaxpar.estimation.chips import Rates
from jaxpar.inspection.collectives import parts_sent

# What a collective goes over: the links between the chips of a slice, or the network between slices.
ICI, DCN = "ICI", "DCN"


class Torus(NamedTuple):
    """Where the devices of a program are.

    Attributes:
      shape: the slice's, by chips.
      places: each device's coordinates, by its number in the program: (devices, dims).
      slices: the slice that each is on.
      rates: what its links carry.
    """

    shape: tuple[int, ...]
    places: np.ndarray
    slices: np.ndarray
    rates: Rates

    def is_ring(self, dim: int) -> bool:
        """Whether a dim's last chip is wired to its first.

        Flat slices are where a dim has all of a pod's 16; cubes are from 4 x 4 x 4 on.
        """
        size, at = self.shape[dim], self.rates.wraps_at
        return size == at if len(self.shape) == 2 else size % at == 0 and math.prod(self.shape) >= at**3


class Use(NamedTuple):
    """What a collective takes.

    Attributes:
      seconds: how long it keeps its links.
      links: which: `x+` is those of dim x one way, `DCN` the network between slices.
      latency: how long the last of it is on its way, when the links are free again.
    """

    seconds: float
    links: frozenset[str]
    latency: float = 0.0


def time_collective(torus: Torus, kind: str, groups: np.ndarray, count: int) -> Use:
    """Returns how long a collective takes, and which links it keeps.

    Args:
      torus: where the devices are.
      kind: as XLA calls it.
      groups: the devices that take part together, a row for each group, or pairs for a permute; all of one slice.
      count: the bytes that each puts in.

    >>> from jaxpar.estimation.chips import rates_of
    >>> places = np.array(list(np.ndindex(16, 16)))
    >>> torus = Torus((16, 16), places, np.zeros(256, int), rates_of("v5e"))
    >>> round(1e3 * time_collective(torus, "all-gather", np.arange(256)[None], 2**20).seconds, 2)
    1.49
    """
    if groups.size == 0 or groups.shape[1] < 2:
        return Use(0.0, frozenset())
    if kind == "collective-permute":
        return _time_permute(torus, groups, count)
    # Groups may lie differently: the slowest is waited for, and each keeps its own links.
    uses = [_time_ring(torus, kind, lanes, groups.shape[1], count) for lanes in _lanes_of(torus, groups)]
    return Use(
        max(use.seconds for use in uses),
        frozenset().union(*(use.links for use in uses)),
        max(use.latency for use in uses),
    )


def time_network(rates: Rates, kind: str, slices: int, count: float) -> Use:
    """Returns how long slices take to exchange `count` bytes of each chip over the network."""
    return Use(parts_sent(kind, slices) * count / rates.network, frozenset({DCN}))


def _time_ring(torus: Torus, kind: str, lanes: "list[_Lane]", size: int, count: int) -> Use:
    hops = sum(lane.size // 2 if lane.is_ring else lane.size - 1 for lane in lanes)
    links = frozenset(f"{'xyz'[lane.dim]}{way}" for lane in lanes for way in "+-")
    if "all-to-all" in kind:
        seconds = max(lane.size * count / (4 * lane.rate) for lane in lanes)
    else:
        seconds = parts_sent(kind, size) * count / sum(lane.rate for lane in lanes)
    return Use(seconds, links, (2 if kind == "all-reduce" else 1) * hops * torus.rates.hop_seconds)


class _Lane(NamedTuple):
    """A dim of the torus as a group uses it: how many of its chips, and what they carry together a second."""

    dim: int
    size: int
    rate: float
    is_ring: bool


def _lanes_of(torus: Torus, groups: np.ndarray) -> list[list[_Lane]]:
    """The lanes of each group; groups that lie alike come once."""
    gaps = np.diff(np.sort(torus.places[groups], axis=1), axis=1)
    sizes = 1 + (gaps > 0).sum(axis=1)
    # Where a group takes every second chip, the others' traffic passes over the same links.
    strides = np.where(gaps > 0, gaps, max(torus.shape)).min(axis=1)
    lies = np.unique(np.stack([sizes, strides], axis=2), axis=0)
    return [[_lane_of(torus, dim, *map(int, lie)) for dim, lie in enumerate(each) if lie[0] > 1] for each in lies]


def _lane_of(torus: Torus, dim: int, size: int, stride: int) -> _Lane:
    is_ring = size * stride == torus.shape[dim] and torus.is_ring(dim)
    return _Lane(dim, size, torus.rates.link * (2 if is_ring else 1) / stride, is_ring)


@functools.lru_cache(256)
def _loads_of(shape: tuple[int, ...], rings: tuple[bool, ...], pairs: bytes) -> tuple[dict[str, float], int]:
    """How many parts pass over the busiest link of each dim and way, and the longest path in hops.

    Each goes the shorter way, dim after dim; half round a ring, one half goes each way.
    """
    sources, targets = np.frombuffer(pairs, np.int64).reshape(2, -1, len(shape)).copy()
    loads, longest = {}, np.zeros(len(sources), int)
    for dim, size in enumerate(shape):
        steps = targets[:, dim] - sources[:, dim]
        steps = (steps + size // 2) % size - size // 2 if rings[dim] else steps
        half = rings[dim] & (2 * np.abs(steps) == size)
        longest += np.abs(steps)
        for way, sign in (("+", 1), ("-", -1)):
            carried = np.zeros(shape)
            for hop in range(int(np.abs(steps).max(initial=0))):
                on = (np.abs(steps) > hop) & ((steps * sign > 0) | half)
                at = sources[on].copy()
                at[:, dim] = (at[:, dim] + sign * hop) % size
                np.add.at(carried, tuple(at.T), np.where(half[on], 0.5, 1.0))
            if carried.any():
                loads[f"{'xyz'[dim]}{way}"] = float(carried.max())
        sources[:, dim] = targets[:, dim]
    return loads, int(longest.max())


def _time_permute(torus: Torus, pairs: np.ndarray, count: int) -> Use:
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(pairs):
        return Use(0.0, frozenset())
    rings = tuple(map(torus.is_ring, range(len(torus.shape))))
    places = torus.places[pairs.T].astype(np.int64)
    loads, hops = _loads_of(torus.shape, rings, places.tobytes())
    return Use(max(loads.values()) * count / torus.rates.link, frozenset(loads), hops * torus.rates.hop_seconds)
