"""Bad input is named: a table of what may be given wrongly, and of what each message must say.

A message says what was given, what is needed and what to do next; the last line of its traceback is jaxpar's own.
"""

import functools
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar import (
    BatchError,
    DriftError,
    LossError,
    MeshError,
    PartitionError,
    StateError,
    data_parallel,
    evaluate,
    make_eval_step,
    make_mesh,
    make_train_step,
    pad_batch,
    sharded,
)
from jaxpar.island import island_size

pytestmark = pytest.mark.devices(8)

ROWS = 16
BATCH = {"x": np.ones((ROWS, 16), "float32"), "y": np.ones(ROWS, "float32")}
KEY = jax.random.key(0)
OPTIONS = {"xla_no_such_flag": True}


def init_fn(rng):
    return jaxpar.TrainState.create(nnx.Linear(16, 8, rngs=nnx.Rngs(rng)), optax.adam(1e-3))


def loss_fn(model, batch, rng):
    return ((model(batch["x"]) - batch["y"][:, None]) ** 2).mean(), {}


@functools.cache
def data():
    return sharded(make_mesh(data=8))


@functools.cache
def pmap():
    return data_parallel()


@functools.cache
def fsdp():
    return sharded(make_mesh(fsdp=8), jaxpar.FSDP)


@functools.cache
def four_devices():
    return sharded(make_mesh(data=4, devices=jax.devices()[:4]))


def linear(in_features=3, out_features=2):
    return nnx.Linear(in_features, out_features, rngs=nnx.Rngs(0))


def create(model=None, tx=None, **options):
    return jaxpar.TrainState.create(linear() if model is None else model, tx or optax.sgd(0.1), **options)


def layout(*rules, mesh=None, init_fn=init_fn):
    return sharded(mesh or make_mesh(data=8), *rules).layout(init_fn)


@functools.cache
def first_state():
    return data().init(init_fn, KEY)


def start(strategy, make_state=None):
    # To compile each init anew would take most of this file's time; a copy leaves the first state whole.
    return strategy.place(first_state()) if make_state is None else strategy.init(make_state, KEY)


def adam_state(rng):
    return create(linear(16, 1), optax.adam(0.1))


def put_back(step, name, other=None, make_state=None):
    """A part of a state from before a step, put into the one after it."""
    batch, before = step.strategy.shard_batch(BATCH), start(step.strategy, make_state)
    part = getattr(before, name)
    after, _ = step(before, batch)
    (other or step)(after.replace(**{name: part}), batch)


def fit_again(step):
    before = start(step.strategy)
    step(before, step.strategy.shard_batch(BATCH))
    jaxpar.fit(step, before, [BATCH], steps=1)


def step_on_two(first, second):
    """One step, called with the states of two linen models under one optimizer."""
    tx, strategy = optax.sgd(0.1), data()
    sum_all = lambda model, batch, rng: (sum(leaf.sum() for leaf in jax.tree.leaves(model)), {})
    step, batch = make_train_step(sum_all, strategy), strategy.shard_batch(BATCH)
    for params in (first, second):
        step(strategy.place(create({"params": params}, tx)), batch)


def train(loss_fn=loss_fn, batch=BATCH, strategy=None, make_state=None, **options):
    strategy = strategy or data()
    return make_train_step(loss_fn, strategy, **options)(start(strategy, make_state), strategy.shard_batch(batch))


def train_linen(returned, collections=None):
    dense = linen.Dense(8)

    def make_state(rng):
        return create({**dense.init(rng, BATCH["x"]), **(collections or {})})

    return train(
        lambda variables, batch, rng: (dense.apply(variables, batch["x"]).mean(), {}, returned), make_state=make_state
    )


def train_norm(use_running_average, *updates, strategy=None, metrics=lambda updates: {}, **options):
    """Trains linen's BatchNorm, whose statistics the loss function gives back only as `updates`."""
    layer = linen.BatchNorm(use_running_average)

    def loss(variables, batch, rng):
        y, changed = layer.apply(variables, batch["x"], mutable=["batch_stats"])
        return (y**2).mean(), metrics(changed), *updates

    return train(loss, strategy=strategy, make_state=lambda rng: create(layer.init(rng, BATCH["x"])), **options)


def measure(model, batch):
    return (model(batch["x"]) ** 2).mean()


def used_up(strategy):
    """Returns a state that a step has taken over."""
    state = start(strategy)
    make_train_step(loss_fn, strategy)(state, strategy.shard_batch(BATCH))
    return state


def step_twice_from(strategy):
    state, step, batch = start(strategy), make_train_step(loss_fn, strategy), strategy.shard_batch(BATCH)
    step(state, batch)
    return step(state, batch)


def with_deleted_leaf():
    batch = data().shard_batch(BATCH)
    batch["x"].delete()
    return make_train_step(loss_fn, data())(start(data()), batch)


def with_changed_params(change, strategy=data):
    state = start(strategy())
    return make_train_step(loss_fn, strategy())(
        state.replace(params=change(state.params)), strategy().shard_batch(BATCH)
    )


