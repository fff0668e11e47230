"""What chips, links and prices are, as `chips.toml` lists them with their sources; changes with that table's form."""

import datetime
import functools
import importlib.resources
import tomllib
from typing import Any, NamedTuple

CASES = ("most", "expected", "least")


class Figure(NamedTuple):
    """A number, where it is from, and the day it was read; None for a user's own."""

    value: Any
    source: str
    read: datetime.date | None


class Rates(NamedTuple):
    """What a chip of a slice does in a second, or in all.

    Attributes:
      math: floating-point operations of matrix products in bfloat16.
      kernel: the same inside a Pallas kernel.
      hbm: bytes to and from its large memory.
      link: bytes to one neighbour, one way.
      network: bytes to other slices.
      hop_seconds: how long a neighbour's first byte takes.
      doubling: what part of their throughput twice as many slices keep.
      wraps_at: which dims of a slice are rings: see `links.Torus`.
      array: the side of its matrix units; smaller products leave a part of them idle.
    """

    math: float
    kernel: float
    hbm: float
    link: float
    network: float
    hop_seconds: float
    doubling: float
    wraps_at: int
    array: int


@functools.cache
def read_figures() -> dict[str, dict[str, Figure]]:
    """Returns every figure, by chip and name; under `reached` those that are parts of a peak.

    >>> read_figures()["v5e"]["peak_flops"].value
    197000000000000.0
    """
    text = importlib.resources.files("jaxpar.estimation").joinpath("chips.toml").read_text()
    return {
        chip: {name: Figure(**figure) for name, figure in figures.items()}
        for chip, figures in tomllib.loads(text).items()
    }


def chip_of(device_kind: str) -> str | None:
    """Returns the chip that JAX calls so; None if it isn't listed.

    >>> chip_of("TPU v5 lite"), chip_of("cpu")
    ('v5e', None)
    """
    figures = read_figures().items()
    return next((chip for chip, row in figures if "kinds" in row and device_kind in row["kinds"].value), None)


def rates_of(chip: str, case: str = "expected") -> Rates:
    """Returns what a chip reaches in a case: `most`, `expected` or `least` of what its kind is known to.

    >>> rates_of("v5e", "most").math > rates_of("v5e").math > rates_of("v5e", "least").math
    True
    """
    figures = {name: figure.value for name, figure in read_figures()[chip].items()}
    part = {name: figure.value[CASES.index(case)] for name, figure in read_figures()["reached"].items()}
    return Rates(
        math=figures["peak_flops"] * part["math"],
        kernel=figures["peak_flops"] * part["kernel"],
        hbm=figures["hbm_bandwidth"] * part["hbm"],
        link=figures["link_bandwidth"] * part["link"],
        network=figures["network_bandwidth"] * part["network"],
        hop_seconds=part["hop_seconds"],
        doubling=part["doubling"],
        wraps_at=figures["wraps_at"],
        array=figures["array"],
    )
