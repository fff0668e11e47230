"""How lists of rules make a spec: first match in a list, later lists fill, WHOLE closes; optimizer leaves follow."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar import WHOLE, Leaf, PartitionError
from jaxpar.partition import axes_of, check_rules, match_leaf, match_optimizer_leaf, open_spec

MESH = {"data": 2, "fsdp": 2, "model": 2}
LEAF = Leaf("params/mlp/up/kernel", (8, 16, 4), jnp.float32)


def matched(*lists, leaf=LEAF, annotation=None):
    return match_leaf(leaf, lists, jaxpar.make_mesh(**MESH), annotation)


def give(spec):
    return lambda leaf, mesh, so_far: spec


# The lists, and the spec that they make of LEAF.
LISTS = {
    "none at all": ([], P(None, None, None)),
    "the first match of a list": ([[("up", P("data")), ("kernel", P("model"))]], P("data", None, None)),
    "a regex is searched, not matched": ([[("p/ker", P("data"))]], P("data", None, None)),
    "anchors": ([[("^kernel", P("data")), ("^params/.*kernel$", P("model"))]], P("model", None, None)),
    "missing dims are open": ([[("up", P("data"))], [("up", P(None, "model", "fsdp"))]], P("data", "model", "fsdp")),
    "None is open": ([[("up", P(None, "model"))], [("up", P("data"))]], P("data", "model", None)),
    "P() is open": ([[("up", P())], [("up", P("data"))]], P("data", None, None)),
    "a spec of None is open": ([[("up", None)], [("up", P("data"))]], P("data", None, None)),
    "a dim taken stays": ([[("up", P("data"))], [("up", P("model", "fsdp"))]], P("data", "fsdp", None)),
    "WHOLE closes": ([[("up", WHOLE)], [("up", P("data"))]], P(None, None, None)),
    "WHOLE closes what is still open": (
        [[("up", P("data"))], [("up", WHOLE)], [("up", P(None, "model"))]],
        P("data", None, None),
    ),
    "two axes on a dim": ([[("up", P(("data", "model")))]], P(("data", "model"), None, None)),
    "a lone axis in a tuple": ([[("up", P(("data",)))]], P("data", None, None)),
    "three axes on a dim": ([[("up", P(None, ("data", "fsdp", "model")))]], P(None, ("data", "fsdp", "model"), None)),
    "a function": ([[("up", give(P(None, None, "model")))]], P(None, None, "model")),
    "a function that gives None": ([[("up", give(None))], [("up", P("data"))]], P("data", None, None)),
    "a function that gives WHOLE": ([[("up", give(WHOLE))], [("up", P("data"))]], P(None, None, None)),
    "a function that gives a reason": ([[("up", give("too small"))], [("up", P("data"))]], P("data", None, None)),
    "a list that matches nothing beside one that does": (
        [[("down", P("data"))], [("up", P("model"))]],
        P("model", None, None),
    ),
}


@pytest.mark.parametrize(("lists", "spec"), LISTS.values(), ids=LISTS)
def test_lists_of_rules_make_the_spec(lists, spec):
    assert matched(*lists).spec == spec


def test_a_function_sees_the_leaf_the_mesh_and_what_is_taken():
    seen = []
    matched([("up", P(None, "model"))], [("up", lambda *args: seen.append(args))])
    [(leaf, mesh, so_far)] = seen
    assert (leaf, dict(mesh.shape), so_far) == (LEAF, MESH, P(None, "model", None))


def test_the_rules_that_gave_a_dim_are_told():
    assert matched([("up", P("data"))], [(".*", None)], [("kernel$", P(None, "model"))]).rule == "up + kernel$"


def test_each_reason_is_kept_though_another_list_splits_the_leaf():
    assert matched([("up", give("odd"))]).note == "odd"
    assert matched([("up", give("odd"))], [("up", P("data"))]).note == "odd"
    assert matched([("up", give("odd"))], [("up", give("small"))]).note == "odd; small"


def test_an_annotation_comes_before_every_list():
    match = matched([("up", P("fsdp", "data"))], annotation=P("model"))
    assert match.spec == P("model", "data", None)
    assert match.rule == "Flax's annotation + up"


def test_scalars_need_no_rule():
    assert matched([("nothing", P())], leaf=Leaf("params/x", (), None)).spec == P()


def test_a_leaf_that_no_list_reaches_is_an_error_that_gives_the_nearest_pattern():
    with pytest.raises(
        PartitionError, match=r"No partition rule matches 'params/mlp/up/kernel' \(nearest: 'mlp/up/kernl'\)"
    ):
        matched([("mlp/up/kernl", P())], [("zzz", P())])


@pytest.mark.parametrize("size", range(1, 20))
def test_a_dim_is_split_if_it_divides_and_named_if_not(size):
    leaf = Leaf("params/w", (3, size), jnp.float32)
    rules = [("w", P(None, ("data", "model")))]
    if size % 4 == 0:
        assert matched(rules, leaf=leaf).spec == P(None, ("data", "model"))
    else:
        message = rf"\(3, {size}\): dim 1 does not divide by 4, the size of mesh axes \('data', 'model'\)"
        with pytest.raises(PartitionError, match=message):
            matched(rules, leaf=leaf)


def test_check_rules_takes_lists_and_tuples_of_pairs():
    check_rules([[("a", P("data"))], (("b", None), ("c", WHOLE), ("d", give(None)))], jaxpar.make_mesh(data=8))
    with pytest.raises(PartitionError, match="not a pair"):
        check_rules([["a"]], jaxpar.make_mesh(data=8))


def test_axes_of_a_spec_come_in_the_order_of_its_dims():
    assert axes_of(P(("fsdp", "data"), None, "model")) == ("fsdp", "data", "model")
    assert axes_of(open_spec(3)) == ()


# optimizer leaves. A parameter w of shape (128, 256), laid out P("fsdp", "model") by its rules.

SHARE = {"fsdp": 2, "model": 4}
W_SPEC = P("fsdp", "model")
# The leaf's path, its shape, and its spec.
OPTIMIZER_LEAVES = [
    ("opt_state/0/mu/mlp/w", (128, 256), P("fsdp", "model")),
    ("opt_state/inner_states/a/inner_state/0/nu/mlp/w", (128, 256), P("fsdp", "model")),
    ("opt_state/0/v_row/mlp/w", (128,), P("fsdp")),
    ("opt_state/0/v_col/mlp/w", (256,), P("model")),
    ("opt_state/0/v/mlp/w", (1,), P(None)),
    ("opt_state/0/diff_params_memory/mlp/w", (10, 128, 256), P(None, "fsdp", "model")),
    ("opt_state/0/count", (), P()),
    ("opt_state/0/unknown/mlp/w", (7, 9), P(None, None)),
    ("opt_state/0/unknown", (128, 256), P(None, None)),
]


def optimizer_match(path, shape, lists=([("w", W_SPEC)],), param_shape=(128, 256)):
    mesh = jaxpar.make_mesh(**SHARE)
    param = Leaf("params/mlp/w", param_shape, jnp.float32)
    match = match_leaf(param, lists, mesh)
    return match_optimizer_leaf(Leaf(path, shape, jnp.float32), lists, mesh, {"mlp/w": (param, match)})


@pytest.mark.parametrize(("path", "shape", "spec"), OPTIMIZER_LEAVES)
def test_an_optimizer_leaf_is_split_as_its_parameter(path, shape, spec):
    assert optimizer_match(path, shape).spec == spec


def test_a_leaf_without_a_parameter_is_reported():
    assert "no parameter's path and shape explain it" in optimizer_match("opt_state/0/unknown/mlp/w", (7, 9)).note


def test_a_rule_for_the_optimizer_state_comes_first():
    lists = ([("^opt_state.*mu", P(None, "model")), ("w", W_SPEC)],)
    assert optimizer_match("opt_state/0/mu/mlp/w", (128, 256), lists).spec == P(None, "model")
    assert optimizer_match("opt_state/0/nu/mlp/w", (128, 256), lists).spec == W_SPEC


def test_a_closed_parameter_has_closed_moments():
    lists = ([("w", WHOLE), (".*", None)], jaxpar.FSDP)
    assert optimizer_match("opt_state/0/mu/mlp/w", (128, 256), lists).spec == P(None, None)


def test_zero1_splits_the_moments_of_a_parameter_that_stays_whole():
    mesh = jaxpar.make_mesh(data=8)
    param = Leaf("params/w", (128, 256), jnp.float32)
    params = {"w": (param, match_leaf(param, [jaxpar.ZERO1], mesh))}
    leaf = Leaf("opt_state/0/mu/w", (128, 256), jnp.float32)
    assert match_optimizer_leaf(leaf, [jaxpar.ZERO1], mesh, params).spec == P(None, "data")


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (128, 128), (4, 128, 256), (256, 4, 128), (128, 256, 4)])
def test_adafactors_means_keep_the_dims_that_optax_keeps(shape):
    largest, second = (int(dim) for dim in np.argsort(shape)[::-1][:2])
    axes = ["fsdp", "model"]
    spec = [None] * len(shape)
    spec[largest], spec[second] = axes
    lists = ([("w", P(*spec))],)
    for slot, dropped in (("v_row", largest), ("v_col", second)):
        kept = [dim for dim in range(len(shape)) if dim != dropped]
        found = optimizer_match(f"opt_state/0/{slot}/mlp/w", tuple(shape[dim] for dim in kept), lists, shape).spec
        assert found == P(*(spec[dim] for dim in kept)), slot


def test_the_parameter_with_the_longest_path_is_meant():
    mesh = jaxpar.make_mesh(**SHARE)
    leaves = {"w": P("fsdp"), "a/w": P(None, "model")}
    lists = ([("a/w", leaves["a/w"]), ("w", leaves["w"])],)
    params = {}
    for path in leaves:
        param = Leaf(f"params/{path}", (128, 256), jnp.float32)
        params[path] = (param, match_leaf(param, lists, mesh))
    for path, spec in leaves.items():
        leaf = Leaf(f"opt_state/0/mu/{path}", (128, 256), jnp.float32)
        assert match_optimizer_leaf(leaf, lists, mesh, params).spec == P(*spec, *[None] * (2 - len(spec))), path
