"""Flax's own models train like one device, each in both views of a step: under pmap, and under a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_models import CLASSES, VOCAB
from jax.sharding import PartitionSpec as P
from models import sub_mesh

import jaxpar
from jaxpar.rules import megatron
from jaxpar.testing import assert_trains_like_one_device

ROWS, STEPS = 16, 3


def mean_cross_entropy(logits, batch, name="y"):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[name]).mean()


def vae_loss(outputs, batch):
    logits, mean, logvar = outputs
    likelihood = optax.sigmoid_binary_cross_entropy(logits, (batch["x"] > 0).astype(logits.dtype)).sum(-1)
    divergence = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1)
    return likelihood.mean() + divergence.mean()


def actor_critic_loss(outputs, batch):
    log_probabilities, value = outputs
    chosen = jnp.take_along_axis(log_probabilities, batch["y"][:, None], axis=1)
    return -chosen.mean() + ((value[:, 0] - batch["x"].mean((1, 2, 3))) ** 2).mean()


class Example(NamedTuple):
    """A model with its input, and what a model axis splits of it, or None.

    Flax's LSTM cells start from zeros in float32 whatever they compute in, and nnx.Embed keeps the dtype in which it
    was made: those models are held to float32's tolerance alone.
    """

    make: Callable[..., Any]
    shape: tuple[int, ...]
    loss: Callable[[Any, Any], Any] = mean_cross_entropy
    rules: Any = None
    dtypes: tuple[str, ...] = ("float64",)
    trainable: Callable[[str], bool] | None = None
    target: tuple[int, ...] = ()
    takes_rng: bool = False


FEATURES, TOKENS = (8,), (6,)
FLOAT32 = ("float32",)
EXAMPLES = {
    "nnx_basics": Example(
        lambda rngs: flax_models.BasicMLP(FEATURES[0], 32, CLASSES, rngs=rngs),
        FEATURES,
        rules=[(r"1/w$", P(None, "model")), (r"2/w$", P("model")), (".*", None)],
    ),
    "nnx_lora": Example(flax_models.make_lora, FEATURES, trainable=lambda path: path.endswith(("A", "B"))),
    "nnx_scan_over_layers": Example(flax_models.ScannedMLPs, FEATURES),
    "nnx_mnist": Example(
        lambda rngs: flax_models.MnistCNN(rngs=rngs), (8, 8, 1), rules=megatron(column=["linear1"], row=["linear2"])
    ),
    "nnx_gemma": Example(
        lambda rngs: flax_models.Gemma(rngs=rngs),
        TOKENS,
        target=TOKENS,
        rules=megatron(column=["up_proj", "gate_proj"], row=["down_proj"]),
    ),
    "nnx_attention": Example(
        lambda rngs: flax_models.AttentionBlock(rngs=rngs), TOKENS, target=TOKENS, rules=jaxpar.MEGATRON, dtypes=FLOAT32
    ),
    "linen_mnist": Example(flax_models.LinenMnistCNN, (8, 8, 1), rules=megatron(column=["Dense_0"], row=["Dense_1"])),
    "linen_vae": Example(
        flax_models.VAE,
        (64,),
        vae_loss,
        rules=megatron(column=["fc1"], row=["fc2", "fc2_mean", "fc2_logvar"]),
        takes_rng=True,
    ),
    "linen_resnet": Example(flax_models.ResNet, (8, 8, 3)),
    "linen_ppo": Example(
        flax_models.ActorCritic, (8, 8, 4), actor_critic_loss, rules=megatron(column=["hidden"], row=["logits"])
    ),
    "linen_wmt": Example(
        flax_models.WMTEncoder,
        TOKENS,
        target=TOKENS,
        rules=megatron(column=["Dense_0", "Dense_2"], row=["Dense_1", "Dense_3"]),
    ),
    "linen_seq2seq": Example(flax_models.Seq2seq, TOKENS, target=TOKENS, dtypes=FLOAT32),
    "linen_sst2": Example(flax_models.TextClassifier, TOKENS, dtypes=FLOAT32),
}
STRATEGIES = {
    "pmap": lambda example: jaxpar.data_parallel(jax.devices()[:4]),
    "data": lambda example: jaxpar.sharded(sub_mesh(data=8)),
    "fsdp": lambda example: jaxpar.sharded(sub_mesh(fsdp=4), jaxpar.FSDP),
    "data_model": lambda example: jaxpar.sharded(sub_mesh(data=2, model=4), example.rules),
}
# A model axis where a model has layers to split; then FSDP and data parallelism in turn.
CELLS = [
    (name, kind)
    for number, (name, example) in enumerate(EXAMPLES.items())
    for kind in ("pmap", "data_model" if example.rules else ("fsdp", "data")[number % 2])
]
# One in nine is fast: both views of a step, nnx and linen.
MARKED = [cell if number % 9 == 0 else pytest.param(*cell, marks=pytest.mark.slow) for number, cell in enumerate(CELLS)]


def make_batches(example: Example) -> list[dict[str, np.ndarray]]:
    """Returns a batch for each step: tokens where the example reads them, else numbers."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        target = rng.integers(0, CLASSES, (ROWS, *example.target)).astype("int32")
        if example.shape is TOKENS:
            x = rng.integers(0, VOCAB, (ROWS, *TOKENS)).astype("int32")
        else:
            x = rng.normal(size=(ROWS, *example.shape)).astype("float32")
        batches.append({"x": x, "y": target})
    return batches


def nnx_functions(example: Example, tx: optax.GradientTransformation, sample: Any) -> tuple[Callable, Callable]:
    def init_fn(rng):
        return jaxpar.TrainState.create(example.make(nnx.Rngs(rng)), tx, trainable=example.trainable)

    return init_fn, lambda model, batch, rng: example.loss(model(batch["x"]), batch)


def linen_functions(example: Example, tx: optax.GradientTransformation, sample: Any) -> tuple[Callable, Callable]:
    module = example.make()

    def init_fn(rng):
        keys = {"params": rng, "dropout": rng, "lstm": rng}
        return jaxpar.TrainState.create(module.init(keys, sample, *[rng] * example.takes_rng), tx)

    def loss_fn(variables, batch, rng):
        keys = {"dropout": rng, "lstm": rng}
        outputs, updates = module.apply(
            variables, batch["x"], *[rng] * example.takes_rng, rngs=keys, mutable=["batch_stats"]
        )
        return example.loss(outputs, batch), {}, updates

    return init_fn, loss_fn


@pytest.mark.parametrize(("name", "kind"), MARKED)
def test_flaxs_own_models_train_like_one_device(name, kind):
    example, tx = EXAMPLES[name], optax.adam(1e-2)
    batches = make_batches(example)
    of = nnx_functions if name.startswith("nnx") else linen_functions
    functions = of(example, tx, batches[0]["x"])
    agreement = assert_trains_like_one_device(*functions, batches, STRATEGIES[kind](example), dtypes=example.dtypes)
    assert agreement.steps == STEPS


def test_eight_of_flaxs_models_and_more_train_under_every_strategy_that_has_a_row():
    assert len(EXAMPLES) >= 8
    assert all(sum(name == other for other, _ in CELLS) == 2 for name in EXAMPLES)
    assert {kind for _, kind in CELLS} == set(STRATEGIES)
