"""The command line, `jaxpar train` and its sisters; changes with what a user may ask of it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jaxpar
from jaxpar.usage import DEMO_SIZES, UsageError, path_name, positive_number, step_range, whole_number

# jaxpar.AXES is beside code that imports JAX, for which --help would wait.
_AXES = ("data", "fsdp", "stage", "expert", "context", "model")
_MAX_SEED = 2**32 - 1
_MAX_SIZE = 2**20
_MAX_FAKE_DEVICES = 1024
# What is not given is not there: a module's sizes are its own.
_SIZES_GIVEN = dict.fromkeys(DEMO_SIZES, argparse.SUPPRESS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of `jaxpar` run with the arguments, by default those of the process.

    0: all is well; 1: it was not (a loss that is no number, a violated pin); 2: bad arguments, or none; 130:
    interrupted.

    >>> main(["doctor"])
    Python ...
    All is well.
    0
    """
    try:
        parser = _make_parser()
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help(sys.stderr)
            return 2
        options = parser.parse_args(arguments)
        return options.run(options)
    except UsageError as error:
        print(f"jaxpar: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxpar: interrupted", file=sys.stderr)
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxpar", description=jaxpar.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxpar {jaxpar.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, dest="command")
    makers = (_add_train, _add_inspect, _add_estimate, _add_checkpoint, _add_launch, _add_doctor)
    for each in (parser, *(make(commands) for make in makers)):
        # argparse would print the usage too, several lines, and leave the process.
        each.error = _raise_usage
    return parser


def _add_command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def _add_train(commands: Any) -> argparse.ArgumentParser:
    train = _add_command(
        commands,
        "train",
        "train a byte-level transformer on text, on any mesh",
        "Trains a byte-level decoder-only transformer on text, with the same curve on every mesh; but experts are "
        "balanced over the rows that a stage or a microbatch sees at once.",
    )
    _add_placement(train)
    _add_job(train)
    _add_model(train, DEMO_SIZES)
    train.set_defaults(run=_train)
    return train


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    inspect = _add_command(
        commands,
        "inspect",
        "say what a step will do on a mesh, here or on a TPU pod that isn't",
        "Compiles a train step and runs nothing: prints memory, collectives beside the fewest bytes that they could "
        "move, and matrix products. MODULE is your own code, and is run. Exit code 1: it does not fit.",
    )
    _add_module(inspect)
    _add_target(inspect).add_argument(
        "--target", metavar="POD", help="v4, v5e, v5p or v6e, by chips or shape: v5e-256, v5p:4x4x8"
    )
    _add_model(inspect, _SIZES_GIVEN)
    inspect.set_defaults(run=_inspect)
    return inspect


def _add_estimate(commands: Any) -> argparse.ArgumentParser:
    estimate = _add_command(
        commands,
        "estimate",
        "say how long a step takes on a TPU pod that isn't here, and what it costs",
        "Compiles a train step for a TPU pod and runs nothing: prints the step's time as a range, what it waits for, "
        "whether it fits and dollars; for several pods one table. MODULE is your own code, and is run. Exit code 1: it "
        "does not fit.",
    )
    _add_module(estimate)
    _add_pods(_add_target(estimate))
    _add_model(estimate, _SIZES_GIVEN)
    estimate.set_defaults(run=_estimate)
    return estimate


def _add_checkpoint(commands: Any) -> argparse.ArgumentParser:
    checkpoint = _add_command(
        commands,
        "checkpoint",
        "list a folder's checkpoints, and check every file of them",
        "Lists the checkpoints in a folder: step, bytes, digest, and what each needs. Exit code 1: one is damaged.",
    )
    checkpoint.add_argument("directory", metavar="DIR", type=path_name, help="the folder")
    checkpoint.add_argument("--verify", action="store_true", help="compare every file with its SHA-256 digest")
    checkpoint.add_argument("--json", action="store_true", help="print plain data")
    checkpoint.set_defaults(run=_checkpoint)
    return checkpoint


def _add_launch(commands: Any) -> argparse.ArgumentParser:
    launch = _add_command(
        commands,
        "launch",
        "run a program in several processes on this machine",
        "Runs a program in several processes, each of which calls jaxpar.initialize(); their output is prefixed, "
        "signals are passed on, and when one ends badly all are ended.",
    )
    launch.add_argument("-n", "--processes", type=whole_number(1, 1024), required=True, metavar="N", help="how many")
    launch.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...", help="what to run")
    launch.set_defaults(run=_launch)
    return launch


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    doctor = commands.add_parser("doctor", help="say what JAX sees here, and what its settings cost")
    doctor.set_defaults(run=_doctor)
    return doctor


def _add_placement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help=f"sizes of mesh axes, of {', '.join(_AXES)}; one may be -1. If not given, all devices lie on data",
    )
    either.add_argument("--pmap", action="store_true", help="data parallel over all devices, with jax.pmap")
    group.add_argument(
        "--fake-devices", type=whole_number(1, _MAX_FAKE_DEVICES), metavar="N", help="run on N CPU devices, made up"
    )
    _add_parts(group)


