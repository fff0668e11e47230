"""`TrainState`: everything a train step carries, as plain leaves, for nnx modules and linen variables alike."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx, struct, traverse_util
from flax.core import meta, spmd, unfreeze
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import PartitionSpec

Tree = Any


class StateError(TypeError):
    """A model, optimizer or state that jaxpar can't carry: the message says what was given and what is needed."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What a state holds beside its leaves: fixed when it is created, compared by jit, never traced.

    Attributes:
      tx: the optax optimizer.
      graphdef: the nnx module's structure; None for linen.
      frozen: the paths, under `params/`, that are not trained.
      annotations: (path, spec) for each leaf with Flax's own sharding metadata.
      rng_collections: the names in `model_state` that hold nnx's own random keys and their counts.
    """

    tx: optax.GradientTransformation
    graphdef: Any = None
    frozen: frozenset[str] = frozenset()
    annotations: tuple[tuple[str, PartitionSpec], ...] = ()
    rng_collections: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        # The graphdef's own hash walks the whole module: too dear for every step. Equality still compares it.
        return hash((self.tx, self.frozen))


@struct.dataclass
class TrainState:
    """Everything a step carries from one call to the next: one pytree, with no device axis under any strategy.

    Attributes:
      step: int32 scalar, the number of steps taken, skipped ones too.
      params: the parameters as nested dicts, nnx and linen alike: `params/up/kernel`.
      opt_state: what `tx.init` gave for the parameters that are trained.
      model_state: the model's other variables by collection: `model_state/batch_stats/norm/mean`.
      rng: the key from which each step's keys are folded.
      dynamic_scale: Flax's `DynamicScale` for float16, or None.
      static: the optimizer and the model's structure.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    model_state: Tree
    rng: jax.Array
    dynamic_scale: DynamicScale | None
    static: Static = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        trainable: Callable[[str], bool] | None = None,
        rng: jax.Array | None = None,
        dynamic_scale: DynamicScale | None = None,
    ) -> "TrainState":
        """Returns the state in which `model` starts to train.

        Args:
          model: an nnx module, or linen variables (`{"params": ..., "batch_stats": ...}`), boxed or not.
          tx: any optax optimizer.
          trainable: tells from a parameter's canonical path, as `"params/up/kernel"`, whether it is trained; by default
            all floating-point ones are. The others get no gradient, no optimizer state and no reduction.
          rng: the key for the steps' randomness; `strategy.init` sets it. By default `jax.random.key(0)`.
          dynamic_scale: `flax.training.dynamic_scale.DynamicScale()` for `compute_dtype=jnp.float16`.

        Raises:
          StateError: the model is neither of the two, or `trainable` leaves nothing to train.

        >>> state = TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
        >>> jax.tree.map(jnp.shape, state.params)
        {'bias': (2,), 'kernel': (3, 2)}
        """
        if not isinstance(tx, optax.GradientTransformation):
            raise StateError(
                f"tx is a {type(tx).__name__}; give an optax.GradientTransformation, as optax.adamw(3e-4)."
            )
        if trainable is not None and not callable(trainable):
            raise StateError(f"trainable is {trainable!r}; give a function of a parameter's path that returns a bool.")
        if dynamic_scale is not None and not isinstance(dynamic_scale, DynamicScale):
            raise StateError(f"dynamic_scale is {dynamic_scale!r}; give flax.training.dynamic_scale.DynamicScale().")
        split = _split_nnx if isinstance(model, nnx.Module) else _split_linen
        params, model_state, static = split(model, tx)
        _check_leaves({"params": params, "model_state": model_state})
        frozen = frozenset(path for path, leaf in named_leaves(params, "params") if not _trains(path, leaf, trainable))
        if len(frozen) == len(jax.tree.leaves(params)):
            raise StateError(
                f"None of the {len(frozen)} parameters is trained: no path passes trainable=, such as "
                f"{min(frozen, default='(the model has no parameters)')!r}; let a floating-point one be."
            )
        static = dataclasses.replace(static, frozen=frozen)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(split_params(params, frozen)[0]),
            model_state=model_state,
            rng=jax.random.key(0) if rng is None else as_key(rng),
            # As Flax's own rule gives them back, with 64 bits enabled too.
            dynamic_scale=jax.tree.map(
                lambda leaf: jnp.asarray(leaf, jnp.float32 if isinstance(leaf, float) else None), dynamic_scale
            ),
            static=static,
        )

    @property
    def model(self) -> Any:
        """The model again, on the same devices: an nnx module (new variables, shared arrays), or linen variables."""
        return build_model(self.static, self.params, self.model_state)


