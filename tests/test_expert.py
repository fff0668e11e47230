"""Mixtures of experts on every mesh are one device's, drop no token, and send each chosen token there and back once."""

import collections
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_text import find_collectives
from flax import linen, nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import sub_mesh

import jaxpar
from jaxpar.expert import ExpertError, ExpertKernels, MoE, MoELosses, mixture_of_experts
from jaxpar.testing import assert_trains_like_one_device

ROWS, TOKENS, WIDTH, EXPERTS, HIDDEN = 8, 4, 8, 8, 16


class Inputs(NamedTuple):
    x: Any
    router: Any
    experts: ExpertKernels


class Case(NamedTuple):
    """A mixture: the mesh, its choices, and how the router is made."""

    mesh: dict[str, int]
    top_k: int = 2
    routing: str = "even"
    normalize: bool = True
    hidden: int = HIDDEN


CASES = {
    "one_device": Case({}),
    "expert_2": Case({"expert": 2}),
    "expert_2_each_to_one": Case({"expert": 2}, 1, normalize=False),
    "expert_4_ties": Case({"expert": 4}, routing="ties"),
    "expert_4_all_ties": Case({"expert": 4}, 3, "flat"),
    "expert_4_unused_expert": Case({"expert": 4}, routing="unused"),
    "expert_8_each_to_all": Case({"expert": 8}, EXPERTS),
    "expert_8_all_to_one": Case({"expert": 8}, 1, "crowded", normalize=False),
    "expert_8": Case({"expert": 8}, routing="crowded"),
    "data_2_expert_4": Case({"data": 2, "expert": 4}),
    "data_2_expert_4_each_to_all": Case({"data": 2, "expert": 4}, EXPERTS, normalize=False),
    "fsdp_2_expert_4": Case({"fsdp": 2, "expert": 4}, 3, "crowded"),
    "expert_4_model_2": Case({"expert": 4, "model": 2}, normalize=False),
    "expert_4_model_2_odd_hidden": Case({"expert": 4, "model": 2}, hidden=15),
    "expert_2_context_2": Case({"expert": 2, "context": 2}, routing="unused"),
    "data_2": Case({"data": 2}, routing="ties"),
    "data_2_context_2_model_2": Case({"data": 2, "context": 2, "model": 2}),
    "fsdp_2_expert_2_model_2": Case({"fsdp": 2, "expert": 2, "model": 2}, 1, normalize=False),
}


def make_inputs(routing: str = "even", hidden: int = HIDDEN, dtype: Any = "float64", **sizes: int) -> Inputs:
    """Returns tokens, a router that gives experts as much as its name says, and experts."""
    rng = np.random.default_rng(0)
    rows, tokens = sizes.get("rows", ROWS), sizes.get("tokens", TOKENS)
    x = rng.normal(size=(rows, tokens, WIDTH))
    # A feature that all tokens share lets the router prefer an expert whatever the token.
    x[..., 0] = 1
    router = rng.normal(size=(WIDTH, EXPERTS))
    if routing == "crowded":
        router[0, 5] += 30
    elif routing == "unused":
        router[0, 2] -= 30
    elif routing == "ties":
        router[:, 1::2] = router[:, ::2]
    elif routing == "flat":
        router[:] = 0
    column, row = (EXPERTS, WIDTH, hidden), (EXPERTS, hidden, WIDTH)
    experts = ExpertKernels(*(rng.normal(size=shape) / 3 for shape in (column, column, row)))
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), Inputs(x, router, experts))


def mix_plainly(inputs: Inputs, top_k: int, normalize: bool) -> tuple[jax.Array, MoELosses]:
    """Returns the mixture as its definition has it: every token through every expert."""
    x, router, (up, gate, down) = inputs
    logits = x @ router
    chances = jax.nn.softmax(logits)
    best = jnp.argsort(-logits, axis=-1, stable=True)[..., :top_k]
    chosen = jax.nn.one_hot(best, EXPERTS, dtype=x.dtype).sum(-2)
    gates = chances * chosen
    gates = gates / gates.sum(-1, keepdims=True) if normalize else gates
    hidden = jax.nn.silu(jnp.einsum("btc,ecf->btef", x, gate)) * jnp.einsum("btc,ecf->btef", x, up)
    y = jnp.einsum("btef,efc,bte->btc", hidden, down, gates)
    fractions = chosen.mean((0, 1)) / top_k
    balance = EXPERTS * (fractions * chances.mean((0, 1))).sum()
    return y, MoELosses(balance, (jnp.log(jnp.exp(logits).sum(-1)) ** 2).mean(), fractions)


