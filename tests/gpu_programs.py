"""Some steps by XLA's GPU compiler, cut down to their collectives, without a GPU: `python tests/gpu_programs.py`.

Writes `gpu_hlo/NAME.hlo`; needs jax-cuda12-plugin and jax-cuda12-pjrt of jax's own version. Lines are the compiler's
own, less names for its scheduler, the shapes of what loops carry, and all that neither sends nor says what is sent.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.experimental.compute_on import compute_on
from jax.sharding import NamedSharding, PartitionSpec

import jaxpar
from jaxpar.inspection.collectives import KINDS
from jaxpar.inspection.hlo import read_program
from jaxpar.inspection.operands import operands_of
from jaxpar.train_command import loss_fn
from jaxpar.transformer import Sizes, Transformer

FOLDER = pathlib.Path(__file__).parent / "gpu_hlo"
SIZES = Sizes(d_model=64, layers=3, heads=4, kv_heads=4, hidden=128)
ROWS, LENGTH = 64, 32
STEPS = {
    "data": ({"data": 8}, [], {}),
    "fsdp": ({"fsdp": 8}, [jaxpar.FSDP], {}),
    "ring": ({"data": 2, "context": 4}, [], {"attend": functools.partial(jaxpar.ring_attention, is_causal=True)}),
    "ulysses": ({"data": 2, "context": 4}, [], {"attend": functools.partial(jaxpar.ulysses_attention, is_causal=True)}),
    "expert": (
        {"data": 2, "expert": 4},
        [jaxpar.EXPERT],
        {"make_mlp": functools.partial(jaxpar.MoE, num_experts=8, top_k=2)},
    ),
}


def make_step(name, devices=None):
    """Returns (step, state, batch) of one of `STEPS` on 8 devices, those that are here by default."""
    axes, rules, parts = STEPS[name]
    strategy = jaxpar.sharded(jaxpar.make_mesh(devices=devices, **axes), *rules)
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(SIZES, rngs=nnx.Rngs(rng), **parts), optax.sgd(1.0))
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16)
    batch = {key: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.uint8) for key in "xy"}
    return step, strategy.abstract_state(init_fn), batch


def lower_stream(devices):
    """Returns a program that starts a hop round a ring and a sum on a stream of their own, and goes on."""
    mesh, split = jaxpar.make_mesh(data=8, devices=devices), PartitionSpec("data")

    @jax.jit
    def move(x, y):
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), jax.lax.psum(y, "data")

    def step(x, y):
        with compute_on("gpu_stream:1"):
            return move(x, y)

    x = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=NamedSharding(mesh, split))
    run = jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=(split, PartitionSpec()))
    return jax.jit(run).lower(x, x)


def cut_down(text, *, with_sources=False):
    """Returns a program's text with its collectives, what they are given, and what runs them."""
    program, lines, current, frames = read_program(text), [], "", set()
    kept = {name: _kept_names(program, computation) for name, computation in program.computations.items()}
    for line in text.split("\n\n\n")[-1].splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            current = re.match(r"(?:ENTRY )?%([\w.\-]+)", line)[1]
            if kept.get(current):
                lines.append(re.sub(r" \(.*\) -> .* \{", " () -> () {", line))
        elif line == "}" and kept.get(current):
            lines += ["}", ""]
        elif (named := re.match(r"  (?:ROOT )?%([\w.\-]+) = ", line)) and named[1] in kept.get(current, ()):
            frames |= {int(number) for number in re.findall(r"stack_frame_id=(\d+)", line)}
            line = _shorten(line)
            lines.append(line if with_sources else re.sub(r", metadata=\{.*?\}(?=,|$)", "", line))
    tables = _tables(text, frames) if with_sources else ()
    return "\n".join(["HloModule step", "", *tables, *lines])


def _kept_names(program, computation):
    names = set()
    for one in computation:
        if one.opcode.removesuffix("-start") in KINDS:
            names |= {one.name, *one.operands}
            for operand in operands_of(program, computation, one):
                names.add(operand.maker.name)
            for each in (computation.instructions[name] for name in one.operands):
                # What is laid flat, and its views.
                if "wrapped_concatenate" in each.name:
                    names |= set(each.operands)
        elif one.opcode.removesuffix("-done") in (*KINDS, "while", "conditional", "call", "call-start"):
            names.add(one.name)
    if "wrapped_concatenate" in computation.name:
        names |= set(computation.instructions)
    return names | ({computation.root} if names else set())


def _shorten(line):
    line = re.sub(r'(?: deduplicated_name="[^"]*")? scheduling_name="[^"]*"|scheduling_name="[^"]*"', "", line)
    line = line.replace(", metadata={}", "")
    if re.search(r" (while|conditional|tuple)\(|get-tuple-element\(", line):
        line = re.sub(r"= \(.*?\) (while|conditional|tuple)\([^)]*\)", r"= () \1()", line)
        return re.sub(r',"known_init_step".*', "}", line)
    config = re.search(r'"collective_backend_config":\{.*?\}', line) if "-start(" in line else None
    return re.sub(r", backend_config=\{.*\}", f", backend_config={{{config[0]}}}" if config else "", line)


def _tables(text, frames):
    """The source tables, with the rows alone that lead to some frames."""
    rows = {}
    for table in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        listed = text.split(f"\n{table}\n", 1)[1].split("\n\n", 1)[0].splitlines()
        rows[table] = {int(row.split(" ", 1)[0]): row for row in listed}
    field = lambda row, name: int(re.search(rf"{name}=(\d+)", row)[1])
    used = {table: set() for table in rows}
    for number in frames:
        while number in rows["StackFrames"] and number not in used["StackFrames"]:
            row = rows["StackFrames"][number]
            used["StackFrames"].add(number)
            used["FileLocations"].add(field(row, "file_location_id"))
            number = field(row, "parent_frame_id") - 1
    for number in used["FileLocations"]:
        used["FileNames"].add(field(rows["FileLocations"][number], "file_name_id"))
        used["FunctionNames"].add(field(rows["FileLocations"][number], "function_name_id"))
    for table, numbers in used.items():
        listed = (
            re.sub(r'"/.*?/((?:site-packages|jaxpar|tests)/)', r'"/\1', rows[table][one]) for one in sorted(numbers)
        )
        yield from (table, *listed, "")


def main():
    target = (FOLDER / "h100.txtpb").read_text()
    found = topologies.get_topology_desc(platform="cuda", topology_name="1x1x8", topology="1x1x8", target_config=target)
    devices = list(np.array(found.devices).flat)
    for name in STEPS:
        step, state, batch = make_step(name, devices)
        text = step.lower(state, batch).compile().as_text()
        (FOLDER / f"{name}.hlo").write_text(cut_down(text, with_sources=name == "data"))
    (FOLDER / "stream.hlo").write_text(cut_down(lower_stream(devices).compile().as_text()))


if __name__ == "__main__":
    main()
