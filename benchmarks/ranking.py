"""Whether the estimate puts meshes in the right order: cases that rooflines decide, half of them drawn at random.

    python benchmarks/ranking.py [--drawn 12] [--seed 0]

For each mesh of a case two closed forms give a step's time: the longest of its matrix products, its weights' way
through memory and what each axis sends, as if all of it overlapped; and their sum, as if nothing did. Two meshes are
decided if both forms put them in the same order, by more than 10 %. A case counts if three meshes or more are decided
in every pair; only then is it compiled and estimated. Formulas: https://jax-ml.github.io/scaling-book/training.
"""

import argparse
import functools
import itertools
import math
import random
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpar
from jaxpar.estimation.chips import read_figures
from jaxpar.transformer import Sizes, SwiGLU, Transformer

_RULES = {"stage": jaxpar.PIPELINE, "expert": jaxpar.EXPERT, "model": jaxpar.MEGATRON, "fsdp": jaxpar.FSDP}
_TOP_K = 2
# Slices whose dims are rings, as (chip, dims): only whole dims go to an axis, so that the closed form is plain.
_SLICES = (("v4", (4, 4, 4)), ("v5p", (4, 4, 4)), ("v5p", (8, 8, 8)), ("v5e", (16, 16)), ("v6e", (16, 16)))


class Case(NamedTuple):
    """A model, a slice and a batch: the sizes of a transformer, how many rows of how many tokens."""

    name: str
    chip: str
    shape: tuple[int, ...]
    sizes: Sizes
    rows: int
    length: int
    experts: int = 0


class Choice(NamedTuple):
    """A mesh: its axes, how many dims of the slice each has, and into how many parts a pipeline cuts the rows."""

    axes: dict[str, int]
    dims: dict[str, int]
    microbatches: int = 1

    def __str__(self) -> str:
        parts = f" ({self.microbatches} parts)" if self.microbatches > 1 else ""
        return ",".join(f"{axis}={size}" for axis, size in self.axes.items()) + parts


def rooflines(case: Case, choice: Choice) -> tuple[float, float]:
    """Returns the seconds that a step takes by rooflines: with all of it overlapped, and with nothing."""
    figures = {name: figure.value for name, figure in read_figures()[case.chip].items()}
    peak, hbm, link = figures["peak_flops"], figures["hbm_bandwidth"], figures["link_bandwidth"]
    sizes, chips = case.sizes, math.prod(case.shape)
    axis = lambda name: choice.axes.get(name, 1)
    # What an axis of whole rings carries: both ways of each of its dims.
    rate = lambda name: 2 * link * choice.dims.get(name, 1)
    sent = lambda name, count: count * (axis(name) - 1) / axis(name) / rate(name)
    width, tokens = sizes.heads * sizes.head_size, case.rows * case.length
    kv_width = sizes.kv_heads * sizes.head_size
    attention = 2 * sizes.d_model * (width + kv_width)
    one_mlp = 3 * sizes.d_model * sizes.hidden
    active = sizes.layers * (attention + one_mlp * (_TOP_K if case.experts else 1))
    stored = sizes.layers * (attention + one_mlp * max(case.experts, 1)) + sizes.vocab * sizes.d_model
    # Forward, forward again, backward; scores are two products of T each way and five back.
    scores = sizes.layers * case.length * width * tokens * (4 + 4 + 10)
    products = 8 * active * tokens + 6 * sizes.vocab * sizes.d_model * tokens
    bubble = (choice.microbatches + axis("stage") - 1) / choice.microbatches
    multiplied = (products / 0.9 + scores / 0.5) / chips / peak * bubble
    here = stored / axis("model") / axis("stage") / axis("expert")
    # Gathered forward and backward, and its gradient scattered.
    gathered = 3 * sent("fsdp", 2 * here)
    summed = 2 * sent("data", 2 * here / axis("fsdp"))
    local = tokens / chips * axis("model") * axis("context") * axis("stage")
    activations = 2 * local / axis("context") * sizes.d_model
    # Each layer sums parts twice forward, once or twice forward again, twice backward.
    tensor = 5.5 * sizes.layers / axis("stage") * 2 * sent("model", activations)
    routed = 2 * tokens / chips * _TOP_K * sizes.d_model
    exchanged = 5.5 * sizes.layers * routed * axis("expert") / 4 / rate("expert") * (axis("expert") > 1)
    keys = 2 * 2 * local / axis("context") * kv_width
    # Keys and values go round twice forward and once backward, there with gradients in float32.
    ring = 5 * sizes.layers * keys * (axis("context") - 1) / link
    memory = (3 * 2 * here + 28 * here / axis("fsdp")) / hbm
    parts = multiplied, gathered, summed, tensor, exchanged, ring, memory
    return max(parts), sum(parts)