def mix(inputs: Inputs, top_k: int = 2, normalize: bool = True) -> tuple[jax.Array, MoELosses]:
    return mixture_of_experts(*inputs, top_k=top_k, normalize=normalize)


def pull(fn, inputs: Inputs, top_k: int, normalize: bool) -> Any:
    """Returns what the mixture gives, and the gradient of a sum of all that has one."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs.x.shape), inputs.x.dtype)

    def objective(inputs):
        y, losses = fn(inputs, top_k, normalize)
        return (y * weights).sum() + losses.balance + 0.1 * losses.router_z, (y, losses)

    return jax.value_and_grad(objective, has_aux=True)(inputs)


@functools.cache
def expect(routing: str, hidden: int, top_k: int, normalize: bool) -> Any:
    return jax.jit(pull, static_argnums=(0, 2, 3))(mix_plainly, make_inputs(routing, hidden), top_k, normalize)


def assert_one_devices(case: Case) -> None:
    """Asserts that values and gradients are those of the plain mixture on one device, to 1e-9 in float64."""
    with jax.enable_x64(True):
        wanted = expect(case.routing, case.hidden, case.top_k, case.normalize)
        inputs = make_inputs(case.routing, case.hidden)
        # A new function each time: the last one's trace is for another mesh, or for another form of the exchange.
        run = jax.jit(lambda inputs: pull(mix, inputs, case.top_k, case.normalize))
        with jax.set_mesh(sub_mesh(**(case.mesh or {"data": 1}))):
            got = run(inputs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9), got, wanted)


@pytest.mark.parametrize(
    "case",
    # Every fourth one is fast.
    [pytest.param(case, marks=[pytest.mark.slow] * bool(number % 4)) for number, case in enumerate(CASES.values())],
    ids=CASES,
)
def test_a_mixture_and_its_gradients_are_one_devices_on_every_mesh(case):
    assert_one_devices(case)


def test_the_tables_routers_give_experts_what_they_say():
    with jax.enable_x64(True):
        fractions = {routing: expect(routing, HIDDEN, 2, True)[0][1][1].fractions for routing in ("crowded", "unused")}
        assert fractions["crowded"][5] == 0.5
        assert fractions["unused"][2] == 0


def exchange_whole(rows, into, starts, sizes, places, taken, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, by its documentation, with each device's arrays sent whole."""
    me = lax.axis_index(axis_name)
    everything = [lax.all_gather(array, axis_name) for array in (rows, starts, sizes, places)]
    for source in range(everything[1].shape[0]):
        theirs, start, size, place = (everything[0][source], *(array[source, me] for array in everything[1:]))
        offsets = jnp.arange(theirs.shape[0])
        to = jnp.where(offsets < size, place + offsets, into.shape[0])
        into = into.at[to].set(theirs.at[start + offsets].get(mode="fill"), mode="drop")
        into = jnp.where(taken[source] == size, into, jnp.nan)
    return into


