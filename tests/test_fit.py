"""`fit`: what it runs, tells, saves and resumes; a run that is killed goes on as if it had not been."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from models import sub_mesh
from rich.console import Console

import jaxpar
from jaxpar import Profile, lines
from jaxpar.checkpoint import CheckpointError, CheckpointWarning
from jaxpar.fit import FitError
from jaxpar.progress import show_steps
from jaxpar.work import Meter, Work, peak_flops

PROGRAM = pathlib.Path(__file__).parent / "fit_program.py"


def init_fn(rng):
    return jaxpar.TrainState.create(nnx.Linear(4, 4, rngs=nnx.Rngs(rng)), optax.adam(1e-2))


def loss_fn(model, batch, rng):
    return ((model(batch["x"]) - batch["x"]) ** 2).mean(-1), {}


def draw(step):
    return {"x": np.random.default_rng(step).normal(size=(8, 4)).astype("f4")}


def batches(step):
    return map(draw, itertools.count(step))


@pytest.fixture(scope="module")
def step():
    mesh = sub_mesh(fsdp=min(4, len(jax.devices())))
    return jaxpar.make_train_step(loss_fn, jaxpar.sharded(mesh, jaxpar.fsdp(min_size=1)))


def start(step):
    return step.strategy.init(init_fn, jax.random.key(0))


def by_hand(step, count):
    state, losses = start(step), {}
    for number in range(count):
        state, metrics = step(state, step.strategy.shard_batch(draw(number)))
        losses[number + 1] = float(metrics["loss"])
    return state, losses


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state, state.step))]


def test_it_runs_what_four_lines_would_and_tells_each_step_in_floats(step):
    told = {}
    state = jaxpar.fit(
        step, start(step), batches, steps=7, on_step=lambda number, metrics: told.update({number: metrics})
    )
    expected, losses = by_hand(step, 7)
    assert bits(state) == bits(expected)
    assert {number: metrics["loss"] for number, metrics in told.items()} == losses
    assert all(isinstance(value, float) for metrics in told.values() for value in metrics.values())


@pytest.mark.parametrize("kind", ["function", "list", "iterator with a state"])
def test_a_run_in_two_parts_is_one_run_bit_for_bit(step, tmp_path, kind):
    drawn = []

    class Stateful:
        def __init__(self):
            self.number = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.number += 1
            drawn.append(self.number)
            return draw(self.number - 1)

        def get_state(self):
            return json.dumps(self.number).encode()

        def set_state(self, state):
            self.number = json.loads(state)

    make = {
        "function": lambda: batches,
        "list": lambda: [draw(n) for n in range(20)],
        "iterator with a state": Stateful,
    }[kind]
    told = []
    for steps in (5, 8, 12):
        with jaxpar.Checkpoints(tmp_path, every=3) as checkpoints:
            state = jaxpar.fit(
                step,
                start(step),
                make(),
                steps=steps,
                checkpoint=checkpoints,
                on_step=lambda number, metrics: told.append((number, metrics["loss"])),
            )
    expected, losses = by_hand(step, 12)
    assert bits(state) == bits(expected)
    assert told == list(losses.items())
    # What has a state is set back, where others are drawn from the beginning.
    assert not drawn or drawn == sorted(set(drawn))


def test_a_loss_that_is_no_number_where_the_batches_end_is_told_with_their_end(step, tmp_path):
    spoiled = [*(draw(number) for number in range(3)), jax.tree.map(lambda leaf: leaf * np.nan, draw(3))]
    with (
        jaxpar.Checkpoints(tmp_path, every=2) as checkpoints,
        pytest.raises(FitError, match=r"Step 4 gave loss nan.* The batches ended after step 4, but steps=9"),
    ):
        jaxpar.fit(step, start(step), spoiled, steps=9, checkpoint=checkpoints, nonfinite="roll back")


def test_a_run_goes_on_under_another_layout_within_rounding(step, tmp_path):
    with jaxpar.Checkpoints(tmp_path, every=4) as checkpoints:
        jaxpar.fit(step, start(step), batches, steps=4, checkpoint=checkpoints)
    other = jaxpar.make_train_step(loss_fn, jaxpar.data_parallel(jax.devices()[:2]))
    told = {}
    with jaxpar.Checkpoints(tmp_path, every=4) as checkpoints:
        state = other.strategy.init(init_fn, jax.random.key(9))
        tell = lambda number, metrics: told.update({number: metrics["loss"]})
        jaxpar.fit(other, state, batches, steps=8, checkpoint=checkpoints, on_step=tell)
    losses = by_hand(step, 8)[1]
    assert told == pytest.approx({number: losses[number] for number in (5, 6, 7, 8)}, rel=1e-5)


def test_it_evaluates_at_each_save_and_at_the_end(step, tmp_path):
    eval_step = jaxpar.make_eval_step(loss_fn, step.strategy)
    told = []
    with jaxpar.Checkpoints(tmp_path, every=2) as checkpoints:
        jaxpar.fit(
            step,
            start(step),
            batches,
            steps=5,
            checkpoint=checkpoints,
            eval_step=(eval_step, [draw(100), draw(101)]),
            on_step=lambda number, metrics: told.append((number, sorted(metrics))),
        )
    evaluated = [number for number, names in told if names[0].startswith("eval")]
    assert evaluated == [2, 4, 5]
    assert [number for number, names in told if "loss" in names] == [1, 2, 3, 4, 5]


def spoil(at):
    """Batches of which one makes the loss no number."""
    return lambda step: ({"x": draw(number)["x"] * (np.nan if number == at else 1)} for number in itertools.count(step))


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(step, tmp_path):
    with jaxpar.Checkpoints(tmp_path, every=2) as checkpoints:
        with pytest.raises(FitError, match=r"Step 4 gave loss nan.*optax.apply_if_finite.*nonfinite='roll back'"):
            jaxpar.fit(step, start(step), spoil(3), steps=9, checkpoint=checkpoints)
        assert checkpoints.steps == [2]


def test_a_run_goes_back_and_on_with_the_batches_that_follow(step, tmp_path):
    told = []
    tell = lambda number, metrics: told.append((number, bool(np.isfinite(metrics["loss"]))))
    with (
        jaxpar.Checkpoints(tmp_path, every=2) as checkpoints,
        pytest.warns(CheckpointWarning, match="goes on from step 2"),
    ):
        state = jaxpar.fit(
            step, start(step), spoil(2), steps=5, checkpoint=checkpoints, on_step=tell, nonfinite="roll back"
        )
    assert int(state.step) == 5
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params))
    assert [number for number, is_number in told if not is_number] == [3]
    assert told[-1] == (5, True)


@pytest.mark.parametrize("nonfinite", ["stop", "roll back"])
def test_a_run_goes_on_where_the_optimizer_skips_such_steps_and_ends_where_it_no_longer_does(tmp_path, nonfinite):
    init = lambda rng: jaxpar.TrainState.create(
        nnx.Linear(4, 4, rngs=nnx.Rngs(rng)), optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=1)
    )
    step = jaxpar.make_train_step(loss_fn, jaxpar.sharded(sub_mesh(data=2)))
    begin = lambda: step.strategy.init(init, jax.random.key(0))
    with jaxpar.Checkpoints(tmp_path / "one", every=1) as checkpoints:
        state = jaxpar.fit(step, begin(), spoil(2), steps=5, checkpoint=checkpoints, nonfinite=nonfinite)
    assert (int(state.step), int(state.opt_state.total_notfinite)) == (5, 1)
    assert np.isfinite(np.asarray(state.params["kernel"])).all()
    always = lambda step: ({"x": draw(0)["x"] * np.nan} for _ in itertools.count())
    with pytest.raises(FitError, match="gave loss nan"):
        jaxpar.fit(step, begin(), always, steps=9)


def test_a_run_goes_on_where_float16_overflows():
    strategy = jaxpar.sharded(sub_mesh(data=2))
    scale = lambda: DynamicScale(growth_interval=10**6, scale=jnp.float32(2.0**30))
    init = lambda rng: jaxpar.TrainState.create(
        nnx.Linear(4, 4, rngs=nnx.Rngs(rng)), optax.sgd(0.1), dynamic_scale=scale()
    )
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.float16)
    skipped = []
    batches = lambda step: ({"x": draw(number)["x"].astype("f2")} for number in itertools.count(step))
    tell = lambda number, metrics: skipped.append(metrics["skipped"])
    state = jaxpar.fit(step, strategy.init(init, jax.random.key(0)), batches, steps=40, on_step=tell)
    assert int(state.step) == 40
    assert skipped[0] == 1
    assert skipped[-1] == 0


def test_a_save_that_fails_is_told_and_the_run_goes_on(step, tmp_path, monkeypatch):
    checkpoints = jaxpar.Checkpoints(tmp_path / "gone", every=1)
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("a file")
    # It vanishes after the run has begun.
    monkeypatch.setattr(jaxpar.Checkpoints, "steps", [])
    with pytest.warns(CheckpointWarning, match=r"can't be .* The run goes on; the checkpoints before are as they were"):
        state = jaxpar.fit(step, start(step), batches, steps=2, checkpoint=checkpoints)
    assert int(state.step) == 2


def test_batches_that_end_too_early_are_named_and_the_state_is_saved(step, tmp_path):
    with jaxpar.Checkpoints(tmp_path, every=100) as checkpoints:
        with pytest.raises(FitError, match=r"The batches ended after step 3, but steps=9"):
            jaxpar.fit(step, start(step), [draw(n) for n in range(3)], steps=9, checkpoint=checkpoints)
        checkpoints.wait()
        assert checkpoints.steps == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_step": loss_fn}, "train_step is a function; give what jaxpar.make_train_step returns"),
        ({"state": {"w": jnp.ones(3)}}, "state is a dict; give a TrainState on devices"),
        ({"steps": -1}, "steps is -1; give a whole number, 0 or more"),
        ({"steps": 2.0}, r"steps is 2\.0; give a whole number"),
        ({"eval_step": loss_fn}, "eval_step is a function; give a tuple"),
        ({"checkpoint": "folder"}, "checkpoint is a str; give jaxpar.Checkpoints"),
        ({"nonfinite": "skip"}, "nonfinite is 'skip'; give 'stop' or 'roll back'"),
        ({"on_step": True}, r"on_step is True; give a function on_step\(step, metrics\)"),
        ({"batches": {"x": 1}}, r"batches is a dict; give an iterable of batches, as \[batch\]"),
        ({"nonfinite": "roll back"}, "nonfinite is 'roll back', but there is nothing to go back to; give checkpoint="),
        ({"profile": ("run", 1, 1)}, r"profile is \('run', 1, 1\); give jaxpar.Profile\(directory, first, last\)"),
        (
            {"profile": Profile("run", 3, 2)},
            "profile is of the steps 3 to 2, but the run's are 1 to 1; give two of these",
        ),
        ({"profile": Profile("run", 1, 2)}, "profile is of the steps 1 to 2, but the run's are 1 to 1"),
        ({"profile": Profile("run", 0, 1)}, "profile is of the steps 0 to 1, but"),
        ({"profile": Profile("run", True, 1)}, "profile is of the steps True to 1, but"),
        ({"profile": Profile(f"{__file__}/run", 1, 1)}, "The profile's folder .* can't be made: .*Not a directory"),
        ({"estimate": 0.0}, r"estimate is 0\.0; give a step's seconds, above 0, or what jaxpar.estimate returned"),
        ({"estimate": "1 ms"}, "estimate is '1 ms'; give a step's seconds"),
    ],
)
def test_bad_arguments_are_named(step, changes, message):
    given = {"train_step": step, "state": None, "batches": batches, "steps": 1}
    given["state"] = start(step) if "state" not in changes else None
    given = {**given, **changes}
    with pytest.raises(FitError, match=message):
        jaxpar.fit(given.pop("train_step"), given.pop("state"), given.pop("batches"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_step": lambda metrics: None}, r"on_step takes \(metrics\), but is called as on_step\(step, metrics\)"),
        (
            {"batches": lambda: iter([])},
            r"batches takes \(\), but is called as batches\(step\); give a function batches",
        ),
    ],
)
def test_functions_of_other_arguments_are_named_before_any_step(step, changes, message):
    given = {"batches": batches, **changes}
    with pytest.raises(FitError, match=message):
        jaxpar.fit(step, start(step), given.pop("batches"), steps=1, **given)


def test_the_batches_of_an_evaluation_can_be_gone_through_again(step):
    eval_step = jaxpar.make_eval_step(loss_fn, step.strategy)
    with pytest.raises(FitError, match="are an iterator, which is empty after one evaluation; give a list"):
        jaxpar.fit(step, start(step), batches, steps=1, eval_step=(eval_step, iter([draw(0)])))


def test_going_back_from_the_last_step_draws_another_batch_and_ends(step, tmp_path):
    with (
        jaxpar.Checkpoints(tmp_path, every=1) as checkpoints,
        pytest.warns(CheckpointWarning, match="goes on from step 4"),
    ):
        state = jaxpar.fit(step, start(step), spoil(4), steps=5, checkpoint=checkpoints, nonfinite="roll back")
    assert int(state.step) == 5
    assert np.isfinite(np.asarray(state.params["kernel"])).all()


@pytest.mark.filterwarnings("ignore:Step")
def test_a_run_that_always_fails_does_not_go_back_for_ever(step, tmp_path):
    always = lambda number: ({"x": draw(n)["x"] * (np.nan if n > 1 else 1)} for n in itertools.count(number))
    goes_on_no_more = pytest.raises(FitError, match="went back to step 2 3 times: other batches don't help")
    with jaxpar.Checkpoints(tmp_path, every=2) as checkpoints, goes_on_no_more:
        jaxpar.fit(step, start(step), always, steps=9, checkpoint=checkpoints, nonfinite="roll back")


def test_a_state_that_is_no_number_is_not_saved_when_batches_end(step, tmp_path):
    with jaxpar.Checkpoints(tmp_path, every=100) as checkpoints:
        bad = [draw(0), draw(1), {"x": draw(2)["x"] * np.nan}]
        with pytest.raises(FitError, match="Step 3 gave loss nan"):
            jaxpar.fit(step, start(step), bad, steps=9, checkpoint=checkpoints)
        assert checkpoints.steps == []


def test_a_run_goes_on_without_a_checkpoint_too(step):
    state = jaxpar.fit(step, start(step), batches, steps=3)
    state = jaxpar.fit(step, state, batches, steps=6)
    assert bits(state) == bits(by_hand(step, 6)[0])


class SetBack:
    """Batches that can be set back to a place of their own kind alone."""

    def __iter__(self):
        return self

    def __next__(self):
        return draw(0)

    def get_state(self):
        return {"at": 3}

    def set_state(self, state):
        assert state["at"] == 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"drawn": -5}, r"The checkpoint's data is \{'drawn': -5\}, but fit goes on from a place in the batches"),
        ({"drawn": True}, "data is .*True"),
        ({"drawn": 2.0}, "data is .*2.0"),
        ({"drawn": 2**31}, "data is .*2147483648"),
        ({"drawn": 2, "iterators": {}}, "data is .*iterators"),
        ({"epoch": 3}, "data is .*epoch.*restore the state yourself, and give fit another folder"),
        ([2], r"data is \[2\]"),
        ({"drawn": 2, "iterators": [{"index": 7}]}, "set_state can't take what .* of them: KeyError: 'at'. Give the"),
        ({"drawn": 2, "iterators": [{"bytes": "no hex"}]}, "set_state can't take what .* of them: ValueError"),
    ],
)
def test_a_place_that_is_not_of_these_batches_is_named(step, tmp_path, place, message):
    with jaxpar.Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(start(step), data=place)
        # What isn't finished isn't resumed.
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=message):
            jaxpar.fit(step, start(step), SetBack(), steps=3, checkpoint=checkpoints)


def test_a_state_beyond_its_folder_is_not_thrown_away(step, tmp_path):
    with jaxpar.Checkpoints(tmp_path, every=2) as checkpoints:
        jaxpar.fit(step, start(step), batches, steps=2, checkpoint=checkpoints)
        state = by_hand(step, 4)[0]
        with pytest.raises(FitError, match=r"The state is at step 4, but .* ends at 2: it would be lost"):
            jaxpar.fit(step, state, batches, steps=9, checkpoint=checkpoints)


# what is seen of a run


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_live_line_tells_step_loss_speed_and_what_was_estimated(step, terminal, capsys):
    told = []
    tell = lambda number, metrics: told.append(metrics["loss"])
    jaxpar.fit(step, start(step), batches, steps=7, on_step=tell, estimate=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    last = plain(err).rstrip().splitlines()[-1]
    # Where the chip is known its use stands there as well.
    told_last = rf"7/7 loss {told[-1]:.4g}\s+[\d,]+ rows/s  [\d.]+ m?s \(estimated 500 ms\)(  MFU \S+)? \d:\d\d:\d\d"
    assert re.search(told_last, last), last
    assert len(told) == 7


def test_what_an_evaluation_gave_stays_on_the_line(step, terminal, capsys):
    eval_step = jaxpar.make_eval_step(loss_fn, step.strategy)
    jaxpar.fit(step, start(step), batches, steps=3, eval_step=(eval_step, [draw(100)]))
    assert re.search(r"3/3 loss [\d.]+  eval/loss [\d.]+ ", plain(capsys.readouterr().err))


def test_where_errors_go_to_no_terminal_there_is_no_line(step, capsys):
    jaxpar.fit(step, start(step), batches, steps=2)
    assert capsys.readouterr() == ("", "")


def test_where_errors_go_to_no_terminal_a_plain_line_a_minute_tells_how_it_goes(step, capsys, monkeypatch):
    clock = itertools.count(0, 25)
    monkeypatch.setattr(lines, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    jaxpar.fit(step, start(step), batches, steps=7)
    out, err = capsys.readouterr()
    assert out == ""
    # At 0 s it begins, and each step takes 25.
    told = [re.sub(r"loss [\d.]+", "loss x", line) for line in err.splitlines()]
    assert told == ["step 3 of 7  loss x", "step 6 of 7  loss x  2.5e+04 ms a step"]


def test_one_line_tells_where_a_run_goes_on_unless_a_logger_of_the_users_own_can(step, tmp_path, capsys):
    for steps, on_step, told in (
        (2, None, ""),
        (3, None, f"resumed from step 2 of {tmp_path}\n"),
        (4, lambda number, metrics: None, ""),
    ):
        with jaxpar.Checkpoints(tmp_path) as checkpoints:
            jaxpar.fit(step, start(step), batches, steps=steps, checkpoint=checkpoints, on_step=on_step)
        assert capsys.readouterr() == ("", told)


def test_a_logger_of_the_users_own_leaves_no_other_lines(step, capsys, monkeypatch):
    monkeypatch.setattr(lines, "_SECONDS", 0)
    jaxpar.fit(step, start(step), batches, steps=2, on_step=lambda number, metrics: None)
    assert capsys.readouterr() == ("", "")


def test_a_chip_that_is_known_has_its_mfu_on_the_line():
    console = Console(force_terminal=True, file=io.StringIO(), width=150)
    with show_steps(9, None, console) as show:
        for number in range(1, 4):
            show(number, {"loss": 2.0}, Work(512, "tokens", 1e-3))
            time.sleep(0.02)
    speed, ms, mfu = re.search(
        r"([\d,]+) tokens/s  ([\d.]+) ms  MFU ([\d.]+)%", plain(console.file.getvalue())
    ).groups()
    assert float(speed.replace(",", "")) == pytest.approx(512e3 / float(ms), rel=0.02)
    assert float(mfu) == pytest.approx(100 / float(ms), rel=0.02)


def test_a_steps_time_on_the_line_is_that_of_steps_and_not_of_what_lies_between_them():
    console = Console(force_terminal=True, file=io.StringIO(), width=150)
    with show_steps(9, None, console) as show:
        for number in range(1, 9):
            show(number, {"loss": 2.0}, Work(512, "tokens"))
            # The first steps compile, others wait for a save or an evaluation; the last one's save follows it.
            time.sleep(0.4 if number in (1, 5, 8) else 0.02)
    assert 20 <= float(re.findall(r"tokens/s  ([\d.]+) ms", plain(console.file.getvalue()))[-1]) < 100


@pytest.mark.parametrize(
    ("kinds", "peak"),
    [
        (["cpu"], None),
        (["TPU v5 lite"] * 2, 394e12),
        (["TPU v6 lite"], 918e12),
        (["TPU v9"], None),
        (["NVIDIA H200"] * 2, 1978e12),
    ],
)
def test_the_peak_is_that_of_all_chips_if_they_are_known(kinds, peak):
    assert peak_flops([types.SimpleNamespace(device_kind=kind) for kind in kinds]) == peak


def test_a_steps_work_is_counted_over_all_devices_under_every_strategy(monkeypatch):
    monkeypatch.setattr("jaxpar.work.peak_flops", lambda devices: 1e6)
    loss = lambda model, batch, rng: ((model(batch["x"].astype(jnp.float32)) ** 2).mean(-1), {})
    batch = {"x": np.ones((8, 4), "i4")}
    found = set()
    for strategy in (jaxpar.sharded(sub_mesh(data=4)), jaxpar.data_parallel(jax.devices()[:4])):
        step = jaxpar.make_train_step(loss, strategy)
        found.add(Meter(step).measure(start(step), strategy.shard_batch(batch)))
    # Forward, and the gradient of the weights: 2 x 2 x 8 x 4 x 4 operations, at a million a second.
    assert found == {Work(32, "tokens", 512e-6)}


def traced(folder):
    """The steps that a trace holds."""
    [path] = folder.rglob("*.xplane.pb")
    # What is read lives in it. On jax 0.12 its types warn, and an error in their place would abort the process.
    data = jax.profiler.ProfileData.from_file(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


def test_a_profile_holds_just_the_steps_that_are_asked_for(step, tmp_path):
    jaxpar.fit(step, start(step), batches, steps=8, profile=Profile(tmp_path / "new", 4, 6))
    assert traced(tmp_path / "new") == [4, 5, 6]


def test_a_run_that_goes_on_traces_what_is_left(step, tmp_path):
    state = jaxpar.fit(step, start(step), batches, steps=3)
    state = jaxpar.fit(step, state, batches, steps=5, profile=Profile(tmp_path / "left", 2, 4))
    assert traced(tmp_path / "left") == [4]
    jaxpar.fit(step, state, batches, steps=7, profile=Profile(tmp_path / "none", 2, 4))
    assert list((tmp_path / "none").iterdir()) == []


def test_a_profile_is_written_when_its_run_ends_early(step, tmp_path):
    with pytest.raises(FitError, match="The batches ended after step 3"):
        jaxpar.fit(step, start(step), [draw(n) for n in range(3)], steps=9, profile=Profile(tmp_path, 2, 8))
    assert traced(tmp_path) == [2, 3]


# runs that are killed


@contextlib.contextmanager
def running(folder, steps, *more):
    """A run as a process of its own, which is ended."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    command = [sys.executable, str(PROGRAM), str(folder), str(steps), *map(str, more)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(folder, steps, *more):
    """Runs it to its end."""
    with running(folder, steps, *more) as process:
        out, err = process.communicate(timeout=120)
    assert f"done {steps} True" in out, err[-2000:]