class Unviewable:
    """As a torch tensor on a GPU: NumPy can't view it."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("can't convert a tensor on cuda:0; use .cpu() first")


def nest_islands(outer, inner):
    """Asks for an island over one axis inside a shard_map over another."""
    mesh = make_mesh(data=2, model=4)
    ask = jax.shard_map(lambda x: x + island_size(inner), mesh=mesh, in_specs=P(), out_specs=P(), axis_names={outer})
    return jax.eval_shape(ask, jnp.ones(8))


def call_on_explicit_axes(island, *shape):
    """Calls an island under a mesh as `jax.make_mesh` makes it."""
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)):
        return jax.eval_shape(island, jnp.ones(shape))


# What to call, the error, and what its message says; a list gives parts of it, in any order.
EXPLICIT = ["['data', 'model'] are not of type Auto", "axis_types=(AxisType.Auto,) * 2", "jaxpar.make_mesh"]
KERNELS = jaxpar.ExpertKernels(*[jnp.ones((4, 8, 8))] * 3)
STACK = (lambda w, x: x * w, jnp.ones(4))
MESHES = {
    "pipeline on Explicit axes": (
        lambda: call_on_explicit_axes(lambda x: jaxpar.pipeline(STACK, x, stage_microbatches=2), 8, 8),
        EXPLICIT,
    ),
    "pipeline_loss on Explicit axes": (
        lambda: call_on_explicit_axes(
            lambda x: jaxpar.pipeline_loss(STACK, STACK, STACK, x, stage_microbatches=2)[0].total, 8, 8
        ),
        EXPLICIT,
    ),
    "attention on Explicit axes": (
        lambda: call_on_explicit_axes(lambda x: jaxpar.ring_attention(x, x, x), 2, 8, 4, 4),
        EXPLICIT,
    ),
    "Ulysses' attention on Explicit axes": (
        lambda: call_on_explicit_axes(lambda x: jaxpar.ulysses_attention(x, x, x), 2, 8, 4, 4),
        EXPLICIT,
    ),
    "splash attention on Explicit axes": (
        lambda: call_on_explicit_axes(lambda x: jaxpar.splash_attention(x, x, x), 2, 128, 4, 4),
        EXPLICIT,
    ),
    "a split sequence on Explicit axes": (lambda: call_on_explicit_axes(jaxpar.split_sequence, 2, 8), EXPLICIT),
    "experts on Explicit axes": (
        lambda: call_on_explicit_axes(lambda x: jaxpar.mixture_of_experts(x, jnp.ones((8, 4)), KERNELS), 8, 8),
        EXPLICIT,
    ),
    "too few for the devices": (
        lambda: make_mesh(data=3, model=2),
        "Mesh axes {'data': 3, 'model': 2} use 6 devices, but 8 are available; sizes must multiply to the device "
        "count. Pass devices=jax.devices()[:6] for a part of them.",
    ),
    "too many for the devices": (
        lambda: make_mesh(data=4, model=4),
        "Mesh axes {'data': 4, 'model': 4} use 16 devices, but 8 are available; sizes must multiply to the device "
        "count. To try it without them: jaxpar.fake_devices(16), before anything else uses JAX; on the command line "
        "--fake-devices 16.",
    ),
    "a misspelt axis": (
        lambda: make_mesh(modle=8),
        "Mesh axis 'modle' is unknown (nearest: 'model'); the axes are data, fsdp, stage, expert, context, model.",
    ),
    "a misspelt axis in text": (lambda: make_mesh("dta=8"), ["'dta'", "nearest: 'data'"]),
    "a size of zero": (
        lambda: make_mesh(data=0),
        "Mesh axis 'data' has size 0; a size is a whole number, 1 or more, or -1 once.",
    ),
    "a size of -2": (lambda: make_mesh(data=-2), ["'data' has size -2", "whole number"]),
    "a size that is no whole number": (
        lambda: make_mesh(data=2.0, model=4),
        "Mesh axis 'data' has size 2.0; a size is a whole number, 1 or more, or -1 once.",
    ),
    "a size that is a bool": (
        lambda: make_mesh(data=True, model=8),
        "Mesh axis 'data' has size True; a size is a whole number, 1 or more, or -1 once.",
    ),
    "a size that is text": (
        lambda: make_mesh(data="8"),
        "Mesh axis 'data' has size '8'; a size is a whole number, 1 or more, or -1 once.",
    ),
    "two sizes of -1": (lambda: make_mesh(data=-1, model=-1), ["['data', 'model'] are all -1", "one at most"]),
    "-1 beside sizes that leave a remainder": (
        lambda: make_mesh(data=-1, model=3),
        ["'data' is -1", "{'model': 3} use 3", "do not divide 8 devices"],
    ),
    "text without a size": (
        lambda: make_mesh("data"),
        "Mesh 'data' has the part 'data'; write axis=size, as in 'data=2,model=4'.",
    ),
    "text with a colon": (lambda: make_mesh("data:8"), ["the part 'data:8'", "'data=2,model=4'"]),
    "text that ends in a comma": (lambda: make_mesh("data=8,"), ["the part ''", "write axis=size"]),
    "empty text": (lambda: make_mesh(""), ["write axis=size"]),
    "an axis twice in text": (lambda: make_mesh("data=2,data=4"), ["gives axis 'data' twice: 2 and 4; give one."]),
    "an axis in text and as a keyword": (lambda: make_mesh("data=2", data=4), ["axis 'data' twice", "2", "4"]),
    "a dict in place of text": (
        lambda: make_mesh({"data": 8}),
        "The mesh is {'data': 8}, a dict; name each axis's size, as make_mesh(data=2, model=4), or write "
        "'data=2,model=4'.",
    ),
    "a number in place of text": (
        lambda: make_mesh(8),
        "The mesh is 8, a int; name each axis's size, as make_mesh(data=2",
    ),
    "no device": (
        lambda: make_mesh(devices=[], data=-1),
        "devices= is []; give a list of devices, as jax.devices()[:4].",
    ),
    "a device twice": (
        lambda: make_mesh(devices=jax.devices()[:1] * 2, data=2),
        "devices= holds 2 devices, 1 of them distinct; give each once.",
    ),
    "a count in place of devices": (
        lambda: make_mesh(devices=4, data=4),
        "devices= is 4; give a list of devices, as jax.devices()[:4].",
    ),
    "numbers in place of devices": (
        lambda: make_mesh(devices=[0, 1], data=2),
        "devices= is [0, 1]; give a list of devices, as jax.devices()[:4].",
    ),
    "a platform in place of devices": (
        lambda: make_mesh(devices="cpu", data=8),
        "devices= is 'cpu'; give a list of devices, as jax.devices()[:4].",
    ),
    "more fake devices than JAX started with": (
        lambda: jaxpar.fake_devices(99),
        [
            "99 fake devices were asked for",
            "already started with 8",
            "call fake_devices first",
            "JAX_NUM_CPU_DEVICES=99",
        ],
    ),
    "a number of fake devices that is text": (
        lambda: jaxpar.fake_devices("8"),
        "count is '8'; give a whole number of devices, 1 or more.",
    ),
    "no fake device": (lambda: jaxpar.fake_devices(0), "count is 0; give a whole number of devices, 1 or more."),
    "a mesh of one's own in another order": (
        lambda: sharded(
            Mesh(np.array(jax.devices()).reshape(2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
        ),
        "Mesh axes are ('model', 'data'), but must lie in the order ('data', 'model'); make_mesh orders them.",
    ),
    "a mesh of one's own with Explicit axes": (
        lambda: sharded(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))),
        ["['data'] are not of type Auto", "axis_types=(AxisType.Auto,) * 1", "jaxpar.make_mesh"],
    ),
    "a mesh of one's own with another name": (
        lambda: sharded(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))),
        ["'batch' is unknown", "data, fsdp, stage"],
    ),
    "slices that JAX knows nothing of": (
        lambda: make_mesh(data=2, model=4, slices=2),
        "slices=2, but the devices lie on 1, as {0: 8} (slice: devices); each of 2 needs as many. slice_of=lambda "
        "device: ... tells which slice a device is on.",
    ),
    "slices of two sizes": (
        lambda: make_mesh(data=2, model=4, slices=2, slice_of=lambda device: device.id // 5),
        ["slices=2, but the devices lie on 2, as {0: 5, 1: 3}"],
    ),
    "an axis across slices that the mesh lacks": (
        lambda: make_mesh(fsdp=2, model=4, slices=2, slice_of=lambda device: device.id % 2),
        ["slice_axis is 'data', which the mesh {'fsdp': 2, 'model': 4} does not have"],
    ),
    "an axis too small for the slices": (
        lambda: make_mesh(data=1, model=8, slices=2, slice_of=lambda device: device.id % 2),
        "Mesh axis 'data' of size 1 does not divide by 2 slices; give a multiple of it.",
    ),
    "no function that tells slices": (
        lambda: make_mesh(data=2, model=4, slices=2, slice_of=3),
        "slice_of is 3; give a function of a device, as lambda device: device.id // 4.",
    ),
    "slices that can't be told apart": (
        lambda: make_mesh(data=2, model=4, slices=2, slice_of=lambda device: "a" if device.id % 2 else 1),
        ["slice_of gave [1, 'a', 1, 'a',", "give for each device its slice's number, or for each a name."],
    ),
    "a slice that is a list": (
        lambda: make_mesh(data=2, model=4, slices=2, slice_of=lambda device: [device.id % 2]),
        ["slice_of gave [[0], [1],", "its slice's number"],
    ),
    "a list of axes across slices": (
        lambda: make_mesh(data=2, model=4, slices=2, slice_axis=["data"]),
        ["Mesh axis ['data'] is unknown", "the axes are data, fsdp"],
    ),
    "no axis across slices": (lambda: make_mesh(data=8, slices=2, slice_axis=None), ["Mesh axis None is unknown"]),
    "no slice": (lambda: make_mesh(data=8, slices=0), "slices is 0; give a whole number, 1 or more."),
    "an island in one over the same axis": (
        lambda: nest_islands("model", "model"),
        "An island over 'model' stands inside another one over 'model'; one of them is enough.",
    ),
    "an island in one over a later axis": (
        lambda: nest_islands("model", "data"),
        ["An island over 'data' stands inside one over 'model'", "data, fsdp, stage, expert, context, model"],
    ),
    "text in place of a mesh": (
        lambda: sharded("data=8"),
        "mesh is 'data=8', a str; give a jax.sharding.Mesh, as make_mesh returns.",
    ),
    "rules in place of a mesh": (
        lambda: sharded(jaxpar.FSDP),
        ["mesh is [('.*', <function", "a list; give a jax.sharding.Mesh, as make_mesh returns."],
    ),
    "an abstract mesh": (
        lambda: sharded(make_mesh(data=8).abstract_mesh),
        ["mesh is AbstractMesh(", "a AbstractMesh; give a jax.sharding.Mesh, as make_mesh returns."],
    ),
    "pmap over a device twice": (
        lambda: data_parallel(jax.devices()[:1] * 2),
        ["holds 2 devices, 1 of them distinct", "give each once"],
    ),
    "pmap over no device": (lambda: data_parallel([]), ["devices= is []", "give a list of devices"]),
    "pmap over a count": (lambda: data_parallel(4), ["devices= is 4", "give a list of devices"]),
    "pmap over a mesh": (lambda: data_parallel(make_mesh(data=8)), ["devices= is Mesh", "give a list of devices"]),
    "pmap over an axis without a name": (lambda: data_parallel(axis_name=""), ["axis_name is ''", "'data'"]),
}

RULES = {
    "layers that don't divide by the stages": (
        lambda: layout(
            jaxpar.PIPELINE,
            mesh=make_mesh(stage=8),
            init_fn=lambda rng: create({"params": {"blocks": {"kernel": jnp.ones((6, 4))}}}),
        ),
        "'params/blocks/kernel' has shape (6, 4): its 6 layers do not divide by 8, the size of mesh axis 'stage'; give "
        "a multiple of it, or a smaller axis.",
    ),
    "experts that don't divide": (
        lambda: layout(
            jaxpar.EXPERT,
            mesh=make_mesh(expert=8),
            init_fn=lambda rng: create({"params": {"experts": {"up": {"kernel": jnp.ones((12, 4, 4))}}}}),
        ),
        ["'params/experts/up/kernel' has shape (12, 4, 4): its 12 experts do not divide by 8", "'expert'"],
    ),
    "stages that split nothing": (
        lambda: layout(jaxpar.PIPELINE, mesh=make_mesh(stage=8)),
        ["Mesh axis 'stage' of size 8 splits no leaf: 8 devices would all do the same work", "make_mesh(data=8)"],
    ),
    "PIPELINE on a mesh without stages": (
        lambda: layout(jaxpar.PIPELINE, mesh=make_mesh(data=8)),
        "PIPELINE splits over mesh axis 'stage', which the mesh {'data': 8} does not have; give it one, as "
        "make_mesh(stage=-1), or leave PIPELINE out.",
    ),
    "EXPERT on a mesh without experts": (
        lambda: layout(jaxpar.EXPERT, mesh=make_mesh(data=8)),
        ["EXPERT splits over mesh axis 'expert', which the mesh {'data': 8} does not have", "leave EXPERT out"],
    ),
    "a stack's name as text": (
        lambda: jaxpar.stages(stacks="blocks"),
        "stacks is 'blocks'; give a list of modules' names, as ['blocks'].",
    ),
    "no name of experts": (lambda: jaxpar.experts(names=[]), "names is []; give a list of modules' names"),
    "one pair, not in a list": (
        lambda: sharded(make_mesh(data=8), (".*", P())),
        "Rule '.*' is not a pair (regex, spec); give one, as ('kernel$', P(None, 'model')).",
    ),
    "lists in a list": (
        lambda: sharded(make_mesh(fsdp=2, model=4), [jaxpar.MEGATRON, jaxpar.FSDP]),
        "A list of rules holds a list itself, which is not a pair (regex, spec); give each list of rules by itself, as "
        "sharded(mesh, MEGATRON, FSDP).",
    ),
    "a regex alone": (
        lambda: sharded(make_mesh(data=8), "kernel$"),
        "rules are 'kernel$'; give lists of (regex, spec) pairs, as [('kernel$', P('model'))].",
    ),
    "a dict of rules": (lambda: sharded(make_mesh(data=8), {"kernel$": P()}), ["rules are {", "(regex, spec) pairs"]),
    "a spec that is an axis": (
        lambda: sharded(make_mesh(data=8), [("kernel$", "data")]),
        "Rule 'kernel$' gives 'data'; a spec is a PartitionSpec, None, WHOLE or a function f(leaf, mesh, spec_so_far).",
    ),
    "a spec that is a tuple": (
        lambda: sharded(make_mesh(data=8), [("k", ("data",))]),
        "Rule 'k' gives ('data',); a spec is a PartitionSpec, None, WHOLE or a function f(leaf, mesh, spec_so_far).",
    ),
    "a regex that doesn't compile": (
        lambda: sharded(make_mesh(data=8), [("kernel(", P())]),
        [
            "Rule 'kernel('",
            "not a regular expression",
            "unterminated subpattern",
            "; escape what is no pattern, by re.escape.",
        ],
    ),
    "a misspelt axis": (
        lambda: sharded(make_mesh(data=4, model=2), [("kernel", P("modle"))]),
        "Rule 'kernel' splits dim 0 over 'modle' (nearest: 'model'); the mesh is {'data': 4, 'model': 2}.",
    ),
    "an axis that the mesh lacks": (
        lambda: sharded(make_mesh(data=8), [("kernel", P(None, "model"))]),
        "Rule 'kernel' splits dim 1 over 'model', which the mesh {'data': 8} does not have; add it, if only as "
        "model=1, or choose another axis.",
    ),
    "an axis that is a number": (
        lambda: layout([("kernel", P(1)), (".*", P())]),
        "Rule 'kernel' gives 1 for dim 0; name axes of the mesh {'data': 8}.",
    ),
    "UNCONSTRAINED": (
        lambda: sharded(make_mesh(data=8), [("kernel", P(P.UNCONSTRAINED))]),
        ["UNCONSTRAINED for dim 0", "needs an axis or None"],
    ),
    "an axis on two dims": (
        lambda: layout([("kernel", P("data", "data")), (".*", P())]),
        "Rule 'kernel' gives P('data', 'data'), which names 'data' twice; an axis splits one dim of a leaf.",
    ),
    "an axis twice on one dim": (
        lambda: layout([("kernel", P(("data", "data"))), (".*", P())]),
        "Rule 'kernel' gives P(('data', 'data'),), which names 'data' twice; an axis splits one dim of a leaf.",
    ),
    "an axis again in a later list": (
        lambda: layout([("kernel", P("data")), (".*", P())], [("kernel", P(None, "data")), (".*", P())]),
        ["splits dim 1 of 'params/kernel' over 'data'", "P('data', None)", "P(None, 'data')", "twice"],
    ),
    "more dims than the leaf": (
        lambda: layout([("bias", P(None, "data")), (".*", P())]),
        "Rule 'bias' gives P(None, 'data') for 'params/bias', 2 dims, but its shape (8,) has 1; give as many, "
        "or fewer.",
    ),
    "a dim that doesn't divide": (
        lambda: layout([("kernel", P("data")), (".*", P())], init_fn=lambda rng: create(linear(9, 8))),
        "'params/kernel' has shape (9, 8): dim 0 does not divide by 8, the size of mesh axes ('data',), which rule "
        "'kernel' names; name others, or pad the dim.",
    ),
    "no rule for a leaf": (
        lambda: layout([("kernel", P("data"))]),
        "No partition rule matches 'params/bias'; add a rule for it, or end the list with ('.*', P()).",
    ),
    "no rule for a leaf, but one spelt alike": (
        lambda: layout([("bias", P()), ("params/kernl", P("data"))]),
        "No partition rule matches 'params/kernel' (nearest: 'params/kernl'); add a rule for it, or end the list with "
        "('.*', P()).",
    ),
    "a function that gives a number": (
        lambda: layout([("kernel", lambda leaf, mesh, so_far: 3), (".*", P())]),
        "The function of rule 'kernel' gave 3 for 'params/kernel'; it gives a PartitionSpec, None, WHOLE, or a "
        "sentence saying why it leaves the leaf as it is.",
    ),
    "a function that gives an unknown axis": (
        lambda: layout([("kernel", lambda leaf, mesh, so_far: P("dat")), (".*", P())]),
        ["The function of rule 'kernel', for 'params/kernel'", "dim 0 over 'dat'", "nearest: 'data'", "{'data': 8}"],
    ),
    "a function that gives too many dims": (
        lambda: layout([("bias", lambda leaf, mesh, so_far: P(None, None, "data")), (".*", P())]),
        "Rule 'bias' gives P(None, None, 'data') for 'params/bias', 3 dims, but its shape (8,) has 1; give as "
        "many, or fewer.",
    ),
    "FSDP without its axis": (
        lambda: layout(jaxpar.FSDP),
        "FSDP splits over mesh axis 'fsdp', which the mesh {'data': 8} does not have; give it one, as "
        "make_mesh(fsdp=-1), or leave FSDP out.",
    ),
    "MEGATRON without its axis": (
        lambda: layout(jaxpar.MEGATRON),
        ["MEGATRON splits over mesh axis 'model'", "{'data': 8}", "make_mesh(model=-1)"],
    ),
    "ZERO1 without its axis": (
        lambda: layout(jaxpar.ZERO1, mesh=make_mesh(fsdp=8)),
        ["ZERO1 splits over mesh axis 'data'", "{'fsdp': 8}", "make_mesh(data=-1)"],
    ),
    "a model axis that splits nothing": (
        lambda: layout(mesh=make_mesh(data=2, model=4)),
        "Mesh axis 'model' of size 4 splits no leaf: 4 devices would all do the same work; add jaxpar.MEGATRON, or "
        "rules that name 'model', or give its devices to another axis, as make_mesh(data=8).",
    ),
    "a model axis whose rules know no layer": (
        lambda: layout(
            jaxpar.MEGATRON,
            mesh=make_mesh(model=8),
            init_fn=lambda rng: create({"params": {"first": {"kernel": jnp.ones((8, 8))}}}),
        ),
        "Mesh axis 'model' of size 8 splits no leaf: 8 devices would all do the same work. The rules leave "
        "'params/first/kernel' whole over 'model': MEGATRON doesn't know this layer; megatron(column=[...], "
        "row=[...]) names more. Give rules that name 'model', or give its devices to another axis, as "
        "make_mesh(data=8).",
    ),
    "an fsdp axis that splits nothing": (
        lambda: layout(mesh=make_mesh(fsdp=8)),
        ["'fsdp' of size 8 splits no leaf", "8 devices would each hold the same whole state", "jaxpar.FSDP"],
    ),
    "FSDP with leaves that are all small": (
        lambda: layout(jaxpar.rules.fsdp(min_size=10**6), mesh=make_mesh(fsdp=8)),
        ["'fsdp' of size 8 splits no leaf"],
    ),
    "a smallest size that is text": (
        lambda: jaxpar.rules.fsdp(min_size="1k"),
        "min_size is '1k'; give a whole number of elements, 0 or more.",
    ),
    "layers' names as one text": (
        lambda: jaxpar.rules.megatron(column="up"),
        "column is 'up'; give a list of modules' names, as ['up'].",
    ),
    "None in place of layers' names": (
        lambda: jaxpar.rules.megatron(row=None),
        "row is None; give a list of modules' names, as ['down'].",
    ),
    "a number in place of stacks": (
        lambda: jaxpar.rules.stages(stacks=3),
        "stacks is 3; give a list of modules' names, as ['blocks'].",
    ),
    "batch rules that are a list of lists": (
        lambda: sharded(make_mesh(data=8), batch_rules=[[("x", P())]]),
        ["is not a pair (regex, spec)"],
    ),
    "batch rules for an axis that the mesh lacks": (
        lambda: sharded(make_mesh(data=8), batch_rules=[("x", P("model"))]),
        ["Rule 'x' splits dim 0 over 'model'", "{'data': 8}"],
    ),
    "batch rules with more dims than the leaf": (
        lambda: sharded(make_mesh(data=8), batch_rules=[("x", P("data", None, None))]).shard_batch(BATCH),
        "Rule 'x' gives P('data', None, None) for 'x', 3 dims, but its shape (16, 16) has 2; give as many, or fewer.",
    ),
}

INIT_FN = (
    "The state is the function init_fn; give what strategy.init(init_fn, rng) or strategy.place returned, or, of "
    "shapes alone, strategy.abstract_state(init_fn)."
)
STATES = {
    "no key": (
        lambda: make_train_step(loss_fn, data())(start(data()).replace(rng=None), data().shard_batch(BATCH)),
        "The state's rng is a NoneType; the train step folds one typed key, as jax.random.key(0).",
    ),
    "many keys": (
        lambda: make_train_step(loss_fn, data())(
            data().place(start(data()).replace(rng=jax.random.split(KEY, 3))), data().shard_batch(BATCH)
        ),
        "The state's rng is of shape (3,); the train step folds one typed key, as jax.random.key(0).",
    ),
    "an optimizer that searches along a line": (
        lambda: train(make_state=lambda rng: create(linear(16, 1), optax.lbfgs())),
        [
            "The optimizer can't be used: its update raised TypeError: ",
            "'value_fn'. A step calls tx.update(gradients, ",
        ],
    ),
    "an optimizer of other parameters": (
        lambda: train(make_state=lambda rng: create(linear(16, 1), optax.lookahead(optax.sgd(0.1), 5, 0.5))),
        [
            "The optimizer can't be used: its update raised AttributeError: ",
            "A step calls tx.update(gradients, opt_state",
        ],
    ),
    "parameters that an earlier step took over": (
        lambda: put_back(make_train_step(loss_fn, data()), "params"),
        "State leaf 'params/bias' is gone: an earlier call of a step took over the memory of its state; use the state "
        "that the call returned, or strategy.place(state) for a copy beforehand.",
    ),
    "parameters that an earlier step took over, under pmap": (
        lambda: put_back(make_train_step(loss_fn, pmap()), "params"),
        "State leaf 'params/bias' is gone: an earlier call",
    ),
    "parameters that an earlier step took over, to evaluate": (
        lambda: put_back(make_train_step(loss_fn, data()), "params", make_eval_step(loss_fn, data())),
        "State leaf 'params/bias' is gone: an earlier call",
    ),
    "a state that an earlier step took over, to fit": (
        lambda: fit_again(make_train_step(loss_fn, data())),
        "State leaf 'step' is gone: an earlier call",
    ),
    "moments that an earlier step took over": (
        lambda: put_back(make_train_step(loss_fn, data()), "opt_state", make_state=adam_state),
        "State leaf 'opt_state/0/count' is gone: an earlier call",
    ),
    "a teacher that is the parameters themselves": (
        lambda: data().compile(lambda states, batch: (states, {}))(
            {"student": (state := start(data())), "teacher": state.params}, data().shard_batch(BATCH)
        ),
        "State leaves 'student/params/bias' and 'teacher/bias' are one array, whose memory a step can take over once; "
        "give each its own, as strategy.place(state) does.",
    ),
    "a teacher that is the parameters themselves, under pmap": (
        lambda: pmap().compile(lambda states, batch: (states, {}))(
            {"student": (state := start(pmap())), "teacher": state.params}, pmap().shard_batch(BATCH)
        ),
        "State leaves 'student/params/bias' and 'teacher/bias' are one array",
    ),
    "another model's state, of other shapes": (
        lambda: step_on_two({"a": np.ones(4, "float32")}, {"a": np.ones(5, "float32")}),
        "State leaf 'params/a' is (5,) float32, but the step was compiled for (4,) float32; make a step of its own for "
        "another model.",
    ),
    "another model's state, of more leaves": (
        lambda: step_on_two({"a": np.ones(4, "float32")}, {"a": np.ones(4, "float32"), "b": np.ones(4, "float32")}),
        "The state's leaves are not those that the step was compiled for: they differ in ['params/b']; make a step of "
        "its own for another model.",
    ),
    "another model's state, of another leaf": (
        lambda: step_on_two({"a": np.ones(4, "float32")}, {"c": np.ones(4, "float32")}),
        "The state's leaves are not those that the step was compiled for: they differ in ['params/a', 'params/c']; "
        "make a step of its own for another model.",
    ),
    "an optimizer not made": (
        lambda: jaxpar.TrainState.create(linear(), optax.adam),
        "tx is a function; give an optax.GradientTransformation, as optax.adamw(3e-4).",
    ),
    "no optimizer": (lambda: jaxpar.TrainState.create(linear(), None), ["tx is a NoneType", "optax.adamw"]),
    "nnx's optimizer": (
        lambda: create(tx=nnx.Optimizer(linear(), optax.sgd(0.1), wrt=nnx.Param)),
        ["tx is a Optimizer", "GradientTransformation"],
    ),
    "a model's class": (
        lambda: create(nnx.Linear),
        "model is the class Linear; give a module made of it, or linen variables.",
    ),
    "a linen module": (
        lambda: create(linen.Dense(3)),
        "model is the linen module Dense; give its variables: module.init(key, x).",
    ),
    "linen parameters alone": (
        lambda: create({"kernel": jnp.ones((3, 2))}),
        "model is a mapping with the keys ['kernel']; give an nnx.Module, or linen variables: {'params': ...}.",
    ),
    "a list of arrays": (
        lambda: create([jnp.ones(3)]),
        "model is <class 'list'>; give an nnx.Module, or linen variables: {'params': ...}.",
    ),
    "parameters that are one array": (
        lambda: create({"params": jnp.ones(3)}),
        "'params' is no dict; linen's params are nested dicts of arrays.",
    ),
    "parameters in a list": (
        lambda: create({"params": {"layers": [jnp.ones(3), jnp.ones(3)]}}),
        "'params/layers' is no dict; linen's params are nested dicts of arrays.",
    ),
    "a parameter that is text": (
        lambda: create({"params": {"w": "hello"}}),
        "'params/w' is 'hello', a str and not an array; make the model inside init_fn, and the state with "
        "strategy.init.",
    ),
    "parameters of whole numbers alone": (
        lambda: create({"params": {"w": jnp.ones(3, int)}}),
        ["None of the 1", "'params/w'", "let a floating-point one be."],
    ),
    "no parameter": (lambda: create({"params": {}}), ["None of the 0 parameters", "no parameters"]),
    "two parameters of one path": (
        lambda: create({"params": {"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}}}),
        "Two leaves of the model have the path 'params/a/b'; rename one, without a '/' in its name.",
    ),
    "nothing trainable": (
        lambda: create(trainable=lambda path: "kernl" in path),
        "None of the 2 parameters is trained: no path passes trainable=, such as 'params/bias'; let a floating-point "
        "one be.",
    ),
    "trainable as text": (
        lambda: create(trainable="kernel"),
        "trainable is 'kernel'; give a function of a parameter's path that returns a bool.",
    ),
    "a key that is a number": (lambda: create(rng=3), "rng is 3; give a random key, as jax.random.key(0)."),
    "a scale that is a number": (lambda: create(dynamic_scale=1024.0), ["dynamic_scale is 1024.0", "DynamicScale()"]),
    "a model of shapes": (lambda: create(nnx.eval_shape(linear)), ["'params/bias'", "ShapeDtypeStruct"]),
    "an init_fn that returns nothing": (
        lambda: data().init(lambda rng: None, KEY),
        "init_fn returned a NoneType; it returns what jaxpar.TrainState.create gives.",
    ),
    "an init_fn that returns a model": (
        lambda: data().init(lambda rng: linear(), KEY),
        ["Linear", "TrainState.create"],
    ),
    "an init_fn that returns a pair": (
        lambda: data().init(lambda rng: (init_fn(rng), 1), KEY),
        ["init_fn returned a tuple", "TrainState.create"],
    ),
    "an init_fn that is a model": (
        lambda: data().layout(linear()),
        ["init_fn is a Linear", "TrainState.create(Model(rngs=nnx.Rngs(rng))", "strategy.place"],
    ),
    "an init_fn that is a model's class": (lambda: data().init(nnx.Linear, KEY), ["init_fn is the class Linear"]),
    "an init_fn that is a state": (
        lambda: data().init(create(), KEY),
        "init_fn is a TrainState; give a function of a random key that returns a jaxpar.TrainState, as lambda "
        "rng: jaxpar.TrainState.create(Model(rngs=nnx.Rngs(rng)), optax.adam(1e-3)). A state that exists is "
        "placed by strategy.place.",
    ),
    "an init_fn that is a state, for shapes": (
        lambda: data().abstract_state(create()),
        "init_fn is a TrainState; give a function of a random key that returns a jaxpar.TrainState, as lambda "
        "rng: jaxpar.TrainState.create(Model(rngs=nnx.Rngs(rng)), optax.adam(1e-3)). A state that exists is "
        "placed by strategy.place.",
    ),
    "a seed in place of a key": (lambda: data().init(init_fn, 0), ["rng is 0", "jax.random.key(0)"]),
    "two keys": (lambda: data().init(init_fn, jax.random.split(KEY)), ["rng", "(2,)", "jax.random.key(0)"]),
    "a layout of nothing": (
        lambda: data().layout(None),
        "The state is a NoneType; place and layout take what jaxpar.TrainState.create gives.",
    ),
    "a dict to lay out": (lambda: data().layout({"w": jnp.ones(3)}), ["The state is a dict", "TrainState.create"]),
    "shapes to place": (
        lambda: data().place(data().abstract_state(init_fn)),
        "State leaf 'step' is a shape, not an array; make the state with strategy.init.",
    ),
    "a state to place that a step took over": (
        lambda: data().place(used_up(data())),
        "State leaf 'step' is gone: a step took over its memory; place what it returned.",
    ),
    "a state that isn't placed": (
        lambda: make_train_step(loss_fn, data())(init_fn(KEY), data().shard_batch(BATCH)),
        "State leaf 'step' lies on 1 devices, but sharded({'data': 8}, 0 lists of rules) uses 8; make the state with "
        "strategy.init, or strategy.place(state).",
    ),
    "a state that isn't placed, under pmap": (
        lambda: make_train_step(loss_fn, pmap())(init_fn(KEY), pmap().shard_batch(BATCH)),
        ["'step' lies on 1 devices", "uses 8", "strategy.place(state)"],
    ),
    "a state that isn't placed, to lower": (
        lambda: make_train_step(loss_fn, data()).lower(init_fn(KEY), BATCH),
        "State leaf 'step' lies on 1 devices, but sharded({'data': 8}, 0 lists of rules) uses 8; make the state "
        "with strategy.init, or strategy.place(state).",
    ),
    "shapes in place of a state": (
        lambda: make_train_step(loss_fn, data())(data().abstract_state(init_fn), data().shard_batch(BATCH)),
        ["'step' is a ShapeDtypeStruct", "strategy.init"],
    ),
    "another strategy's state": (
        lambda: make_train_step(loss_fn, data())(start(fsdp()), data().shard_batch(BATCH)),
        "State leaf 'params/kernel' is laid out as P('fsdp', None), but sharded({'data': 8}, 0 lists of rules) lays it "
        "out as P(None, None); use strategy.place(state).",
    ),
    "another strategy's state, under pmap": (
        lambda: make_train_step(loss_fn, pmap())(start(fsdp()), pmap().shard_batch(BATCH)),
        ["'params/kernel' is laid out as P('fsdp', None)", "strategy.place(state)"],
    ),
    "a state on fewer devices": (
        lambda: make_train_step(loss_fn, data())(start(four_devices()), data().shard_batch(BATCH)),
        ["'step' lies on 4 devices", "uses 8"],
    ),
    "no state": (
        lambda: make_train_step(loss_fn, data())(None, data().shard_batch(BATCH)),
        ["The state", "None", "jaxpar.TrainState"],
    ),
    "a model in place of a state": (
        lambda: make_train_step(loss_fn, data())(start(data()).model, data().shard_batch(BATCH)),
        ["The state is a Linear", "jaxpar.TrainState"],
    ),
    "the batch first": (
        lambda: make_train_step(loss_fn, data())(data().shard_batch(BATCH), start(data())),
        "The batch is a TrainState; call the step with (state, batch).",
    ),
    "the batch first, under pmap": (
        lambda: make_train_step(loss_fn, pmap())(pmap().shard_batch(BATCH), start(pmap())),
        "The batch is a TrainState; call the step with (state, batch).",
    ),
    "a state that the step took over": (
        lambda: step_twice_from(data()),
        ["step", "earlier call of a step took over the memory", "use the state that the call returned"],
    ),
    "a state that the step took over, under pmap": (
        lambda: step_twice_from(pmap()),
        ["step", "earlier call of a step took over the memory", "use the state that the call returned"],
    ),
    "a state that another step took over": (
        lambda: make_train_step(loss_fn, data())(used_up(data()), data().shard_batch(BATCH)),
        ["step", "earlier call of a step took over the memory", "use the state that the call returned"],
    ),
    "a state that a step took over, to evaluate": (
        lambda: evaluate(make_eval_step(loss_fn, data()), used_up(data()), [BATCH]),
        ["step", "earlier call of a step took over the memory", "use the state that the call returned"],
    ),
    "NumPy parameters": (
        lambda: with_changed_params(lambda params: jax.tree.map(np.asarray, params)),
        ["'params/bias' is a ndarray, not an array on devices", "strategy.place(state)"],
    ),
    "a parameter taken out": (
        lambda: with_changed_params(lambda params: {"kernel": params["kernel"]}),
        "The state's opt_state doesn't fit its params: they differ in ['0/mu/bias', '0/nu/bias']; make it anew "
        "with TrainState.create.",
    ),
    "no state to evaluate": (
        lambda: evaluate(make_eval_step(loss_fn, data()), None, [BATCH]),
        ["The state", "None", "jaxpar.TrainState"],
    ),
    "float16 without a scale": (
        lambda: train(compute_dtype=jnp.float16),
        "compute_dtype is float16, but the state has no dynamic_scale: its gradients would underflow. Create it with "
        "TrainState.create(..., dynamic_scale=flax.training.dynamic_scale.DynamicScale()).",
    ),
    "a loss in place of init_fn": (
        lambda: data().init(loss_fn, KEY),
        "init_fn takes (model, batch, rng), but is called as init_fn(rng); give a function init_fn(rng).",
    ),
    "an init_fn in place of a state, to lower": (
        lambda: make_train_step(loss_fn, data()).lower(init_fn, BATCH),
        INIT_FN,
    ),
    "an init_fn in place of a state": (
        lambda: make_train_step(loss_fn, data())(init_fn, data().shard_batch(BATCH)),
        INIT_FN,
    ),
    "an init_fn in place of a state, under pmap": (
        lambda: make_train_step(loss_fn, pmap())(init_fn, pmap().shard_batch(BATCH)),
        INIT_FN,
    ),
    "an init_fn in place of a state, to evaluate": (
        lambda: evaluate(make_eval_step(loss_fn, data()), init_fn, [BATCH]),
        INIT_FN,
    ),
    "an init_fn in place of a state, to place": (lambda: data().place(init_fn), INIT_FN),
    "a partial init_fn in place of a state": (
        lambda: data().place(functools.partial(init_fn, KEY)),
        ["The state is a partial; give what strategy.init(init_fn, rng)", "strategy.abstract_state(init_fn)"],
    ),
    "a jitted init_fn in place of a state": (
        lambda: make_train_step(loss_fn, data()).lower(jax.jit(init_fn), BATCH),
        ["The state is the", "init_fn; give what strategy.init(init_fn, rng)"],
    ),
    "text in a state to place": (
        lambda: data().place({"a": {"b": "x"}}),
        "State leaf 'a/b' is 'x', a str; give an array of numbers.",
    ),
    "an object in a state to place": (
        lambda: data().place({"a": np.ones(2), "b": object}),
        "State leaf 'b' is <class 'object'>, a type; give an array of numbers.",
    ),
    "updates of a collection that the state lacks": (
        lambda: train_linen({"cache": {}}),
        "loss_fn returned updates for ['cache'], but the state holds the collections []; return those alone, or give "
        "the others to TrainState.create.",
    ),
    "statistics of another shape": (
        lambda: train_linen({"stats": {"n": jnp.ones(4)}}, {"stats": {"n": jnp.ones(3)}}),
        "'model_state/stats/n' changed its shape from (3,) to (4,); a step keeps it. Give it back as it came, and let "
        "a history that grows be a metric, or be kept outside the model.",
    ),
    "statistics of other names": (
        lambda: train_linen({"stats": {"m": jnp.ones(3)}}, {"stats": {"n": jnp.ones(3)}}),
        "The model's state changed its leaves, by ['stats/m', 'stats/n']; a step keeps them. Give back each collection "
        "with the leaves that it came with, and what was gathered besides in the metrics.",
    ),
}

BATCHES = {
    "a sequence that doesn't divide by context": (
        lambda: sharded(make_mesh(data=4, context=2)).shard_batch({"x": np.ones((8, 3))}),
        "Batch leaf 'x' has shape (8, 3): dim 1, taken for the sequence, does not divide by 2, the size of mesh axis "
        "'context'; pad it, or close the leaf by batch_rules=[('x', jaxpar.WHOLE)] if every device needs it whole.",
    ),
    "rows that don't divide": (
        lambda: data().shard_batch({"x": np.ones((30, 4))}),
        "Batch leaf ['x'] has 30 examples, which do not divide by 8 data shards; pad to 32 with jaxpar.pad_batch, or "
        "use 24.",
    ),
    "fewer rows than shards": (
        lambda: pmap().shard_batch({"x": np.ones(7)}),
        "Batch leaf ['x'] has 7 examples, which do not divide by 8 data shards; pad to 8 with jaxpar.pad_batch.",
    ),
    "rows that don't divide by shards and microbatches": (
        lambda: train(num_microbatches=3),
        "The batch has 16 examples, which do not divide by 8 shards x 3 microbatches = 24; pad to 24 with "
        "jaxpar.pad_batch.",
    ),
    "rows that don't divide by shards and microbatches, under pmap": (
        lambda: train(strategy=pmap(), num_microbatches=4),
        ["16 examples", "8 shards x 4 microbatches = 32", "pad to 32"],
    ),
    "rows that don't divide by microbatches, to lower": (
        lambda: make_train_step(loss_fn, data(), num_microbatches=3).lower(data().abstract_state(init_fn), BATCH),
        ["16 examples", "8 shards x 3 microbatches = 24"],
    ),
    "rows split unlike one another, with microbatches": (
        lambda: train(
            strategy=sharded(
                make_mesh(data=4, model=2), [("kernel", P("model")), (".*", P())], batch_rules=[("y", P("model"))]
            ),
            num_microbatches=2,
        ),
        "The batch rules split the rows over ('data',) for some leaves alone, as {\"['x']\": 'data', \"['y']\": None} "
        "tells; a step that cuts the batch into parts needs all split alike.",
    ),
    "leaves that differ in their rows": (
        lambda: data().shard_batch({"x": np.ones((8, 3)), "y": np.ones(16)}),
        "Batch leaf ['y'] has 16 examples, but ['x'] has 8; all need the same first dim, or, for one without rows, "
        "sharded(..., batch_rules=[(regex, jaxpar.WHOLE)]) and pad_batch(..., whole=[regex]).",
    ),
    "no row": (
        lambda: data().shard_batch({"x": np.ones((0, 3))}),
        "Batch leaf ['x'] has the shape (0, 3): 0 examples; at least 1 is needed: leave such a batch out.",
    ),
    "scalars alone": (
        lambda: data().shard_batch({"t": np.float32(1)}),
        "The batch has no leaf with a dim of examples: each of its 1 is a scalar, or kept whole; give at least one "
        "array with the examples in dim 0.",
    ),
    "nothing": (
        lambda: data().shard_batch(None),
        "The batch None has no leaf; give a dict of arrays, as {'x': x, 'y': y}.",
    ),
    "text": (
        lambda: data().shard_batch({"x": ["a"] * 8}),
        "Batch leaf ['x'] has dtype <U1, which no device holds; turn text into numbers (tokens) or leave the leaf out.",
    ),
    "bytes": (lambda: data().shard_batch({"x": np.array([b"ab"] * 8)}), ["['x'] has dtype |S2", "tokens"]),
    "one text for all rows": (
        lambda: data().shard_batch({**BATCH, "split": "train"}),
        ["['split']", "leave the leaf out"],
    ),
    "dates": (
        lambda: data().shard_batch({"x": np.zeros(8, "datetime64[D]")}),
        ["['x'] has dtype datetime64[D]", "no device holds"],
    ),
    "a ragged list": (
        lambda: data().shard_batch({"x": [[1, 2], [3]] * 4}),
        "Batch leaf ['x'] is ragged: its 8 rows have different lengths; pad them to one length, with a mask or weights "
        "for what was added.",
    ),
    "a ragged array of objects": (
        lambda: data().shard_batch({"x": np.array([np.ones(2), np.ones(3)] * 4, dtype=object)}),
        ["['x']", "ragged or not numbers"],
    ),
    "a list of rows of unequal lengths": (
        lambda: data().shard_batch({"x": [np.ones(2), np.ones(3)]}),
        "Batch leaf ['x'][1] has 3 examples, but ['x'][0] has 2; all need the same first dim, or, for one without"
        " rows, sharded(..., batch_rules=[(regex, jaxpar.WHOLE)]) and pad_batch(..., whole=[regex]).",
    ),
    "whole numbers beyond int32": (
        lambda: data().shard_batch({"x": np.full(8, 2**40)}),
        "Batch leaf ['x'] holds int64 values from 1099511627776 to 1099511627776, but JAX keeps int32 (-2147483648 to "
        "2147483647) unless jax_enable_x64 is set; set it, or make them smaller.",
    ),
    "negative numbers beyond int32": (
        lambda: data().shard_batch({"x": [-(2**40)] * 8}),
        ["int64 values from -1099511627776"],
    ),
    "whole numbers beyond uint32": (
        lambda: data().shard_batch({"x": np.full(8, 2**63, np.uint64)}),
        ["uint64 values", "JAX keeps uint32 (0 to 4294967295)"],
    ),
    "a set": (lambda: data().shard_batch({"x": {1, 2}}), ["['x'] is a set", "array of numbers"]),
    "an iterator": (
        lambda: data().shard_batch(iter([1, 2])),
        "The batch is a list_iterator, an iterator; give one batch of it, as next(batches).",
    ),
    "what NumPy can't view": (
        lambda: data().shard_batch({"x": Unviewable()}),
        ["['x'] is a Unviewable", "use .cpu() first"],
    ),
    "keys of mixed types": (
        lambda: data().shard_batch({0: np.ones(8), "a": np.ones(8)}),
        ["batch", "dict whose keys are all"],
    ),
    "shapes": (
        lambda: data().shard_batch({"x": jax.ShapeDtypeStruct((8,), "float32")}),
        "Batch leaf ['x'] is a shape, not an array; abstract_batch takes shapes.",
    ),
    "a batch that isn't placed": (
        lambda: make_train_step(loss_fn, data())(start(data()), BATCH),
        "Batch leaf ['x'] is a ndarray, not an array on the strategy's devices; pass strategy.shard_batch(batch).",
    ),
    "a batch of lists that isn't placed": (
        lambda: make_train_step(loss_fn, data())(start(data()), {"x": [1.0] * 8}),
        ["['x'][0]", "strategy.shard_batch(batch)"],
    ),
    "a batch that isn't placed, to an eval step": (
        lambda: make_eval_step(loss_fn, pmap())(start(pmap()), BATCH),
        ["['x']", "strategy.shard_batch(batch)"],
    ),
    "a batch on fewer devices": (
        lambda: make_train_step(loss_fn, data())(start(data()), four_devices().shard_batch(BATCH)),
        ["['x'] of shape (16, 16) lies as P('data', None) on 4 devices", "on its 8; pass strategy.shard_batch(batch)."],
    ),
    "jit's batch under pmap": (
        lambda: make_train_step(loss_fn, pmap())(start(pmap()), data().shard_batch(BATCH)),
        ["['x']", "strategy.shard_batch(batch)"],
    ),
    "jit's batch of as many rows as devices under pmap": (
        lambda: make_train_step(loss_fn, pmap())(
            start(pmap()), data().shard_batch({"x": np.ones((8, 2, 32), "float32"), "y": np.ones((8, 2), "int32")})
        ),
        ["['x']", "strategy.shard_batch(batch)"],
    ),
    "pmap's batch under jit": (
        lambda: make_train_step(loss_fn, data())(start(data()), pmap().shard_batch(BATCH)),
        "Batch leaf ['x'] of shape (8, 2, 16) lies as data_parallel places it, not as sharded({'data': 8}, 0 lists of "
        "rules) places it on its 8; pass strategy.shard_batch(batch).",
    ),
    "pmap's batch to place again": (
        lambda: pmap().shard_batch(pmap().shard_batch(BATCH)),
        "Batch leaf ['x'] of shape (8, 2, 16) lies as data_parallel places it already, in 8 parts; give the raw batch.",
    ),
    "pmap's batch to evaluate": (
        lambda: jaxpar.evaluate(make_eval_step(loss_fn, pmap()), start(pmap()), [pmap().shard_batch(BATCH)]),
        "Batch leaf ['x'] of shape (8, 2, 16) lies as data_parallel places it already, in 8 parts; give the raw batch.",
    ),
    "a deleted leaf": (
        with_deleted_leaf,
        "Batch leaf ['x'] was deleted; place it again with strategy.shard_batch(batch).",
    ),
    "no batch to a step": (
        lambda: make_train_step(loss_fn, data())(start(data()), None),
        "The batch None has no leaf; give what strategy.shard_batch returns.",
    ),
    "no batch to a step, under pmap": (
        lambda: make_train_step(loss_fn, pmap())(start(pmap()), None),
        "The batch None has no leaf; give what strategy.shard_batch returns.",
    ),
    "a tuple to pad": (
        lambda: pad_batch((np.ones(3),), 8),
        "The batch is a tuple; padding adds the leaf 'example_weight', so give a dict, as {'x': x, 'y': y}.",
    ),
    "an array to pad": (lambda: pad_batch(np.ones(3), 8), ["The batch is a ndarray", "give a dict"]),
    "a regex to leave whole that is none": (
        lambda: pad_batch({"table": np.ones(3)}, 8, whole=["*t"]),
        "whole= has '*t', which is no regex: nothing to repeat at position 0; as one, '*t' is '.*t'.",
    ),
    "a multiple of 0": (
        lambda: pad_batch({"x": np.ones(3)}, 0),
        "multiple is 0; give a whole number, 1 or more, as strategy.num_shards.",
    ),
    "a multiple that is a strategy": (
        lambda: pad_batch({"x": np.ones(3)}, data()),
        ["multiple is sharded", "num_shards"],
    ),
    "weights of another shape to pad": (
        lambda: pad_batch({"x": np.ones(3), "example_weight": np.ones((3, 2))}, 8),
        "Batch leaf ['example_weight'] has shape (3, 2); give one weight an example: (3,).",
    ),
    "a weight for all rows to pad": (
        lambda: pad_batch({"x": np.ones(3), "example_weight": 1.0}, 8),
        "Batch leaf ['example_weight'] has shape (); give one weight an example: (3,).",
    ),
    "a weight for all rows": (
        lambda: train(batch={**BATCH, "example_weight": np.float32(1)}),
        "Batch leaf ['example_weight'] has shape (); give one weight an example: (16,).",
    ),
    "weights of another shape": (
        lambda: train(batch={**BATCH, "example_weight": np.ones((ROWS, 2), "float32")}),
        "Batch leaf ['example_weight'] has shape (16, 2); give one weight an example: (16,).",
    ),
    "weights of another shape, under pmap": (
        lambda: train(strategy=pmap(), batch={**BATCH, "example_weight": np.ones((ROWS, 2), "float32")}),
        "Batch leaf ['example_weight'] has shape (16, 2); give one weight an example: (16,).",
    ),
    "weights that are a nest": (
        lambda: data().shard_batch({**BATCH, "example_weight": {"a": np.ones(ROWS)}}),
        ["example_weight", "one weight an example", "(16,)"],
    ),
    "no weights to pad": (
        lambda: pad_batch({"x": np.ones(3), "example_weight": []}, 8),
        ["example_weight", "one weight an example", "(3,)"],
    ),
    "weights read by the loss": (
        lambda: train(lambda model, batch, rng: (batch["example_weight"].sum(), {}), batch=pad_batch(BATCH, 8)),
        "batch['example_weight'] is multiplied in by the step itself; leave it out of the function, or call your own "
        "weights another name.",
    ),
    "padding under BatchNorm": (
        lambda: train(
            lambda model, batch, rng: (measure(model, batch), {}),
            batch=pad_batch(BATCH, 8),
            make_state=lambda rng: create(nnx.BatchNorm(16, rngs=nnx.Rngs(rng))),
        ),
        ["'model_state/batch_stats/mean' changes with a batch that is padded", "whole batches", "running averages"],
    ),
    "no batch to evaluate": (
        lambda: evaluate(make_eval_step(loss_fn, data()), start(data()), []),
        "batches gave no batch; evaluate needs at least one: an iterator that was used up gives none.",
    ),
    "one batch in place of batches": (
        lambda: evaluate(make_eval_step(loss_fn, data()), start(data()), BATCH),
        "batches is a dict; give an iterable of batches, as [batch].",
    ),
    "None in place of a batch": (
        lambda: evaluate(make_eval_step(loss_fn, data()), start(data()), [BATCH, None]),
        "batches gave None where a batch was due; give batches alone, as dicts of arrays.",
    ),
    "None in place of batches": (
        lambda: evaluate(make_eval_step(loss_fn, data()), start(data()), None),
        "batches is a NoneType; give an iterable of batches, as [batch].",
    ),
    "uneven batches that can't be padded": (
        lambda: evaluate(
            make_eval_step(lambda model, batch, rng: model(batch[0]).mean(), data()),
            start(data()),
            [(BATCH["x"],), (BATCH["x"][:3],)],
        ),
        ["The batch is a tuple", "give a dict"],
    ),
}

LOSSES = {
    "examples against one another": (
        lambda: train(lambda model, batch, rng: ((model(batch["x"])[:, :1] - batch["y"]) ** 2, {})),
        "'loss' has shape (16, 16) for 16 examples: each against every other, as (16, 1) - (16,) broadcasts. Give one "
        "value an example; .mean(axis=1) if it is meant so.",
    ),
    "a reduction over data under pmap with another name": (
        lambda: train(
            lambda model, batch, rng: (jax.lax.pmean(model(batch["x"]).mean(), "data"), {}),
            strategy=data_parallel(axis_name="batch"),
        ),
        "The model reduces over the axis 'data', but data_parallel(axis_name='batch') binds 'batch'; give both one "
        "name.",
    ),
    "nothing": (
        lambda: train(lambda model, batch, rng: None),
        "loss_fn returned a loss of type NoneType; give a scalar, one value an example, or jaxpar.Weighted(total, "
        "weight).",
    ),
    "four values": (
        lambda: train(lambda model, batch, rng: (1.0, {}, {}, {})),
        "loss_fn returned 4 values; it gives (loss, metrics), or (loss, metrics, updates) where a linen model changes "
        "collections.",
    ),
    "metrics in a list": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), [1.0])),
        "loss_fn returned metrics of type list; give a dict of names to values, {} for none, after the loss.",
    ),
    "no metrics": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), None)),
        ["metrics of type NoneType", "{} for none"],
    ),
    "the metrics first": (
        lambda: train(lambda model, batch, rng: ({}, measure(model, batch))),
        ["metrics of type", "give a dict"],
    ),
    "a dict for a loss": (
        lambda: train(lambda model, batch, rng: ({"loss": measure(model, batch)}, {})),
        "loss_fn returned a loss of type dict; give a scalar, one value an example, or jaxpar.Weighted(total, weight).",
    ),
    "text for a loss": (lambda: train(lambda model, batch, rng: ("x", {})), ["a loss of type str", "give a scalar"]),
    "a loss of whole numbers": (
        lambda: train(lambda model, batch, rng: (jnp.int32(1), {})),
        "loss_fn returned a loss of dtype int32; give a floating-point one, of which to take a gradient.",
    ),
    "a complex loss": (
        lambda: train(lambda model, batch, rng: (measure(model, batch) * 1j, {})),
        "loss_fn returned a loss of dtype complex64; give a floating-point one, of which to take a gradient.",
    ),
    "a loss of another shape": (
        lambda: train(lambda model, batch, rng: (model(batch["x"]).T, {})),
        ["shape (8, 16)", "one value an example (16 here)", "reduce it", "jaxpar.Weighted(total, weight)"],
    ),
    "a metric of another shape": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {"odd": jnp.ones((3, 5))})),
        "'odd' has shape (3, 5), neither a scalar nor one value an example (16 here); reduce it, or give "
        "jaxpar.Weighted(total, weight).",
    ),
    "a metric that is text": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {"note": "x"})),
        "'note' is 'x'; give a scalar, one value an example, or jaxpar.Weighted(total, weight).",
    ),
    "a metric that is a key": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {"seed": rng})),
        "'seed' is a random key; give numbers.",
    ),
    "metrics named by mixed types": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {0: 1.0, "a": 2.0})),
        "loss_fn returned a metric named 0, a int; a metric's name is a str.",
    ),
    "a weight that is None": (
        lambda: train(lambda model, batch, rng: (jaxpar.Weighted(measure(model, batch), None), {})),
        [
            "'loss' is Weighted(total=",
            "weight=None); give a scalar, one value an example, or jaxpar.Weighted(total, weight).",
        ],
    ),
    "a weight of another shape": (
        lambda: train(lambda model, batch, rng: (jaxpar.Weighted(measure(model, batch), jnp.ones(3)), {})),
        "'loss' is Weighted with a total of shape () and a weight of shape (3,); both need the same.",
    ),
    "a metric named as the loss": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {"loss": 1.0})),
        "loss_fn returned metrics named ['loss'], which the step gives itself (loss, grad_norm, skipped); rename them.",
    ),
    "a metric named as the norm": (
        lambda: train(lambda model, batch, rng: (measure(model, batch), {"grad_norm": 1.0}), strategy=pmap()),
        ["['grad_norm']", "which the step gives itself", "rename them"],
    ),
    "an output of another shape, to evaluate": (
        lambda: evaluate(make_eval_step(lambda model, batch, rng: jnp.ones((3, 2)), data()), start(data()), [BATCH]),
        ["shape (3, 2)", "one value an example (16 here)"],
    ),
    "BatchNorm whose updates are dropped": (
        lambda: train_norm(False),
        "loss_fn returned 2 values, but the state holds 'batch_stats', which the loss neither uses nor updates: "
        "BatchNorm's running averages would stay as they are. Give (loss, metrics, updates), as of y, updates = "
        "module.apply(variables, x, mutable=['batch_stats']); or {} as updates to leave them.",
    ),
    "BatchNorm whose updates are dropped, under pmap": (
        lambda: train_norm(False, strategy=pmap()),
        ["neither uses nor updates", "mutable=['batch_stats']"],
    ),
    "updates in the place of metrics": (
        lambda: train_norm(False, metrics=lambda updates: updates),
        ["second value, its metrics, has ['batch_stats'], collections of the state", "(loss, {}, updates)"],
    ),
    "an axis name that isn't bound": (
        lambda: train(lambda model, batch, rng: jax.lax.pmean(measure(model, batch), "batch")),
        ["reduces over the axis 'batch'", "a step binds the name 'data'", "data_parallel(axis_name='batch')"],
    ),
    "text, to evaluate": (
        lambda: evaluate(make_eval_step(lambda model, batch, rng: "x", data()), start(data()), [BATCH]),
        "'the value' is 'x'; give a scalar, one value an example, or jaxpar.Weighted(total, weight).",
    ),
}

ARGUMENTS = {
    "a loss that is no function": (
        lambda: make_train_step(3, data()),
        "loss_fn is 3; give a function loss_fn(model, batch, rng) -> (loss, metrics).",
    ),
    "a loss without its key": (
        lambda: make_train_step(lambda model, batch: (1.0, {}), data()),
        "loss_fn takes (model, batch), but is called as loss_fn(model, batch, rng); give a function loss_fn(model, "
        "batch, rng).",
    ),
    "an init_fn in place of a loss": (
        lambda: make_train_step(init_fn, data()),
        "loss_fn takes (rng), but is called as loss_fn(model, batch, rng); give a function loss_fn(model, batch, rng).",
    ),
    "an evaluation without its key": (
        lambda: make_eval_step(lambda model, batch: 1.0, data()),
        "fn takes (model, batch), but is called as fn(model, batch, rng); give a function fn(model, batch, rng).",
    ),
    "strategy and loss exchanged": (
        lambda: make_train_step(data(), loss_fn),
        ["strategy is <function loss_fn", "jaxpar.sharded(mesh, ...)"],
    ),
    "no strategy": (lambda: make_train_step(loss_fn, None), ["strategy is None", "sharded"]),
    "a mesh in place of a strategy": (
        lambda: make_train_step(loss_fn, make_mesh(data=8)),
        ["strategy is Mesh(", "give what jaxpar.sharded(mesh, ...) or jaxpar.data_parallel() returns."],
    ),
    "no strategy to evaluate": (lambda: make_eval_step(loss_fn, None), ["strategy is None", "sharded"]),
    "an evaluation that is no function": (
        lambda: make_eval_step(3, data()),
        "fn is 3; give a function fn(model, batch, rng).",
    ),
    "0 microbatches": (
        lambda: make_train_step(loss_fn, data(), num_microbatches=0),
        "num_microbatches is 0; give a whole number, 1 or more.",
    ),
    "2.0 microbatches": (lambda: make_train_step(loss_fn, data(), num_microbatches=2.0), ["num_microbatches is 2.0"]),
    "True microbatches": (
        lambda: make_train_step(loss_fn, data(), num_microbatches=True),
        ["num_microbatches is True"],
    ),
    "a compute dtype of whole numbers": (
        lambda: make_train_step(loss_fn, data(), compute_dtype=jnp.int32),
        ["compute_dtype is", "int32", "floating-point dtype, as jnp.bfloat16"],
    ),
    "a compute dtype that there isn't": (
        lambda: make_train_step(loss_fn, data(), compute_dtype="bf16"),
        ["compute_dtype is 'bf16'", "floating-point dtype, as jnp.bfloat16"],
    ),
    "a compute dtype that is a number": (
        lambda: make_eval_step(loss_fn, data(), compute_dtype=16),
        ["compute_dtype is 16", "floating-point dtype"],
    ),
    "compiler options under pmap": (
        lambda: train(strategy=pmap(), compiler_options=OPTIONS),
        "compiler_options={'xla_no_such_flag': True} are for jax.jit; pmap takes none. Use "
        "sharded(make_mesh(data=-1)).",
    ),
    "a compiler option that there isn't": (
        lambda: train(compiler_options=OPTIONS),
        ["compiler_options={'xla_no_such_flag': True}", "No such compile option"],
    ),
    "a compiler option of a wrong value": (
        lambda: train(compiler_options={"xla_cpu_enable_fast_math": "purple"}),
        ["compiler_options=", "purple"],
    ),
    "compiler options that are text": (lambda: train(compiler_options="xla"), ["compiler_options", "'xla'", "dict"]),
    "a train step to evaluate": (
        lambda: evaluate(make_train_step(loss_fn, data()), start(data()), [BATCH]),
        "eval_step is a Step; give what jaxpar.make_eval_step returns.",
    ),
    "a function to evaluate": (
        lambda: evaluate(loss_fn, start(data()), [BATCH]),
        ["eval_step is a function", "make_eval_step"],
    ),
    "a step of one's own that is no function": (
        lambda: data().compile(None),
        "step is None; give a function (state, batch) -> (state, out).",
    ),
    "a step of one's own that returns the state alone": (
        lambda: data().compile(lambda state, batch: state)(start(data()), data().shard_batch(BATCH)),
        "The step returned a TrainState; it gives (state, out).",
    ),
    "a step of one's own that returns the state alone, under pmap": (
        lambda: pmap().compile(lambda state, batch: state)(start(pmap()), pmap().shard_batch(BATCH)),
        "The step returned a TrainState; it gives (state, out).",
    ),
    "a step of one's own that returns three": (
        lambda: data().compile(lambda state, batch: (state, 1, 2))(start(data()), data().shard_batch(BATCH)),
        "The step returned 3 values; it gives (state, out).",
    ),
    "a step of one's own that returns part of the state": (
        lambda: data().compile(lambda state, batch: (state.params, 1.0))(start(data()), data().shard_batch(BATCH)),
        "The step returned a state that differs from the one it got in ['bias', 'kernel', 'opt_state/0/count', "
        "'opt_state/0/mu/bias', 'opt_state/0/mu/kernel', 'opt_state/0/nu/bias', 'opt_state/0/nu/kernel', "
        "'params/bias', 'params/kernel', 'rng', 'step']; it gives that one back with new values.",
    ),
    "a step of one's own that turns the state into another dtype": (
        lambda: data().compile(lambda state, batch: (state.replace(step=state.step + 0.5), 1.0))(
            start(data()), data().shard_batch(BATCH)
        ),
        "The step returned state leaf 'step' as () float32; it was () int32, and the next call needs it so.",
    ),
    "a step of one's own that forgets a reduction": (
        lambda: pmap().compile(lambda state, batch: (state + batch["x"].sum(), {}))(
            jax.device_put(np.float32(0), NamedSharding(pmap().mesh, P())), pmap().shard_batch({"x": np.arange(8.0)})
        ),
        ["differs among the 8 devices", "reduce it", "jax.lax.pmean(x, 'data')"],
    ),
}

TABLE = [
    *((f"mesh: {name}", call, MeshError, message) for name, (call, message) in MESHES.items()),
    *((f"rules: {name}", call, PartitionError, message) for name, (call, message) in RULES.items()),
    *((f"state: {name}", call, StateError, message) for name, (call, message) in STATES.items()),
    *((f"batch: {name}", call, BatchError, message) for name, (call, message) in BATCHES.items()),
    *((f"loss: {name}", call, LossError, message) for name, (call, message) in LOSSES.items()),
    *((f"argument: {name}", call, (ValueError, TypeError), message) for name, (call, message) in ARGUMENTS.items()),
]
# Rows whose error is of another kind than their neighbours': the kind follows what is wrong, not where it is seen.
OTHER_KINDS = {
    "state: the batch first": BatchError,
    "state: the batch first, under pmap": BatchError,
    "batch: None in place of batches": (BatchError, TypeError),
    "batch: one batch in place of batches": (BatchError, TypeError),
}


@pytest.mark.parametrize(("name", "call", "kind", "message"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_gets_a_message_of_our_own_that_says_what_to_do(name, call, kind, message):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind is compared below, with the text beside it
        call()
    text, error = str(caught.value), caught.value
    wanted = (
        "^" + re.escape(message)
        if isinstance(message, str)
        else "".join(f"(?=.*{re.escape(part)})" for part in message)
    )
    assert re.search(wanted, text, re.DOTALL), f"{type(error).__name__}: {text}"
    assert isinstance(error, OTHER_KINDS.get(name, kind)), f"{type(error).__name__}: {text}"
    last = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert last.parent == pathlib.Path(jaxpar.__file__).parent, f"raised in {last}: {text}"
    assert text.endswith((".", ".cpu() first")), text


def test_every_kind_of_error_is_a_value_or_type_error():
    kinds = (MeshError, PartitionError, BatchError, StateError, LossError, DriftError)
    assert all(issubclass(kind, ValueError | TypeError) for kind in kinds)


def test_an_error_of_the_users_own_function_comes_through_as_it_is():
    with pytest.raises(ZeroDivisionError):
        train(lambda model, batch, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layout([("kernel", lambda leaf, mesh, so_far: 1 / 0), (".*", P())])
    with pytest.raises(KeyError, match="missing"):
        train(lambda model, batch, rng: batch["missing"].sum())


@pytest.mark.parametrize(("use_running_average", "updates"), [(True, ()), (True, ({},)), (False, ({},))])
@pytest.mark.parametrize("options", [{}, {"num_microbatches": 2}], ids=str)
def test_batchnorm_that_uses_its_averages_or_is_told_to_leave_them_trains(use_running_average, updates, options):
    state, _ = train_norm(use_running_average, *updates, **options)
    assert float(abs(state.model_state["batch_stats"]["mean"]).max()) == 0


def test_a_metric_may_have_the_name_of_a_collection():
    mean = lambda updates: {"batch_stats": updates["batch_stats"]["mean"].mean()}
    _, metrics = train_norm(False, {}, metrics=mean)
    assert np.isfinite(float(metrics["batch_stats"]))