def pick_decided(case: Case, choices: list[Choice]) -> list[Choice]:
    """Returns the most meshes that are decided in every pair, the fastest first; fewer than three don't count."""
    known = {str(choice): rooflines(case, choice) for choice in choices}
    order = sorted(choices, key=lambda choice: known[str(choice)][1])
    for count in range(len(order), 2, -1):
        for chosen in itertools.combinations(order, count):
            pairs = list(itertools.pairwise(chosen))
            if all(
                a > 1.1 * b for fast, slow in pairs for a, b in zip(known[str(slow)], known[str(fast)], strict=True)
            ):
                return list(chosen)
    return []


def choices_of(case: Case) -> list[Choice]:
    """Returns the meshes of whole dims: data parallel, FSDP, and tensor or expert parallelism beside them."""
    found = []
    for inner in range(len(case.shape)):
        outer_size = math.prod(case.shape[: len(case.shape) - inner])
        inner_size = math.prod(case.shape[len(case.shape) - inner :])
        for outer in ("data", "fsdp"):
            for axis in ("model", "expert", "context") if inner else ("",):
                axes = {outer: outer_size, **({axis: inner_size} if inner else {})}
                dims = {outer: len(case.shape) - inner, **({axis: inner} if inner else {})}
                if case.rows % math.prod(size for name, size in axes.items() if name in ("data", "fsdp", "expert")):
                    continue
                if axis == "model" and (
                    case.sizes.heads % inner_size or case.sizes.kv_heads % inner_size or case.experts
                ):
                    continue
                if axis == "expert" and (not case.experts or case.experts % inner_size):
                    continue
                if axis == "context" and (case.length // inner_size < 512 or case.experts):
                    continue
                found.append(Choice(axes, dims))
    return found


def draw_case(draw: random.Random, number: int) -> Case:
    """Returns a case of the stated range: every slice of the list, 1k to 8k features, 8 to 16k tokens a chip."""
    chip, shape = draw.choice(_SLICES)
    d_model = draw.choice((1024, 2048, 4096, 8192))
    heads = d_model // 128
    sizes = Sizes(d_model, draw.choice((4, 8, 16)), heads, heads, draw.choice((3, 4)) * d_model, 32768, 128)
    length = draw.choice((128, 256, 512, 1024, 2048, 4096))
    rows = math.prod(shape) * draw.choice((1, 2, 4)) // draw.choice((1, 4, 16))
    experts = draw.choice((0, 0, 0, 16, 64))
    return Case(f"drawn {number}", chip, shape, sizes, max(rows, 4), length, experts)


def chosen_cases() -> list[tuple[Case, list[Choice]]]:
    """Returns the cases that are known from the literature, with the meshes to compare."""
    dense = lambda d_model, layers, **more: Sizes(
        d_model, layers, d_model // 128, d_model // 128, 4 * d_model, 32768, 128, **more
    )
    flat, cube = (16, 16), (4, 4, 4)
    both = {"fsdp": 1, "model": 1}
    piped = [
        Choice({"fsdp": 256}, {"fsdp": 2}),
        Choice({"data": 16, "stage": 16}, {"data": 1, "stage": 1}, 16),
        Choice({"fsdp": 16, "model": 16}, both),
    ]
    cases: list[tuple[Case, list[Choice] | None]] = [
        (Case("many tokens: FSDP, then a pipeline, then tensor", "v5e", flat, dense(2048, 16), 4096, 512), piped),
        (Case("many tokens, v6e", "v6e", flat, dense(4096, 16), 4096, 512), piped),
        (Case("few tokens: mixed before FSDP", "v5p", cube, dense(8192, 8), 64, 64), None),
        (Case("few tokens, v4", "v4", cube, dense(8192, 8), 64, 64), None),
        (Case("few tokens, v5e", "v5e", flat, dense(8192, 8), 256, 32), None),
        (Case("few tokens, many chips", "v5p", (8, 8, 8), dense(8192, 8), 512, 32), None),
        (Case("small batch on many chips", "v6e", flat, dense(8192, 16), 256, 64), None),
        (
            Case("experts: tokens travel, not weights", "v5p", cube, dense(4096, 4), 256, 256, 64),
            [
                Choice({"fsdp": 16, "expert": 4}, {"fsdp": 2, "expert": 1}),
                Choice({"fsdp": 4, "expert": 16}, {"fsdp": 1, "expert": 2}),
                Choice({"fsdp": 64}, {"fsdp": 3}),
                Choice({"data": 64}, {"data": 3}),
            ],
        ),
        (
            Case("experts, v5e", "v5e", flat, dense(2048, 4), 256, 256, 64),
            [
                Choice({"fsdp": 16, "expert": 16}, both | {"expert": 1}),
                Choice({"fsdp": 256}, {"fsdp": 2}),
                Choice({"data": 256}, {"data": 2}),
            ],
        ),
        (
            Case("a pipeline's bubble", "v5p", cube, dense(4096, 8), 4096, 512),
            [
                Choice({"data": 64}, {"data": 3}),
                Choice({"data": 16, "stage": 4}, {"data": 2, "stage": 1}, 16),
                Choice({"data": 16, "stage": 4}, {"data": 2, "stage": 1}, 4),
            ],
        ),
        (
            Case("a long context", "v6e", flat, Sizes(4096, 4, 32, 32, 16384, 32768, 128), 256, 8192),
            [
                Choice({"fsdp": 256}, {"fsdp": 2}),
                Choice({"fsdp": 16, "context": 16}, {"fsdp": 1, "context": 1}),
                Choice({"fsdp": 16, "model": 16}, both),
            ],
        ),
    ]
    return [(case, choices_of(case) if choices is None else choices) for case, choices in cases]


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Returns each row's mean cross-entropy, and what experts add."""
    logits, penalty_B = model.predict(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(axis=-1) + penalty_B, {}


def estimate(case: Case, choice: Choice) -> jaxpar.Estimate:
    """Returns the estimate of a case on a mesh."""
    target = f"{case.chip}:{'x'.join(map(str, case.shape))}"
    mesh = jaxpar.make_mesh(",".join(f"{axis}={size}" for axis, size in choice.axes.items()), target=target)
    strategy = jaxpar.sharded(mesh, *(rules for axis, rules in _RULES.items() if axis in mesh.shape))
    attend = functools.partial(jaxpar.splash_attention, is_causal=True)
    if "context" in mesh.shape:
        attend = functools.partial(jaxpar.ring_attention, is_causal=True)
    elif case.length % 128 or "stage" in mesh.shape:
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    mlp = functools.partial(jaxpar.MoE, num_experts=case.experts, top_k=_TOP_K) if case.experts else SwiGLU
    init_fn = lambda rng: jaxpar.TrainState.create(
        Transformer(
            case.sizes,
            attend=attend,
            make_mlp=mlp,
            remat="full",
            stage_microbatches=choice.microbatches,
            rngs=nnx.Rngs(rng),
        ),
        optax.adamw(1e-3),
    )
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16)
    batch = {key: jax.ShapeDtypeStruct((case.rows, case.length), jnp.int32) for key in ("x", "y")}
    return jaxpar.estimate(step, strategy.abstract_state(init_fn), batch)


def compare(case: Case, choices: list[Choice]) -> tuple[int, int]:
    """Prints a case; returns how many pairs the estimate puts in the decided order, and how many there are."""
    start = time.perf_counter()
    seconds = [estimate(case, choice).seconds for choice in choices]
    right = [fast < slow for fast, slow in itertools.combinations(seconds, 2)]
    sizes = case.sizes
    print(
        f"{case.name}: {case.chip}:{'x'.join(map(str, case.shape))}, d_model {sizes.d_model}, {sizes.layers} layers, "
        f"{case.rows} x {case.length} tokens"
        + (f", {case.experts} experts" if case.experts else "")
        + f"; {sum(right)} of {len(right)} pairs, {time.perf_counter() - start:.0f} s"
    )
    for choice, spent in zip(choices, seconds, strict=True):
        overlapped, serial = rooflines(case, choice)
        print(
            f"  {choice!s:<32} closed forms {1e3 * overlapped:9.2f} and {1e3 * serial:9.2f} ms, "
            f"estimated {1e3 * spent:9.2f} ms",
            flush=True,
        )
    return sum(right), len(right)


def main() -> None:
    """Prints every case, and how many pairs are in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawn", type=int, default=12, help="how many cases to draw at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--list", action="store_true", help="show the cases, and compile nothing")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    cases = [(case, chosen) for case, choices in chosen_cases() if (chosen := pick_decided(case, choices))]
    draw, number = random.Random(options.seed), 0
    drawn: list[tuple[Case, list[Choice]]] = []
    while len(drawn) < options.drawn:
        number += 1
        case = draw_case(draw, number)
        if chosen := pick_decided(case, choices_of(case)):
            drawn.append((case, chosen))
    print(f"{len(cases)} cases chosen, {len(drawn)} decided of {number} drawn")
    right = pairs = 0
    for case, choices in cases + drawn:
        if options.list:
            print(
                case.name,
                case.chip,
                case.shape,
                [(str(choice), *(f"{1e3 * each:.2f}" for each in rooflines(case, choice))) for choice in choices],
            )
            continue
        in_order, count = compare(case, choices)
        right, pairs = right + in_order, pairs + count
    if pairs:
        print(f"{right} of {pairs} pairs in order, {100 * right / pairs:.1f} %, over {len(cases) + len(drawn)} cases")


if __name__ == "__main__":
    main()
