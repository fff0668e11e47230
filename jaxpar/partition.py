"""How a leaf gets its `PartitionSpec`: ordered lists of rules over canonical paths."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxpar.mesh import AXES, count_shards, nearest


class PartitionError(ValueError):
    """A rule that can't apply, or a leaf that none reaches: the message gives path, dim, sizes and the nearest name."""


class Whole:
    """The type of `jaxpar.WHOLE`, the spec that closes a leaf: no later list may split it."""

    def __repr__(self) -> str:
        return "WHOLE"


WHOLE = Whole()


class Leaf(NamedTuple):
    """What a rule function is told of a leaf.

    Attributes:
      path: its canonical path, `"params/up/kernel"`.
      shape: its global shape.
      dtype: its dtype.
      shapes: the shape of every leaf beside it, by path, for a rule that must know a neighbour.

    >>> over_last_dim = lambda leaf, mesh, spec_so_far: PartitionSpec(*[None] * (len(leaf.shape) - 1), "model")
    >>> over_last_dim(Leaf("params/up/kernel", (64, 32), "float32"), None, PartitionSpec())
    P(None, 'model')
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    shapes: Mapping[str, tuple[int, ...]] = {}


# A function may also give a sentence: why it leaves the leaf as it is. The layout shows it.
SpecFn = Callable[[Leaf, Mesh, PartitionSpec], PartitionSpec | Whole | str | None]
Rule = tuple[str, PartitionSpec | Whole | SpecFn | None]
Rules = Sequence[Rule]


class Match(NamedTuple):
    """What the lists made of one leaf.

    Attributes:
      spec: the mesh axes of each dim.
      rule: the rules that gave it, as text.
      note: why functions left the leaf as it was; empty where none said so.
      given: what the annotation (first) and each list gave, dim by dim: what optimizer state derives its own from.
      used: the patterns that matched.
    """

    spec: PartitionSpec
    rule: str
    note: str
    given: tuple[PartitionSpec | Whole | None, ...]
    used: frozenset[str]


def check_rules(lists: Sequence[Rules], mesh: Mesh) -> None:
    """Raises PartitionError for a list that isn't `(regex, spec)` pairs, or a spec with an axis that the mesh lacks."""
    for rules in lists:
        if isinstance(rules, str) or not isinstance(rules, Sequence):
            raise PartitionError(
                f"rules are {rules!r}; give lists of (regex, spec) pairs, as [('kernel$', P('model'))]."
            )
        for rule in rules:
            if isinstance(rule, list):
                raise PartitionError(
                    "A list of rules holds a list itself, which is not a pair (regex, spec); give each list of rules "
                    "by itself, as sharded(mesh, MEGATRON, FSDP)."
                )
            if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
                raise PartitionError(
                    f"Rule {rule!r} is not a pair (regex, spec); give one, as ('kernel$', P(None, 'model'))."
                )
            pattern, spec = rule
            try:
                re.compile(pattern)
            except re.error as error:
                raise PartitionError(
                    f"Rule {pattern!r} is not a regular expression: {error}; escape what is no pattern, by re.escape."
                ) from None
            if isinstance(spec, PartitionSpec):
                _check_axes(spec, mesh, f"Rule {pattern!r}")
            elif not (spec is None or isinstance(spec, Whole) or callable(spec)):
                raise PartitionError(
                    f"Rule {pattern!r} gives {spec!r}; a spec is a PartitionSpec, None, WHOLE or a "
                    "function f(leaf, mesh, spec_so_far)."
                )


def match_leaf(leaf: Leaf, lists: Sequence[Rules], mesh: Mesh, annotation: PartitionSpec | None = None) -> Match:
    """Returns what Flax's own annotation and then each list in turn make of one leaf.

    Within a list the first rule whose regex is found in the path counts; each list fills the dims that are still open.

    Raises:
      PartitionError: no list matches (scalars and random keys apart, which are never split), or a spec can't apply.

    >>> import jaxpar
    >>> P, mesh = PartitionSpec, jaxpar.make_mesh(data=2, model=4)
    >>> match_leaf(Leaf("params/up/kernel", (16, 64), "float32"), [[("kernel$", P(None, "model"))]], mesh).spec
    P(None, 'model')
    """
    fill = _Fill(leaf, mesh)
    if annotation is not None:
        fill.apply(_known_axes(annotation, mesh, leaf), "Flax's annotation")
    given = [fill.take()]
    for rules in lists:
        for pattern, spec in rules:
            if re.search(pattern, leaf.path):
                fill.apply(spec, pattern)
                break
        given.append(fill.take())
    if lists and leaf.shape and not fill.used:
        patterns = [pattern for rules in lists for pattern, _ in rules]
        raise PartitionError(
            f"No partition rule matches {leaf.path!r}{nearest(leaf.path, patterns)}; add a rule for it, "
            "or end the list with ('.*', P())."
        )
    return fill.match(given)