@pytest.mark.parametrize(
    "name",
    [
        "expert_8",
        "data_2_expert_4_each_to_all",
        pytest.param("expert_4_ties", marks=pytest.mark.slow),
        pytest.param("expert_8_all_to_one", marks=pytest.mark.slow),
    ],
)
def test_the_ragged_form_of_the_exchange_does_the_same(name, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", exchange_whole)
    monkeypatch.setattr(lax, "platform_dependent", lambda rows, cpu, default: default(rows))
    assert_one_devices(CASES[name])


@pytest.mark.parametrize("name", ["expert_8", pytest.param("expert_4_all_ties", marks=pytest.mark.slow)])
def test_what_a_grouped_product_gives_after_the_last_group_spreads_to_no_gradient(name, monkeypatch):
    multiply = lax.ragged_dot

    def multiply_and_spoil(rows, kernel, counts):
        is_row = (jnp.arange(rows.shape[0]) < counts.sum())[:, None]
        # The rows that are left count among the last group's, so that their gradients spoil its kernel's.
        all_rows = counts.at[-1].add((rows.shape[0] - counts.sum()).astype(counts.dtype))
        return multiply(rows, kernel, all_rows) + jnp.where(is_row, 0, jnp.nan)

    monkeypatch.setattr(lax, "ragged_dot", multiply_and_spoil)
    assert_one_devices(CASES[name])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_the_ragged_form_twice_each_way(platform):
    run = jax.jit(lambda inputs: pull(mix, inputs, 2, True))
    with jax.set_mesh(sub_mesh(data=2, expert=4)):
        text = run.trace(make_inputs(dtype="float32")).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") == 4
    assert "stablehlo.all_to_all" not in text


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_narrow_inputs_are_mixed_in_their_dtype_and_routed_in_float32(dtype, tolerance):
    inputs = make_inputs(dtype=dtype)
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda array: array.astype("float32"), inputs)
        wanted, losses = mix_plainly(wide, 2, True)
        with jax.set_mesh(sub_mesh(data=2, expert=4)):
            got, same = jax.jit(lambda inputs: mix(inputs))(inputs)
    assert got.dtype == dtype
    assert same.balance.dtype == "float32"
    np.testing.assert_allclose(got.astype("float32"), wanted, rtol=0, atol=tolerance)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), same, losses)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "stage": 2, "expert": 2},
        pytest.param({"stage": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"stage": 2, "expert": 2, "model": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mixture_stands_in_an_island_over_stage(sizes):
    with jax.enable_x64(True):
        wanted = expect("even", HIDDEN, 2, True)
        whole = make_inputs()
        each = jax.tree.map(lambda array: jnp.stack([array, array]), whole)

        def on_stage(each):
            (_, aux), gradients = pull(mix, jax.tree.map(lambda array: array[0], each), 2, True)
            return jax.tree.map(lambda array: array[None], (aux, gradients))

        def objective(each):
            island = jax.shard_map(
                on_stage, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}, check_vma=False
            )
            return island(each)

        with jax.set_mesh(sub_mesh(**sizes)):
            aux, gradients = jax.jit(objective)(each)
        for stage in range(2):
            got = jax.tree.map(lambda array, stage=stage: array[stage], (aux, gradients))
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9), got, (wanted[0][1], wanted[1])
            )


def test_gradients_go_through_an_island_over_stage():
    with jax.enable_x64(True):
        wanted = expect("even", HIDDEN, 2, True)[1]

        def through(inputs):
            # The router and the experts are each stage's own half of what is summed: together, one of each.
            def on_stage(x, router, experts):
                return jax.tree.map(
                    lambda leaf: leaf[None],
                    mix(Inputs(x, router[0], ExpertKernels(*(kernel[0] for kernel in experts)))),
                )

            stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (inputs.router, tuple(inputs.experts)))
            island = jax.shard_map(
                on_stage,
                in_specs=(P(), P("stage"), P("stage")),
                out_specs=P("stage"),
                axis_names={"stage"},
                check_vma=False,
            )
            return jax.tree.map(lambda leaf: leaf.mean(0), island(inputs.x, stacked[0], stacked[1]))

        with jax.set_mesh(sub_mesh(stage=2, expert=4)):
            _, gradients = jax.jit(lambda inputs: pull(lambda inputs, *_: through(inputs), inputs, 2, True))(
                make_inputs()
            )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9), gradients, wanted)


