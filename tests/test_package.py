"""The public names, the one direction of imports, and what the whole package promises of its files."""

import ast
import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jaxpar
from jaxpar import doctor

PACKAGE = pathlib.Path(jaxpar.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for path in FILES]
MODULES = [name for name in NAMES if not name.endswith(("__init__", "__main__"))]
PUBLIC = [
    "AXES",
    "AheadError",
    "BatchError",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "ContextError",
    "DistributedError",
    "DriftError",
    "EXPERT",
    "Estimate",
    "EstimationError",
    "EvalStep",
    "ExpertError",
    "ExpertKernels",
    "FSDP",
    "FitError",
    "Inspection",
    "InspectionError",
    "Layout",
    "LayoutRow",
    "Leaf",
    "LossError",
    "MEGATRON",
    "MeshError",
    "MoE",
    "MoELosses",
    "PIPELINE",
    "PartitionError",
    "PipelineError",
    "Profile",
    "RecompileWarning",
    "ScheduleError",
    "SplashError",
    "StateError",
    "Step",
    "Strategy",
    "TargetError",
    "TrainState",
    "WHOLE",
    "Weighted",
    "ZERO1",
    "data",
    "data_parallel",
    "estimate",
    "evaluate",
    "experts",
    "fake_devices",
    "fit",
    "fsdp",
    "initialize",
    "inspect",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "megatron",
    "mixture_of_experts",
    "pad_batch",
    "pipeline",
    "pipeline_loss",
    "ring_attention",
    "rules",
    "schedule",
    "sharded",
    "splash_attention",
    "split_sequence",
    "stages",
    "testing",
    "ulysses_attention",
    "zero1",
    "zigzag",
    "zigzag_order",
]
# The modules of the core, each importing only those before it; an engine is what knows jit over a mesh, or pmap.
CORE = [
    "integers",
    "targets",
    "mesh",
    "partition",
    "rules",
    "batch",
    "state",
    "dependence",
    "loss",
    "layout",
    "stacklevel",
    "arguments",
    "step",
    "initialisers",
    "carries",
    "strategy",
    "sharded",
    "data_parallel",
]
ENGINES = {"sharded", "data_parallel"}
# The islands' modules, each importing only those before it and these of the core.
ISLANDS = ["island", "schedule", "sequence", "context", "splash", "expert", "stack", "pipeline", "pipeline_loss"]
UNDER_ISLANDS = {"integers", "targets", "mesh", "state", "loss"}
# What runs a step for real, each importing only those before it and these.
RUNNING = ["manifest", "saved_leaves", "saved_files", "failures", "agreement", "checkpoint", "preemption", "source"]
RUNNING += ["tokens", "work", "progress", "profiling", "watch", "lines", "fit"]
UNDER_RUNNING = {*CORE, "evaluation", "estimation.chips", "inspection.flops"} - ENGINES
# What reads a program's text knows nothing of steps.
READERS = [
    f"inspection.{name}" for name in ("hlo", "groups", "operands", "collectives", "flops", "partials", "declared")
]
READERS += [f"estimation.{name}" for name in ("chips", "links", "costs", "timeline")]


def tree_of(module):
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def type_checking_only(tree):
    """Returns the nodes under `if TYPE_CHECKING`: imports for the type checker, that never run."""
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {id(child) for node in guarded for child in ast.walk(node)}


def imports_of(module):
    """Returns the modules of this package that a module imports when it is loaded or run."""
    tree = tree_of(module)
    skipped = type_checking_only(tree)
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxpar":
            names |= {node.module.partition(".")[2]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("jaxpar.")}
    return {jaxpar._MODULE_OF.get(name, name) for name in names} & set(MODULES) - {module}


def test_the_public_names_are_these():
    assert sorted(jaxpar.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(jaxpar))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads_and_is_what_its_module_holds(name):
    value = getattr(jaxpar, name)
    assert value is getattr(jaxpar, name)
    module = jaxpar._MODULE_OF.get(name)
    if module:
        assert value is vars(importlib.import_module(f"jaxpar.{module}"))[name]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxpar' has no attribute 'shraded'"):
        jaxpar.shraded  # noqa: B018


def examples_of(value):
    """Returns how many lines of the docstrings of a function, or of a class and its methods, are examples that run."""
    holders = [value, *vars(value).values()] if inspect.isclass(value) else [value]
    return sum(len(doctest.DocTestParser().get_examples(inspect.getdoc(holder) or "")) for holder in holders)


# What a doctest of its own would add nothing to: plain values, errors, and what only its maker's example can show.
VALUES = {"AXES", "WHOLE", "EXPERT", "FSDP", "MEGATRON", "PIPELINE", "ZERO1"}
SHOWN_ELSEWHERE = VALUES | {
    "data",
    "rules",
    "schedule",
    "testing",
    "CheckpointWarning",
    "Estimate",
    "ExpertKernels",
    "MoELosses",
}
SHOWN_ELSEWHERE |= {name for name in PUBLIC if name.endswith("Error")}


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in VALUES])
def test_every_public_name_says_what_it_is(name):
    value = getattr(jaxpar, name)
    doc = inspect.getdoc(value) or ""
    assert doc.splitlines()[0].endswith((".", ":")) or doc.splitlines()[1], doc
    assert not doc.startswith(f"{name}("), "no docstring of its own"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in SHOWN_ELSEWHERE])
