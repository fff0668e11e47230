"""Every strategy trains like one device: strategies x device counts x models x steps, pairwise, in float64 to 1e-9."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import test_context
import test_expert
import test_pipeline
from flax import nnx
from models import MODELS, STRATEGIES, make_task

import jaxpar
from jaxpar.testing import assert_trains_like_one_device

DEVICE_COUNTS = (8, 4, 2, 1)


class StepCase(NamedTuple):
    """How a step differs from the plain one: what the task is given, and what the builder is."""

    task: dict[str, Any] = {}  # noqa: RUF012
    build: dict[str, Any] = {}  # noqa: RUF012


_SGD = optax.sgd(0.2, momentum=0.9)
STEPS = {
    "plain": StepCase(),
    "microbatches": StepCase({"tx": _SGD}, {"num_microbatches": 4}),
    "masked": StepCase({"tx": _SGD, "masked": True}),
    "clipped": StepCase({"tx": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5))}),
    "bf16": StepCase({"tx": _SGD}, {"compute_dtype": jnp.bfloat16}),
    "dropout": StepCase({"dropout": 0.3}),
    "remat": StepCase({"tx": optax.adafactor(1e-2, min_dim_size_to_factor=8), "remat": True}),
}
MORE_STEPS = {
    "dropout_microbatches": StepCase({"tx": _SGD, "dropout": 0.3}, {"num_microbatches": 4}),
    "masked_microbatches": StepCase({"tx": _SGD, "masked": True}, {"num_microbatches": 4}),
    "batchnorm_microbatches": StepCase({"tx": _SGD}, {"num_microbatches": 2}),
}


class Cell(NamedTuple):
    strategy: str
    devices: int
    model: str
    step: str


def cover_pairs(shift: int) -> list[Cell]:
    """Returns cells in which each pair of strategy, model, step and device count meets (a Latin square, shifted)."""
    steps = list(STEPS)
    return [
        Cell(strategy, DEVICE_COUNTS[(row // 2 + column) % 4], model, steps[(row + column + shift) % len(steps)])
        for row, strategy in enumerate(STRATEGIES)
        for column, model in enumerate(MODELS)
    ]


CELLS = cover_pairs(shift=0)
# The diagonal, and the model that it leaves out, are fast: each strategy, model, step and device count.
FAST_CELLS = [*CELLS[:: len(MODELS) + 1], CELLS[len(MODELS) - 1]]
# A shard's own dropout and its own statistics meet microbatches where the step sees shards, and where it doesn't.
OWN_CELLS = [
    Cell("pmap", 4, "nnx_decoder", "dropout_microbatches"),
    Cell("data", 8, "linen_mlp", "dropout_microbatches"),
    Cell("fsdp", 8, "nnx_mlp", "dropout_microbatches"),
    Cell("data_model", 8, "linen_decoder", "dropout_microbatches"),
    Cell("pmap", 8, "linen_conv", "batchnorm_microbatches"),
    Cell("data", 8, "nnx_conv", "batchnorm_microbatches"),
    Cell("fsdp_model", 8, "nnx_conv", "batchnorm_microbatches"),
    Cell("zero1", 4, "linen_conv", "batchnorm_microbatches"),
    Cell("pmap", 8, "nnx_mlp", "masked_microbatches"),
    Cell("data", 8, "linen_decoder", "masked_microbatches"),
]
OWN_CELLS += [
    Cell(list(STRATEGIES)[(number + shift) % len(STRATEGIES)], 8, model, step)
    for shift, step in enumerate(("dropout_microbatches", "masked_microbatches"))
    for number, model in enumerate(MODELS)
]
OWN_CELLS += [
    Cell(strategy, 8, ("nnx_conv", "linen_conv")[number % 2], "batchnorm_microbatches")
    for number, strategy in enumerate(STRATEGIES)
]
OWN_CELLS = list(dict.fromkeys(OWN_CELLS))


def name(cell: Cell) -> str:
    return "-".join(map(str, cell))


def check(cell: Cell) -> jaxpar.testing.Agreement:
    case = {**STEPS, **MORE_STEPS}[cell.step]
    task = make_task(cell.model, **case.task)
    model = make_model(cell.model, case.task.get("dropout", 0.0), case.task.get("remat", False))
    tx = case.task.get("tx", optax.adamw(1e-2))
    strategy = STRATEGIES[cell.strategy](cell.devices)
    dtypes = None if "compute_dtype" in case.build else ("float64",)
    return assert_trains_like_one_device(
        lambda rng: jaxpar.TrainState.create(model, tx),
        task.loss_fn,
        task.batches,
        strategy,
        dtypes=dtypes,
        **case.build,
    )


@functools.cache
def make_model(name: str, dropout: float, remat: bool) -> Any:
    """Returns a model with its numbers drawn: to compile the drawing in every cell would take a fifth of the time."""
    init_fn = make_task(name, dropout=dropout, remat=remat).init_fn
    return STRATEGIES["data"](1).init(init_fn, jax.random.key(0)).model


def slow_but(fast: list[Cell], cells: list[Cell]) -> list[Any]:
    return [cell if cell in fast else pytest.param(cell, marks=pytest.mark.slow) for cell in cells]


@pytest.mark.parametrize("cell", slow_but(FAST_CELLS, CELLS), ids=name)
def test_every_strategy_trains_like_one_device(cell):
    assert check(cell).steps == 5


@pytest.mark.parametrize("cell", slow_but(OWN_CELLS[:10:6], OWN_CELLS), ids=name)
def test_shards_and_microbatches_together_train_like_one_device(cell):
    assert check(cell).steps == 5


@pytest.mark.parametrize("step", [pytest.param("plain", marks=pytest.mark.slow), "masked"])
def test_float32_trains_like_one_device_too(step):
    case = STEPS[step]
    agreement = assert_trains_like_one_device(
        *make_task("nnx_decoder", **case.task), STRATEGIES["fsdp_model"](8), dtypes=("float32",), **case.build
    )
    assert agreement.runs[0].loss < 1e-5


# islands: the models are those of their own files

FAST_PIPELINE_CELLS = [
    # A ring of as many slots as stages would be too short for its microbatches.
    ("stage", "1f1b", 0.0, 1),
    ("stage_model", "gpipe", 0.0, 1),
    ("data_stage", "pipeline", 0.3, 2),
]
# Each strategy meets each loss and each dropout, and these each other; then what mutations are caught by.
PIPELINE_CELLS = [
    (strategy, loss, dropout, 2 if strategy == "data_stage" and dropout else 1)
    for row, strategy in enumerate(test_pipeline.STRATEGIES)
    for column, loss in enumerate(test_pipeline.LOSSES)
    for dropout in (0.3 * ((row + column) % 2),)
]
PIPELINE_CELLS += [("data_stage", "1f1b", 0.0, 1), ("stages", "pipeline", 0.3, 1), *FAST_PIPELINE_CELLS]
PIPELINE_CELLS = list(dict.fromkeys(PIPELINE_CELLS))


@pytest.mark.parametrize(
    ("strategy", "loss", "dropout", "num_microbatches"),
    [cell if cell in FAST_PIPELINE_CELLS else pytest.param(*cell, marks=pytest.mark.slow) for cell in PIPELINE_CELLS],
)
def test_a_pipeline_trains_like_one_device(strategy, loss, dropout, num_microbatches):
    agreement = assert_trains_like_one_device(
        test_pipeline.make_init_fn(dropout),
        test_pipeline.LOSSES[loss],
        test_pipeline.make_batches(),
        test_pipeline.STRATEGIES[strategy](),
        dtypes=("float64",),
        num_microbatches=num_microbatches,
    )
    assert agreement.runs[0].params < 1e-12


def check_context(name, num_microbatches):
    strategy, attention, splits = test_context.TRAINED[name]
    return assert_trains_like_one_device(
        test_context.make_init(attention, splits),
        test_context.loss_fn,
        test_context.BATCHES,
        strategy(),
        num_microbatches=num_microbatches,
        dtypes=("float64",),
    )


@pytest.mark.parametrize(
    ("name", "num_microbatches"),
    [("data_context", 2), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("ulysses", "context_model"))],
)
def test_a_model_trains_like_one_device_with_its_sequence_split(name, num_microbatches):
    assert check_context(name, num_microbatches).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_microbatches"),
    [
        *[(name, count) for name in ("context", "model") for count in (1, 2)],
        ("ulysses", 2),
        *[("data_context", 1), ("context_model", 2), ("fsdp_context", 1), ("fsdp_context", 2)],
    ],
)
def test_more_models_train_like_one_device_with_their_sequence_split(name, num_microbatches):
    assert check_context(name, num_microbatches).steps == 2


@pytest.mark.parametrize(
    "kind",
    ["data_expert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp_expert", "expert_model", "data"))],
)
def test_an_nnx_mixture_with_its_losses_trains_like_one_device(kind):
    assert test_expert.train(kind, test_expert.init_nnx, test_expert.balanced_loss).steps == 3


@pytest.mark.slow
def test_a_linen_mixture_with_its_losses_trains_like_one_device():
    assert test_expert.train("data_expert", test_expert.init_linen, test_expert.balanced_loss).steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data_expert", "fsdp_expert"])
def test_a_mixture_in_microbatches_trains_like_one_device(kind):
    assert test_expert.train(kind, test_expert.init_nnx, test_expert.balanced_loss, num_microbatches=2).steps == 3


@pytest.mark.slow
def test_under_pmap_each_shard_has_its_own_balance():
    assert test_expert.train("pmap", test_expert.init_nnx, test_expert.balanced_loss).steps == 3


ISLANDS = {
    "pipeline": (test_pipeline.make_init_fn(0.0), test_pipeline.LOSSES["gpipe"], test_pipeline.make_batches()),
    "1f1b": (test_pipeline.make_init_fn(0.0), test_pipeline.LOSSES["1f1b"], test_pipeline.make_batches()),
    "context": (test_context.make_init("ring"), test_context.loss_fn, test_context.BATCHES),
    "expert": (test_expert.init_nnx, test_expert.balanced_loss, test_expert.make_batches()),
}
ISLAND_MESHES = {
    "pipeline": lambda: test_pipeline.STRATEGIES["data_stage_model"](),
    "1f1b": lambda: test_pipeline.STRATEGIES["data_stage"](),
    "context": lambda: test_context.TRAINED["fsdp_context"][0](),
    "expert": lambda: test_expert.STRATEGIES["fsdp_expert"](),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["clipped", "remat"])
@pytest.mark.parametrize("island", ISLANDS)
def test_an_island_trains_like_one_device_clipped_and_rematerialised(island, step):
    init_fn, loss_fn, batches = ISLANDS[island]
    tx = STEPS["clipped"].task["tx"] if step == "clipped" else _SGD
    agreement = assert_trains_like_one_device(
        lambda rng: jaxpar.TrainState.create(init_fn(rng).model, tx),
        nnx.remat(loss_fn) if step == "remat" else loss_fn,
        batches,
        ISLAND_MESHES[island](),
        dtypes=("float64",),
    )
    assert agreement.steps == len(batches)


def test_every_strategy_model_step_and_number_of_devices_is_among_the_fast_cells():
    for field, values in zip(Cell._fields, (STRATEGIES, DEVICE_COUNTS, MODELS, STEPS), strict=True):
        assert {getattr(cell, field) for cell in FAST_CELLS} == set(values), field


def test_every_pair_of_strategy_devices_model_and_step_occurs():
    for first, second in itertools.combinations(["strategy", "model", "step"], 2):
        found = {(getattr(cell, first), getattr(cell, second)) for cell in CELLS}
        sizes = {"strategy": len(STRATEGIES), "model": len(MODELS), "step": len(STEPS)}
        assert len(found) == sizes[first] * sizes[second], (first, second)
    for other in ("strategy", "model", "step"):
        values = {getattr(cell, other) for cell in CELLS}
        found = {(getattr(cell, other), cell.devices) for cell in CELLS}
        assert len(found) == len(values) * len(DEVICE_COUNTS), other