def match_optimizer_leaf(
    leaf: Leaf, lists: Sequence[Rules], mesh: Mesh, params: Mapping[str, tuple[Leaf, Match]]
) -> Match:
    """Returns the spec of a leaf of the optimizer state: what its own rules say, else what its parameter got.

    In each list a rule that begins `^opt_state` comes first. Else the leaf takes what that list gave to the parameter
    whose path ends the leaf's own. A leaf with no such parameter is split by functions alone, which know how to refuse.

    Args:
      leaf: the leaf; its path begins `opt_state/`.
      lists: the strategy's lists of rules.
      mesh: the mesh.
      params: each parameter and its match, by path without the leading `params/`.
    """
    source = _parameter_of(leaf.path, params)
    dims = None if source is None else _kept_dims(leaf, source[0])
    fill = _Fill(leaf, mesh)

    def inherit(given: PartitionSpec | Whole | None) -> None:
        if isinstance(given, Whole):
            fill.apply(given, "as its parameter")
        elif given is not None and any(given) and dims is not None:
            fill.apply(PartitionSpec(*(None if dim is None else given[dim] for dim in dims)), "as its parameter")

    if source is not None:
        inherit(source[1].given[0])
    for index, rules in enumerate(lists, start=1):
        own = [
            (pattern, spec)
            for pattern, spec in rules
            if (pattern.startswith("^opt_state") or (dims is None and callable(spec))) and re.search(pattern, leaf.path)
        ]
        if own:
            fill.apply(own[0][1], own[0][0])
        elif source is not None:
            inherit(source[1].given[index])
    if dims is None and math.prod(leaf.shape) > 1 and not any(fill.spec):
        fill.notes = fill.notes or ["whole: no parameter's path and shape explain it; a '^opt_state' rule can split it"]
    return fill.match([])


def open_spec(ndim: int) -> PartitionSpec:
    """Returns the spec of a leaf with every dim open."""
    return PartitionSpec(*(None,) * ndim)


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the mesh axes that a spec names, in the order of its dims.

    >>> axes_of(PartitionSpec(("data", "fsdp"), None, "model"))
    ('data', 'fsdp', 'model')
    """
    return tuple(axis for entry in spec for axis in _entry_axes(entry))


class _Fill:
    """One leaf's spec while the lists fill it."""

    def __init__(self, leaf: Leaf, mesh: Mesh):
        self.leaf, self.mesh = leaf, mesh
        self.spec = open_spec(len(leaf.shape))
        self.closed = False
        self.notes: list[str] = []
        self.used: list[str] = []
        self.sources: list[str] = []
        self._taken: PartitionSpec | Whole | None = None

    def apply(self, spec: Any, rule: str) -> None:
        self.used.append(rule)
        if self.closed or spec is None:
            return
        if callable(spec):
            spec = spec(self.leaf, self.mesh, self.spec)
            if isinstance(spec, str):
                self.notes.append(spec)
                return
            if isinstance(spec, PartitionSpec):
                _check_axes(spec, self.mesh, f"The function of rule {rule!r}, for {self.leaf.path!r},")
            elif not (spec is None or isinstance(spec, Whole)):
                raise PartitionError(
                    f"The function of rule {rule!r} gave {spec!r} for {self.leaf.path!r}; it gives a "
                    "PartitionSpec, None, WHOLE, or a sentence saying why it leaves the leaf as it is."
                )
        if spec is None:
            return
        if isinstance(spec, Whole):
            self.closed, self._taken = True, spec
            self.sources.append(rule)
            return
        self._merge(spec, rule)

    def _merge(self, spec: PartitionSpec, rule: str) -> None:
        leaf = self.leaf
        if len(spec) > len(leaf.shape):
            raise PartitionError(
                f"Rule {rule!r} gives {spec} for {leaf.path!r}, {len(spec)} dims, but its shape "
                f"{leaf.shape} has {len(leaf.shape)}; give as many, or fewer."
            )
        entries: list[Any] = list(self.spec)
        new: list[Any] = [None] * len(entries)
        for dim, entry in enumerate(spec):
            axes = _entry_axes(entry)
            if entries[dim] is not None or not axes:
                continue
            taken = [axis for axis in axes if axis in axes_of(PartitionSpec(*entries))]
            if taken:
                raise PartitionError(
                    f"Rule {rule!r} splits dim {dim} of {leaf.path!r} over {taken[0]!r}, but {self.spec} "
                    f"and {spec} together use that axis twice; an axis splits one dim of a leaf."
                )
            size = count_shards(self.mesh, axes)
            if leaf.shape[dim] % size:
                raise PartitionError(
                    f"{leaf.path!r} has shape {leaf.shape}: dim {dim} does not divide by {size}, the size "
                    f"of mesh axes {axes}, which rule {rule!r} names; name others, or pad the dim."
                )
            entries[dim] = new[dim] = axes[0] if len(axes) == 1 else axes
        if any(new):
            self.spec, self._taken = PartitionSpec(*entries), PartitionSpec(*new)
            self.sources.append(rule)

    def take(self) -> PartitionSpec | Whole | None:
        """What was given since the last call."""
        taken, self._taken = self._taken, None
        return taken

    def match(self, given: Sequence[PartitionSpec | Whole | None]) -> Match:
        rule = " + ".join(dict.fromkeys(self.sources)) or (self.used[-1] if self.used else "")
        return Match(self.spec, rule, "; ".join(self.notes), tuple(given), frozenset(self.used))