def _add_parts(group: argparse._ArgumentGroup) -> None:
    size = whole_number(1, _MAX_SIZE)
    group.add_argument("--microbatches", type=size, default=1, metavar="N", help="parts of a batch, in turn")
    group.add_argument(
        "--stage-microbatches",
        type=size,
        metavar="N",
        help="parts of each microbatch that flow through the stages of --mesh stage=S, S or more; if not given, 2 S",
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")


def _add_module(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "module",
        nargs="?",
        metavar="MODULE",
        help="a Python file or module with init_fn, loss_fn, batch and, if it likes, rules; or llama2-7b, a ready one; "
        "if not given, the model of jaxpar train",
    )
    # The optimizer's own numbers change nothing that is counted.
    parser.set_defaults(learning_rate=1e-3, steps=1)


def _add_pods(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target",
        metavar="POD,...",
        required=True,
        help="one pod or several: v4, v5e, v5p or v6e, by chips or shape: v5e-256, v5p:4x4x8",
    )
    group.add_argument("--price", metavar="CHIP=X,...", help="dollars a chip and hour; if not given, list prices")
    group.add_argument("--chart", type=path_name, metavar="FILE", help="draw where time and memory go, as PNG")
    group.add_argument(
        "--time-limit", type=positive_number, default=300.0, metavar="S", help="seconds that a compile may take"
    )


def _add_target(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("where")
    size = whole_number(1, _MAX_SIZE)
    group.add_argument("--mesh", metavar="AXIS=N,...", help=f"sizes of mesh axes, of {', '.join(_AXES)}; one may be -1")
    group.add_argument("--slices", type=whole_number(1, 1024), default=1, metavar="N", help="as many such pods")
    group.add_argument("--slice-axis", choices=_AXES, default="data", help="the axis that crosses slices")
    group.add_argument(
        "--fake-devices", type=whole_number(1, _MAX_FAKE_DEVICES), metavar="N", help="compile for N CPU devices"
    )
    _add_parts(group)
    group.add_argument(
        "--batch-size", type=size, metavar="N", help="rows of a ready model's batch; if not given, 32, or one a chip"
    )
    group.add_argument("--seq-len", type=size, metavar="N", help="tokens in a row of it; if not given, 64, or 4096")
    group.add_argument("--json", action="store_true", help="print plain data")
    return group


def _add_job(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    size = whole_number(1, _MAX_SIZE)
    group.add_argument(
        "--text", type=path_name, metavar="PATH", help="file or folder; if not given, Python's own standard library"
    )
    group.add_argument("--out", type=path_name, metavar="DIR", help="folder for log.jsonl (a row a step) and loss.png")
    group.add_argument(
        "--profile", type=step_range, metavar="A..B", help="write a trace of these steps to --out, for xprof"
    )
    group.add_argument("--steps", type=whole_number(1), default=200, metavar="N", help="how many")
    group.add_argument("--seed", type=whole_number(0, _MAX_SEED), default=0, metavar="N", help="of all randomness")
    group.add_argument("--batch-size", type=size, default=32, metavar="N", help="rows, over all devices")
    group.add_argument("--seq-len", type=size, default=64, metavar="N", help="bytes in a row")
    group.add_argument(
        "--checkpoint",
        type=path_name,
        metavar="DIR",
        help="folder to save checkpoints in, and to go on from, under this or any other --mesh",
    )
    group.add_argument("--checkpoint-every", type=size, default=100, metavar="N", help="steps from one to the next")
    group.add_argument("--keep", type=size, default=3, metavar="N", help="checkpoints to keep, the latest")
    group.add_argument("--learning-rate", type=positive_number, default=4e-3, metavar="X", help="at its peak")


def _add_model(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    unless_given = ", ".join(f"{value} {name.replace('_', '-')}" for name, value in DEMO_SIZES.items())
    group = parser.add_argument_group("model", f"of jaxpar train; where nothing is given, {unless_given}")
    size = whole_number(1, _MAX_SIZE)
    helps = {
        "d_model": "features between layers",
        "layers": "how many",
        "heads": "query heads",
        "experts": "experts in place of each MLP; 0: none",
        "kv_heads": "key/value heads",
    }
    for name, default in defaults.items():
        kind = whole_number(0, _MAX_SIZE) if name == "experts" else size
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=helps[name])


def _train(options: argparse.Namespace) -> int:
    from jaxpar.train_command import train

    return train(options)


def _inspect(options: argparse.Namespace) -> int:
    from jaxpar.inspect_command import inspect

    return inspect(options)


def _estimate(options: argparse.Namespace) -> int:
    from jaxpar.estimate_command import estimate

    return estimate(options)


def _checkpoint(options: argparse.Namespace) -> int:
    from jaxpar.checkpoint_command import list_checkpoints

    return list_checkpoints(options)


def _launch(options: argparse.Namespace) -> int:
    from jaxpar.launch_command import launch

    return launch(options)


def _doctor(options: argparse.Namespace) -> int:
    from jaxpar.doctor import examine

    return examine()


def _raise_usage(message: str) -> NoReturn:
    raise UsageError(f"{message}; --help lists what there is.")


if __name__ == "__main__":
    sys.exit(main())