def wait_for(process, line):
    for told in process.stdout:
        if told.strip() == str(line):
            return
    pytest.fail(f"no {line}: {process.stderr.read()[-2000:]}")


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, 30)
    return dict(log_of(folder))


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 11, 17])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, whole, at):
    with running(tmp_path, 30, "fsdp=4", 0.05) as process:
        wait_for(process, at)
    finish(tmp_path, 30)
    rows = log_of(tmp_path)
    assert {number for number, _ in rows} == set(range(1, 31))
    assert all(loss == whole[number] for number, loss in rows)
    # Nothing is done twice but since the last checkpoint that was finished: one may have been on its way.
    assert len(rows) <= 30 + 11


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_ends_at_once(tmp_path, whole):
    with running(tmp_path, 30, "fsdp=4", 0.05) as process:
        wait_for(process, 8)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(30) == 143, process.stderr.read()[-2000:]
        assert time.monotonic() - began < 10
    finish(tmp_path, 30)
    rows = log_of(tmp_path)
    # No step is done twice.
    assert [number for number, _ in rows] == list(range(1, 31))
    assert dict(rows) == whole


@pytest.mark.slow
def test_a_run_that_compiles_ends_at_once_since_nothing_is_lost(tmp_path):
    with running(tmp_path, 30, "fsdp=4", 60, "compiling") as process:
        wait_for(process, "compiling")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(30) == 143
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_run_that_evaluates_ends_at_once_since_its_step_is_saved(tmp_path, whole):
    with running(tmp_path, 30, "fsdp=4", 60, "evaluating") as process:
        wait_for(process, "evaluating")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(30) == 143
        assert time.monotonic() - began < 5
    finish(tmp_path, 30)
    rows = log_of(tmp_path)
    assert [number for number, _ in rows] == list(range(1, 31))
    assert dict(rows) == whole


@pytest.mark.slow
def test_a_second_sigterm_ends_it_whatever_it_does(tmp_path):
    with running(tmp_path, 30, "fsdp=4", 60) as process:
        wait_for(process, 1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (-signal.SIGTERM, 143)