def build_model(static: Static, params: Tree, model_state: Tree) -> Any:
    """Returns what a loss function sees as `model`: a live nnx module, or the linen variables."""
    if static.graphdef is None:
        return {"params": params, **model_state}
    leaves = traverse_util.flatten_dict(params)
    for collection in model_state.values():
        leaves |= traverse_util.flatten_dict(collection)
    # copy=True: without it the model's counters keep the trace in which they were made.
    return nnx.merge(static.graphdef, nnx.from_flat_state(list(leaves.items())), copy=True)


def read_model_state(static: Static, model: nnx.Module, model_state: Tree) -> Tree:
    """Returns the module's non-trained variables as they are now, in the structure of `model_state`.

    Its random keys and their counts stay as they were: each step folds its number into the keys instead.
    """
    now = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        name: old
        if name in static.rng_collections
        else traverse_util.unflatten_dict({path: _raw(now[path]) for path in traverse_util.flatten_dict(old)})
        for name, old in model_state.items()
    }


def split_params(params: Tree, frozen: frozenset[str]) -> tuple[Tree, Tree]:
    """Returns the trained and the frozen parameters, each as nested dicts without the other's leaves."""
    if not frozen:
        return params, {}
    flat = traverse_util.flatten_dict(params)
    held = {path: leaf for path, leaf in flat.items() if _join("params", path) in frozen}
    trained = {path: leaf for path, leaf in flat.items() if path not in held}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(held)


def join_params(trained: Tree, held: Tree) -> Tree:
    """Returns the parameters whole again: the inverse of `split_params`."""
    if not held:
        return trained
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(held))


def leaf_path(path: tuple) -> str:
    """Returns a key path as text, canonical: `params/up/kernel`, without the `/value` that Flax's boxes add.

    >>> leaf_path((jax.tree_util.GetAttrKey("params"), jax.tree_util.DictKey("up"), jax.tree_util.GetAttrKey("value")))
    'params/up'
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Tree, root: str = "") -> list[tuple[str, Any]]:
    """Returns `(canonical path, leaf)` for each leaf, in the order of `jax.tree.leaves`.

    >>> named_leaves({"up": {"kernel": 1.0}}, "params")
    [('params/up/kernel', 1.0)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(filter(None, (root, leaf_path(path)))), leaf) for path, leaf in leaves]


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf holds typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_key(rng: Any) -> jax.Array:
    """Returns a typed random key: the one given, or an old-style `PRNGKey` wrapped.

    Raises:
      StateError: it is neither.
    """
    if is_key(rng) and rng.shape == ():
        return rng
    words = jax.random.key_data(jax.random.key(0)).shape
    if isinstance(rng, jax.Array) and rng.dtype == jnp.uint32 and rng.shape == words:
        return jax.random.wrap_key_data(rng)
    raise StateError(f"rng is {rng!r}; give a random key, as jax.random.key(0).")


def check_is_state(state: Any) -> None:
    """Raises StateError where a function stands in place of a state, an `init_fn` as it may be: wrapped, or jitted."""
    if callable(state) and jax.tree_util.all_leaves([state]):
        kind, name = type(state).__name__, getattr(state, "__name__", None)
        raise StateError(
            f"The state is {f'a {kind}' if name is None else f'the {kind} {name}'}; give what strategy.init(init_fn, "
            "rng) or strategy.place returned, or, of shapes alone, strategy.abstract_state(init_fn)."
        )


