"""The collectives of a compiled program, read from its text: where they stand, what they move, how often they run."""

import collections
import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")
_LOOP = re.compile(r"body=(%?[\w.\-]+).*known_trip_count\":\{\"n\":\"(\d+)\"")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls)=(%?[\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))")


class Collective(NamedTuple):
    """One collective.

    Attributes:
      computation: the one it stands in, `main` for the program's own.
      kind: as XLA calls it.
      shapes: of each array it gives, as `f32[4,16]`.
      sizes: the bytes of each.
      times: how often it runs, in loops whose trips XLA knows.
      in_branch: whether a conditional decides if it runs.
    """

    computation: str
    kind: str
    shapes: list[str]
    sizes: list[int]
    times: int
    in_branch: bool

    @property
    def bytes(self):
        """All arrays' together, once."""
        return sum(self.sizes)


def find_collectives(text):
    """Returns each `Collective` of a compiled program."""
    found, computation, callers, branches = [], "", {}, set()
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = "main" if line.startswith("ENTRY") else line.split(" ")[0]
        loop = _LOOP.search(line)
        for called in _CALLED.findall(line):
            callers[called] = (computation, int(loop[2]) if loop and loop[1] == called else 1)
        for listed, single in _BRANCHES.findall(line):
            for branch in [single] if single else listed.split(", "):
                callers[branch] = (computation, 1)
                branches.add(branch)
        if match := _COLLECTIVE.search(line):
            arrays = _ARRAY.findall(match[1])
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) * int(bits) // 8 for _, bits, dims in arrays]
            found.append((computation, match[2], [f"{name}{bits}[{dims}]" for name, bits, dims in arrays], sizes))

    def follow(computation):
        times, in_branch = 1, False
        while computation in callers:
            in_branch |= computation in branches
            computation, trips = callers[computation]
            times *= trips
        return times, in_branch

    return [Collective(*one, *follow(one[0])) for one in found]


def count_collectives(text):
    """Returns (how many, bytes) a step for each kind of collective."""
    totals = collections.defaultdict(lambda: [0, 0])
    for one in find_collectives(text):
        totals[one.kind][0] += one.times
        totals[one.kind][1] += one.times * one.bytes
    return dict(totals)