def collective_sizes(sizes, *, top_k=2, backward=True):
    """Returns the bytes of each array in each collective of a compiled mixture, by kind; rows are many."""
    mesh, inputs = sub_mesh(**sizes), make_inputs(dtype="float32", rows=64, tokens=16)
    owners, hidden = (axis if axis in sizes else None for axis in ("expert", "model"))
    rows = tuple(axis for axis in ("data", "fsdp", "expert") if axis in sizes)
    tokens = P(rows or None, "context" if "context" in sizes else None)
    specs = Inputs(tokens, P(), ExpertKernels(P(owners, None, hidden), P(owners, None, hidden), P(owners, hidden)))
    shardings = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), inputs, specs)

    def forward(inputs):
        return mix(inputs, top_k)[0]

    def both(inputs):
        return jax.grad(lambda inputs: (mix(inputs, top_k)[0] ** 2).sum())(inputs)

    jitted = jax.jit(
        both if backward else forward,
        in_shardings=(shardings,),
        out_shardings=shardings if backward else shardings.x,
    )
    with jax.set_mesh(mesh):
        text = jitted.lower(inputs).compile().as_text()
    found = collections.defaultdict(list)
    for one in find_collectives(text):
        found[one.kind].append(one.sizes)
    return found


@pytest.mark.parametrize(
    ("sizes", "top_k"),
    [
        ({"expert": 4}, 3),
        ({"data": 2, "expert": 4}, 2),
        pytest.param({"expert": 4}, 1, marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 4}, 1, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "model": 2}, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_travel_to_their_experts_and_back_in_two_all_to_alls_each_way(sizes, top_k):
    tokens = 64 * 16 // math.prod(size for axis, size in sizes.items() if axis != "model")
    # Each of 4 owners has 2 experts, so there is room for 2 of a token's choices at most.
    payload = 4 * tokens * min(top_k, 2) * WIDTH * 4
    for backward, count in [(False, 2), (True, 4)]:
        found = collective_sizes(sizes, top_k=top_k, backward=backward)
        assert [sum(arrays) for arrays in found["all-to-all"]] == [payload] * count
        # The counts of each expert's tokens.
        assert [sum(arrays) for arrays in found["all-gather"]] == [4 * EXPERTS * 4]
        assert not found["collective-permute"]


def test_weights_gradients_are_summed_over_the_other_token_axes_alone():
    kernel = WIDTH * HIDDEN * 4
    reduced = [size for arrays in collective_sizes({"expert": 8})["all-reduce"] for size in arrays]
    assert max(reduced) == WIDTH * EXPERTS * 4
    reduced = [size for arrays in collective_sizes({"data": 2, "expert": 4})["all-reduce"] for size in arrays]
    assert sorted(reduced)[-3:] == [EXPERTS // 4 * kernel] * 3


def test_without_an_expert_axis_no_token_leaves_its_device():
    found = collective_sizes({"data": 4, "context": 2})
    assert set(found) == {"all-reduce"}
    # Each weight's gradient, once; nothing as large as the tokens.
    large = [size for arrays in found["all-reduce"] for size in arrays if size > WIDTH * EXPERTS * 4]
    assert large == [EXPERTS * WIDTH * HIDDEN * 4] * 3


@pytest.mark.parametrize(
    "sizes", [{"model": 4}, pytest.param({"expert": 2, "model": 2}, marks=pytest.mark.slow)], ids=str
)
def test_hidden_features_split_over_model_cost_one_all_reduce_of_tokens_each_way(sizes):
    tokens = 64 * 16 // sizes.get("expert", 1)
    for backward, count in [(False, 1), (True, 2)]:
        found = collective_sizes(sizes, backward=backward)
        reduced = [size for arrays in found["all-reduce"] for size in arrays]
        assert reduced.count(tokens * WIDTH * 4) >= count
        # Beside the tokens, backward, go their logits.
        assert sum(reduced) <= tokens * (count * WIDTH + (count - 1) * EXPERTS) * 4 + 4096
        assert not set(found) - {"all-reduce", "all-to-all", "all-gather"}


class NnxMixed(nnx.Module):
    def __init__(self, rngs):
        self.inp = nnx.Linear(4, WIDTH, rngs=rngs)
        self.moe = MoE(WIDTH, HIDDEN, num_experts=EXPERTS, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        mixed, losses = self.moe(self.inp(x))
        return self.out(mixed), losses


class LinenMixed(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="inp")(x)
        mixed, losses = LinenMoE(name="moe")(x)
        return linen.Dense(1, name="out")(mixed), losses


class LinenMoE(linen.Module):
    """How a linen module calls the function, under the names that the ready-made rules know."""

    @linen.compact
    def __call__(self, x):
        init = linen.initializers.lecun_normal()
        router = LinenKernel((WIDTH, EXPERTS), init, name="router")()
        return mixture_of_experts(x, router, LinenExperts(name="experts")())


class LinenExperts(linen.Module):
    @linen.compact
    def __call__(self):
        init = linen.initializers.lecun_normal(batch_axis=0)
        column, row = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
        shapes = {"up": column, "gate": column, "down": row}
        return ExpertKernels(**{name: LinenKernel(shape, init, name=name)() for name, shape in shapes.items()})


class LinenKernel(linen.Module):
    shape: tuple[int, ...]
    init: Any

    @linen.compact
    def __call__(self):
        return self.param("kernel", self.init, self.shape)


RULES = [(r"experts/", P("expert")), (".*", None)]


def init_nnx(rng):
    return jaxpar.TrainState.create(NnxMixed(nnx.Rngs(rng)), optax.adam(1e-2))


def init_linen(rng):
    return jaxpar.TrainState.create(LinenMixed().init(rng, jnp.zeros((1, 2, 4))), optax.adam(1e-2))


def call(model, x):
    return model(x) if isinstance(model, nnx.Module) else LinenMixed().apply(model, x)


def balanced_loss(model, batch, rng):
    y, losses = call(model, batch["x"])
    loss = ((y[..., 0] - batch["y"]) ** 2).mean() + 0.1 * losses.balance + 0.01 * losses.router_z
    return loss, {"balance": losses.balance, "largest": losses.fractions.max()}


def plain_loss(model, batch, rng):
    return ((call(model, batch["x"])[0][..., 0] - batch["y"]) ** 2).mean(), {}


def make_batches(count=3):
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(size=(16, TOKENS, 4)), "y": rng.normal(size=(16, TOKENS))} for _ in range(count)]


STRATEGIES = {
    "expert": lambda: jaxpar.sharded(sub_mesh(expert=8), RULES),
    "data_expert": lambda: jaxpar.sharded(sub_mesh(data=2, expert=4), RULES),
    "fsdp_expert": lambda: jaxpar.sharded(sub_mesh(fsdp=2, expert=4), RULES[:1], jaxpar.FSDP),
    "expert_model": lambda: jaxpar.sharded(sub_mesh(expert=4, model=2), RULES[:1], jaxpar.MEGATRON),
    "data": lambda: jaxpar.sharded(sub_mesh(data=4)),
    "pmap": lambda: jaxpar.data_parallel(jax.devices()[:4]),
}


def train(kind, init_fn, loss_fn, **build):
    return assert_trains_like_one_device(
        init_fn, loss_fn, make_batches(), STRATEGIES[kind](), dtypes=("float64",), **build
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data_expert", "fsdp_expert"])
def test_microbatches_without_the_balance_loss_make_the_step_of_the_whole_batch(kind):
    (batch,) = make_batches(1)
    with jax.enable_x64(True):
        strategy = STRATEGIES[kind]()
        state, batch = strategy.init(init_nnx, jax.random.key(0)), strategy.shard_batch(batch)
        steps = [jaxpar.make_train_step(plain_loss, strategy, num_microbatches=count) for count in (1, 2)]
        after = [step(strategy.place(state), batch) for step in steps]
        (_, whole), (_, parts) = after
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts["grad_norm"], whole["grad_norm"], rtol=1e-6)


def test_a_padded_batch_is_mixed_row_by_row():
    (batch,) = make_batches(1)
    padded = jaxpar.pad_batch({key: leaf[:13] for key, leaf in batch.items()}, 16)
    report = assert_trains_like_one_device(
        init_nnx, plain_loss, [padded], STRATEGIES["data_expert"](), dtypes=("float64",)
    )
    assert report.steps == 1


def test_a_loop_traces_once_and_experts_and_moments_stay_split():
    traces = []

    def counted(model, batch, rng):
        traces.append(1)
        return balanced_loss(model, batch, rng)

    strategy = STRATEGIES["data_expert"]()
    state, step = strategy.init(init_nnx, jax.random.key(0)), jaxpar.make_train_step(counted, strategy)
    for batch in make_batches():
        state, metrics = step(state, strategy.shard_batch(batch))
    assert len(traces) == 1
    assert 1 / EXPERTS <= float(metrics["largest"]) <= 1 / 2
    leaves = {path: leaf for path, leaf in jaxpar.state.named_leaves(state) if "/experts/" in path}
    assert {path for path in leaves if path.startswith("params/")} == {
        f"params/moe/experts/{name}/kernel" for name in ("up", "gate", "down")
    }
    assert len(leaves) == 9
    for path, leaf in leaves.items():
        assert leaf.addressable_shards[0].data.shape == (EXPERTS // 4, *leaf.shape[1:]), path


def test_each_expert_is_drawn_as_a_linear_layer_of_its_own():
    kernel = MoE(64, 128, num_experts=4, rngs=nnx.Rngs(0)).experts["up"]["kernel"][...]
    np.testing.assert_allclose(kernel.std((1, 2)), 64**-0.5, rtol=0.05)
    assert not np.allclose(kernel[0], kernel[1])


def shrink(name: str, *shape: int) -> Inputs:
    inputs = make_inputs(dtype="float32")
    array = jnp.ones(shape)
    if name in Inputs._fields:
        return inputs._replace(**{name: array})
    return inputs._replace(experts=inputs.experts._replace(**{name: array}))


ERRORS = {
    "experts_no_kernels": (
        lambda: mixture_of_experts(jnp.ones((8, 4, 8)), jnp.ones((8, 8)), {"up": 1}),
        r"experts is a dict; give jaxpar.ExpertKernels\(up, gate, down\)\.",
    ),
    "x_whole_numbers": (
        lambda: mix(make_inputs(dtype="float32")._replace(x=jnp.ones((8, 4, 8), "int32"))),
        r"x is of int32; give floating-point arrays\.",
    ),
    "x_a_list": (
        lambda: mix(make_inputs(dtype="float32")._replace(x=[[1.0]])),
        r"x is of list; give floating-point arrays\.",
    ),
    "x_of_one_dim": (lambda: mix(shrink("x", 8)), r"x has shape \(8,\); give rows, any more dims, and features"),
    "x_without_rows": (lambda: mix(shrink("x", 0, 4, 8)), r"x has shape \(0, 4, 8\); .* features last, none of them 0"),
    "x_without_tokens": (lambda: mix(shrink("x", 8, 0, 8)), r"x has shape \(8, 0, 8\); .* none of them 0"),
    "router_of_other_features": (
        lambda: mix(shrink("router", 6, 8)),
        r"router has shape \(6, 8\); x of 8 features needs \(8, experts\)\.",
    ),
    "router_of_one_dim": (lambda: mix(shrink("router", 8)), r"router has shape \(8,\); x of 8 features needs"),
    "experts_fewer_than_the_routers": (
        lambda: mix(shrink("up", 4, 8, 16)),
        r"up has shape \(4, 8, 16\), but a router of 8 experts, x of 8 features and up of 16 hidden ones need "
        r"\(8, 8, 16\)\.",
    ),
    "gate_of_other_hidden": (lambda: mix(shrink("gate", 8, 8, 12)), r"gate has shape .* need \(8, 8, 16\)\."),
    "down_not_turned": (lambda: mix(shrink("down", 8, 8, 16)), r"down has shape .* need \(8, 16, 8\)\."),
    "up_a_number": (lambda: mix(shrink("up")), r"up has shape \(\), but .* need \(8, 8, 0\)\."),
    "top_k_none": (
        lambda: mix(make_inputs(dtype="float32"), top_k=0),
        r"top_k is 0; give a whole number from 1 to the 8 experts\.",
    ),
    "top_k_many": (lambda: mix(make_inputs(dtype="float32"), top_k=9), r"top_k is 9; .* from 1 to the 8 experts\."),
    "top_k_half": (lambda: mix(make_inputs(dtype="float32"), top_k=1.5), r"top_k is 1\.5; give a whole number"),
    "top_k_true": (lambda: mix(make_inputs(dtype="float32"), top_k=True), r"top_k is True; give a whole number"),
}


@pytest.mark.parametrize(("build", "message"), ERRORS.values(), ids=ERRORS)
def test_arrays_that_cannot_be_are_named(build, message):
    with pytest.raises(ExpertError, match=message):
        build()


SPLIT_ERRORS = {
    "experts": (
        {"expert": 3},
        {},
        r"The router has 8 experts, which do not divide by 3, the size of mesh axis 'expert'; give a multiple of it, "
        r"or a smaller axis\.",
    ),
    "rows": (
        {"data": 2, "expert": 4},
        {"rows": 12},
        r"x has 12 rows, which do not divide by 8, the size of mesh axes \('data', 'expert'\); pad to 16, or use 8\.",
    ),
    "few_rows": ({"data": 4}, {"rows": 3}, r"x has 3 rows, which do not divide by 4, .*\('data',\); pad to 4\."),
    "tokens": (
        {"expert": 2, "context": 4},
        {"tokens": 6},
        r"x has 6 tokens, which do not divide by 4, the size of mesh axes \('context',\); pad to 8, or use 4\.",
    ),
}


@pytest.mark.parametrize(("mesh", "sizes", "message"), SPLIT_ERRORS.values(), ids=SPLIT_ERRORS)
def test_what_does_not_divide_is_named_with_both_numbers(mesh, sizes, message):
    with jax.set_mesh(sub_mesh(**mesh)), pytest.raises(ExpertError, match=message):
        jax.eval_shape(mix, make_inputs(dtype="float32", **sizes))


def test_a_mixture_inside_an_island_over_its_own_axis_is_an_error():
    def inside(inputs):
        return jax.shard_map(mix, in_specs=P(), out_specs=P(), axis_names={"expert"}, check_vma=False)(inputs)

    with (
        jax.set_mesh(sub_mesh(expert=2)),
        pytest.raises(jaxpar.MeshError, match="stands inside another one over 'expert'"),
    ):
        jax.eval_shape(inside, make_inputs(dtype="float32"))


@pytest.mark.parametrize(
    ("part", "ragged"),
    [("experts", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("x", True), ("router", False)))],
)
def test_a_batch_of_mixtures_is_each_of_them_and_its_gradients(part, ragged, monkeypatch):
    if ragged:
        monkeypatch.setattr(lax, "ragged_all_to_all", exchange_whole)
        monkeypatch.setattr(lax, "platform_dependent", lambda rows, cpu, default: default(rows))
    inputs = make_inputs(dtype="float32", rows=4, tokens=2)
    with_part = lambda value: mix(inputs._replace(**{part: value}))[0]
    several = jax.tree.map(lambda array: jnp.stack([array, 2 * array]), getattr(inputs, part))
    in_turn = lambda several: jnp.stack([with_part(jax.tree.map(lambda x, i=i: x[i], several)) for i in range(2)])

    def run(mix_several):
        return jax.jit(jax.value_and_grad(lambda several: (mix_several(several) ** 2).sum()))(several)

    expected = run(in_turn)
    with jax.set_mesh(sub_mesh(expert=2)):
        found = run(jax.vmap(lambda value: with_part(value)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), found, expected)


def test_a_mixture_runs_op_by_op_beside_an_axis_that_is_not_its_own():
    inputs = make_inputs(dtype="float32")
    expected = jax.jit(lambda inputs: mix(inputs)[0])(inputs)
    with jax.set_mesh(sub_mesh(stage=2, expert=2)):
        np.testing.assert_allclose(mix(inputs)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rows_of_features_without_tokens_are_mixed_too():
    inputs = make_inputs(dtype="float32")
    flat = inputs._replace(x=inputs.x.reshape(-1, WIDTH))
    with jax.set_mesh(sub_mesh(expert=4, context=2)):
        got = jax.jit(lambda inputs: mix(inputs)[0])(flat)
    np.testing.assert_allclose(got.reshape(inputs.x.shape), mix(inputs)[0], rtol=0, atol=1e-5)