def _join(root: str, path: tuple) -> str:
    return "/".join((root, *map(str, path)))


def _check_leaves(tree: Tree) -> None:
    seen = set()
    for path, leaf in named_leaves(tree):
        if path in seen:
            raise StateError(f"Two leaves of the model have the path {path!r}; rename one, without a '/' in its name.")
        seen.add(path)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise StateError(
                f"{path!r} is {leaf!r}, a {type(leaf).__name__} and not an array; make the model inside init_fn, and "
                "the state with strategy.init."
            )


def _trains(path: str, leaf: Any, trainable: Callable[[str], bool] | None) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact) and (trainable is None or bool(trainable(path)))


def _raw(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _split_nnx(model: nnx.Module, tx: optax.GradientTransformation) -> tuple[Tree, Tree, Static]:
    graphdef, variables = nnx.split(model)
    params, collections, annotations, rng_collections = {}, {}, [], set()
    for path, variable in nnx.to_flat_state(variables):
        kind = type(variable) if isinstance(variable, nnx.Variable) else nnx.Variable
        if issubclass(kind, nnx.Param):
            params[path], name = _raw(variable), "params"
        else:
            collection = nnx.variablelib.variable_name_from_type(kind, allow_register=True)
            collections[(collection, *path)], name = _raw(variable), f"model_state/{collection}"
            if issubclass(kind, nnx.RngState):
                rng_collections.add(collection)
        if isinstance(variable, nnx.Variable) and variable.get_metadata().get("out_sharding"):
            annotations.append((_join(name, path), nnx.get_partition_spec(variable).get_value()))
    static = Static(tx, graphdef, annotations=tuple(annotations), rng_collections=frozenset(rng_collections))
    return traverse_util.unflatten_dict(params), traverse_util.unflatten_dict(collections), static


def _split_linen(model: Any, tx: optax.GradientTransformation) -> tuple[Tree, Tree, Static]:
    if isinstance(model, linen.Module):
        raise StateError(f"model is the linen module {type(model).__name__}; give its variables: module.init(key, x).")
    if isinstance(model, type):
        raise StateError(f"model is the class {model.__name__}; give a module made of it, or linen variables.")
    if not isinstance(model, Mapping) or "params" not in model:
        given = f"a mapping with the keys {sorted(map(str, model))}" if isinstance(model, Mapping) else f"{type(model)}"
        raise StateError(f"model is {given}; give an nnx.Module, or linen variables: {{'params': ...}}.")
    boxed = unfreeze(dict(model))
    lists = [
        path
        for path, leaf in traverse_util.flatten_dict({"params": boxed["params"]}).items()
        if isinstance(leaf, list | tuple) or not path[1:]
    ]
    if lists:
        raise StateError(f"{'/'.join(map(str, lists[0]))!r} is no dict; linen's params are nested dicts of arrays.")
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)
    annotations = tuple(
        (("model_state/" if not path.startswith("params/") else "") + path, _linen_spec(box))
        for path, box in (
            (leaf_path(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
        )
        if hasattr(box, "get_partition_spec")
    )
    # A box's own unbox() would constrain the value on whatever mesh is set; the layout is the strategy's affair.
    plain = jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, boxed, is_leaf=is_box)
    plain = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, plain)
    return plain.pop("params"), plain, Static(tx, annotations=annotations)


def _linen_spec(box: Any) -> PartitionSpec:
    """The mesh axes of a boxed linen leaf, logical names replaced by the rules that are set when it is created."""
    if isinstance(box, linen.LogicallyPartitioned):
        rules = box.rules or spmd.get_logical_axis_rules()
        return linen.logical_to_mesh_axes(box.names, rules=rules) or PartitionSpec()
    return box.get_partition_spec()