def test_every_public_function_and_value_has_an_example_that_runs(name):
    assert examples_of(getattr(jaxpar, name)) > 0


def test_imports_run_one_way():
    reached = {module: imports_of(module) for module in MODULES}

    def visit(module, above):
        assert module not in above, f"a cycle: {' -> '.join([*above, module])}"
        for other in reached[module]:
            visit(other, (*above, module))

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", CORE)
def test_a_module_of_the_core_imports_only_those_before_it(module):
    assert imports_of(module) <= set(CORE[: CORE.index(module)])


@pytest.mark.parametrize("module", ISLANDS)
def test_an_island_knows_nothing_of_steps(module):
    assert imports_of(module) <= UNDER_ISLANDS.union(ISLANDS[: ISLANDS.index(module)])


@pytest.mark.parametrize("module", READERS)
def test_a_reader_of_programs_imports_only_readers(module):
    assert imports_of(module) <= set(READERS)


@pytest.mark.parametrize("module", RUNNING)
def test_what_runs_for_real_imports_only_what_is_before_it(module):
    assert imports_of(module) <= UNDER_RUNNING.union(RUNNING[: RUNNING.index(module)])


@pytest.mark.parametrize("module", ["train", "evaluation", "strategy", "step", "loss", "layout"])
def test_the_builder_knows_no_engine(module):
    def reached(name):
        return {name}.union(*(reached(other) for other in imports_of(name)))

    assert not reached(module) & ENGINES


def says_pmap(module):
    return any(
        ast.unparse(node) == "jax.pmap" or (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("pmap"))
        for node in ast.walk(tree_of(module))
    )


def test_one_file_says_pmap():
    assert [module for module in MODULES if says_pmap(module)] == ["data_parallel"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_uses_jaxs_private_modules(path):
    imported = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [ast.unparse(node)]
            if isinstance(node, ast.Attribute)
            else []
        )
    ]
    assert not [name for name in imported if "jax._src" in name or name.startswith("jaxlib")]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_library_code_asserts_or_swallows(path):
    tree = ast.parse(path.read_text())
    # What users call in tests raises AssertionError by its nature, and says so with `raise`.
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    silent = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.body[-1]) == "pass")
    ]
    assert not silent


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_keep_to_their_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            # A run has two more things to choose than anything else has.
            limit = 10 if node.name == "fit" else 8
            assert len([name for name in names if name not in ("self", "cls")]) <= limit, node.name
            body = node.body[1:] if ast.get_docstring(node) else node.body
            # A closure's parts count for themselves: sharded() is a list of functions.
            inner = [child for child in ast.walk(node) if isinstance(child, ast.FunctionDef) and child is not node]
            if body and not inner:
                assert body[-1].end_lineno - body[0].lineno < 60, node.name


def run_python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_no_jax():
    heavy = ("jax", "flax", "optax", "numpy")
    code = f"import sys, jaxpar, jaxpar.pytest_plugin; print([name for name in {heavy} if name in sys.modules])"
    result = run_python("-c", code)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_a_function_keeps_its_name_beside_the_module_it_lives_in():
    code = (
        "import jaxpar.sharded, jaxpar.data_parallel, jaxpar.evaluation, jaxpar\n"
        "from jaxpar import sharded, data_parallel\n"
        "print(callable(jaxpar.sharded), callable(sharded), callable(data_parallel), callable(jaxpar.data_parallel))"
    )
    assert run_python("-c", code).stdout.strip() == "True True True True"


def test_names_of_axes_that_are_written_twice_are_alike():
    # Where importing them would start JAX, or leave the readers of programs.
    from jaxpar import __main__ as command
    from jaxpar.inspection import declared
    from jaxpar.mesh import BATCH_AXES

    assert (command._AXES, declared._BATCH_AXES) == (jaxpar.AXES, BATCH_AXES)


def test_the_package_is_typed_and_says_its_version():
    assert (PACKAGE / "py.typed").exists()
    parts = jaxpar.__version__.split(".")
    assert len(parts) == 3
    assert all(part.isdigit() for part in parts)


def names_of(requirements):
    """Returns the packages of a list of requirements by the names that they are imported by."""
    imported_as = {"orbax-checkpoint": "orbax"}
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
    return {imported_as.get(name, name) for name in names}


def outside_imports(name):
    """Returns the packages of others that a module imports, anywhere in it."""
    nodes = list(ast.walk(tree_of(name)))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - {"jaxpar"}


# The extra that brings what else a module imports, where it is asked for.
EXTRA_OF = {"data": "data", "train_report": "plot", "estimate_command": "plot", "pytest_plugin": "test"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_module_imports_is_declared(name):
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"][EXTRA_OF[name]] if name in EXTRA_OF else []
    assert outside_imports(name) <= names_of([*project["dependencies"], *extra])


def test_doctor_names_every_package_that_the_core_needs():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    needed = [re.match(r"[\w.-]+", requirement)[0] for requirement in project["dependencies"]]
    assert set(needed) == {"jax", *doctor._CORE}