def _entry_axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _check_axes(spec: PartitionSpec, mesh: Mesh, subject: str) -> None:
    repeated = [axis for axis in axes_of(spec) if axes_of(spec).count(axis) > 1]
    if repeated:
        raise PartitionError(
            f"{subject} gives {spec}, which names {repeated[0]!r} twice; an axis splits one dim of a leaf."
        )
    for dim, entry in enumerate(spec):
        if entry is PartitionSpec.UNCONSTRAINED:
            raise PartitionError(f"{subject} gives UNCONSTRAINED for dim {dim}; a leaf at rest needs an axis or None.")
        if not all(isinstance(axis, str) for axis in _entry_axes(entry)):
            raise PartitionError(f"{subject} gives {entry!r} for dim {dim}; name axes of the mesh {dict(mesh.shape)}.")
        for axis in _entry_axes(entry):
            if axis in mesh.shape:
                continue
            if axis in AXES:
                raise PartitionError(
                    f"{subject} splits dim {dim} over {axis!r}, which the mesh {dict(mesh.shape)} does not "
                    f"have; add it, if only as {axis}=1, or choose another axis."
                )
            raise PartitionError(
                f"{subject} splits dim {dim} over {axis!r}{nearest(axis, mesh.axis_names)}; the mesh is "
                f"{dict(mesh.shape)}."
            )


def _known_axes(annotation: PartitionSpec, mesh: Mesh, leaf: Leaf) -> PartitionSpec:
    """An annotation with the axes that this mesh lacks left out: a model keeps its annotations on every mesh."""
    for axis in axes_of(annotation):
        if axis not in AXES:
            raise PartitionError(
                f"{leaf.path!r} is annotated with {axis!r}{nearest(axis, AXES)}, which is no mesh axis; if "
                "it is a logical name, set Flax's logical_axis_rules around init_fn's body."
            )
    entries = [tuple(axis for axis in _entry_axes(entry) if axis in mesh.shape) for entry in annotation]
    return PartitionSpec(*(axes or None for axes in entries))


def _parameter_of(path: str, params: Mapping[str, tuple[Leaf, Match]]) -> tuple[Leaf, Match] | None:
    """The parameter with the longest path that ends the given one."""
    parts = path.split("/")
    return next((params[end] for end in ("/".join(parts[i:]) for i in range(1, len(parts))) if end in params), None)


def _kept_dims(leaf: Leaf, param: Leaf) -> tuple[int | None, ...] | None:
    """For each dim of an optimizer leaf, the parameter's dim that it is; None for one of its own.

    Adafactor keeps, of a matrix, the means over its largest dim (`v_row`) and over the second largest (`v_col`), ranked
    by `np.argsort` as optax does; its unused slots have the shape (1,). L-BFGS keeps a stack, with a leading dim.
    """
    ndim, extra = len(param.shape), len(leaf.shape) - len(param.shape)
    if leaf.shape == param.shape:
        return tuple(range(ndim))
    ranked = [int(dim) for dim in np.argsort(param.shape)]
    for slot, dropped in (("v_row", -1), ("v_col", -2)):
        if f"/{slot}/" in leaf.path and ndim >= 2:
            kept = tuple(dim for dim in range(ndim) if dim != ranked[dropped])
            if leaf.shape == tuple(param.shape[dim] for dim in kept):
                return kept
    if extra > 0 and leaf.shape[extra:] == param.shape:
        return (None,) * extra + tuple(range(ndim))
    return (None,) * len(leaf.shape) if math.prod(leaf.shape) <= 1 else None
