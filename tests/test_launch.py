"""Many processes: joined, launched and ended together; their checkpoints go on in any number of processes."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxpar import agreement, distributed, launch_command, preemption
from jaxpar.__main__ import main
from jaxpar.checkpoint import CheckpointError
from jaxpar.distributed import DistributedError, initialize
from jaxpar.fit import FitError

PROGRAM = pathlib.Path(__file__).parent / "fit_program.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1",), "num_processes, process_id is missing: give coordinator_address, num_processes, process_id"),
        (("here", 2, 0), "coordinator_address is 'here'; give a host and a port, as '10.0.0.1:1234'"),
        (("h:1", 0, 0), "num_processes is 0; give a whole number, 1 or more"),
        (("h:1", 2, 2), "process_id is 2; of 2 processes give a whole number from 0 to 1"),
        (("h:1", 2, True), "process_id is True; of 2 processes"),
    ],
)
def test_what_cannot_be_joined_is_named(arguments, message):
    with pytest.raises(DistributedError, match=message):
        initialize(*arguments)


def test_a_heartbeat_that_cannot_be_is_named():
    with pytest.raises(DistributedError, match=r"heartbeat_timeout_seconds is 0.5; give whole seconds, 1 or more"):
        initialize(heartbeat_timeout_seconds=0.5)


def test_launcher_and_launched_say_the_same_words():
    # The launcher imports no JAX, and so not the other's module.
    mine = [getattr(launch_command, f"_{name}") for name in ("ADDRESS", "COUNT", "INDEX", "LAUNCHER")]
    assert mine == [distributed.ADDRESS, distributed.COUNT, distributed.INDEX, distributed.LAUNCHER]
    assert launch_command._ASKED == preemption.CODE


def test_one_process_is_alone():
    assert initialize() == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2"], "There is nothing to launch; give a program after --"),
        (["-n", "2", "--", "no-such-program"], "'no-such-program' is no program that can be run"),
        (["-n", "0", "--", "true"], "a whole number, from 1 to 1024, is needed"),
    ],
)
def test_what_cannot_be_launched_is_named(arguments, message, capsys):
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_output_is_prefixed_and_the_first_bad_end_ends_all(capfd):
    code = "import os, sys, time; i = os.environ['JAXPAR_PROCESS']; print('hello', i); time.sleep(60 * int(i))"
    code += "; sys.exit(3)"
    began = time.monotonic()
    assert main(["launch", "-n", "3", "--", sys.executable, "-c", code]) == 3
    assert time.monotonic() - began < 15
    out, err = capfd.readouterr()
    assert "[0] hello 0" in out
    assert "jaxpar: process 0 ended with code 3; the others are ended too" in err
    told = "jaxpar: process 0 ended with code 3, and all with it; what it said is above. Run the same command again"
    assert err.splitlines()[-1].startswith(told)


def test_output_of_any_kind_and_what_is_left_running_hold_nobody_up(capfd):
    began = time.monotonic()
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\xfe no text')"
    assert main(["launch", "-n", "1", "--", "sh", "-c", f'{sys.executable} -c "{code}"; sleep 30 & exit 0']) == 0
    assert time.monotonic() - began < 15
    assert "no text" in capfd.readouterr().out


def test_one_of_several_that_cannot_join_does_not_run_alone(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(DistributedError, match="This process is one of several, but could not join the others"):
        initialize()


def test_one_that_gets_no_answer_is_told_what_to_look_at(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    message = "Process 1 of 2 could not join at 10.0.0.1:1234: DEADLINE_EXCEEDED.* Do all of them run, with the same"
    with pytest.raises(DistributedError, match=message):
        initialize("10.0.0.1:1234", 2, 1)


def test_joining_twice_is_named(monkeypatch):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with pytest.raises(DistributedError, match=r"joined already; call jaxpar\.initialize once"):
        initialize("10.0.0.1:1234", 2, 1)


def test_of_many_processes_those_that_could_save_are_told_that_another_cannot(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda own: np.array([own, True]))
    with pytest.raises(CheckpointError, match=r"Process 1 can't save, so none of 2 does\. See that process's own"):
        agreement.all_ready(lambda: None)


def test_of_many_processes_the_others_are_told_that_the_first_found_none(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", lambda own: np.int32(-1))
    with pytest.raises(
        CheckpointError, match="The first process found no checkpoint to restore, and says why; do what it says"
    ):
        agreement.agree(lambda: 3)


def test_half_an_environment_is_named(monkeypatch):
    monkeypatch.setenv("JAXPAR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        DistributedError, match="JAXPAR_ADDRESS is set, but JAXPAR_PROCESSES is '' and JAXPAR_PROCESS is ''; set all"
    ):
        initialize()


def test_all_ending_well_is_well(capfd):
    assert main(["launch", "-n", "2", "--", sys.executable, "-c", "print('well')"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] well", "[1] well"]


# real processes


@contextlib.contextmanager
def launched(count, folder, *more):
    command = [
        sys.executable,
        "-m",
        "jaxpar",
        "launch",
        "-n",
        str(count),
        "--",
        sys.executable,
        str(PROGRAM),
        str(folder),
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *map(str, more)], env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def finish(count, folder, *more):
    with launched(count, folder, *more) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out[-1000:] + err[-2000:]


def wait_for(process, line):
    for told in process.stdout:
        if told.strip() == line:
            return
    pytest.fail(f"no {line}: {process.stderr.read()[-2000:]}")


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
def test_each_process_sets_back_its_own_iterator(tmp_path):
    finish(2, tmp_path, 7, "fsdp=4", 0, "stateful")
    finish(2, tmp_path, 12, "fsdp=4", 0, "stateful")
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(2, whole, 12, "fsdp=4")
    assert log_of(tmp_path) == log_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=4", "fsdp=4"])
def test_one_two_and_four_processes_train_bit_for_bit_alike(tmp_path, axes):
    # One that isn't launched adds in XLA's own order: see test_processes.py.
    logs = []
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        finish(count, folder, 30, axes)
        logs.append(log_of(folder))
    assert len(logs[0]) == 30
    assert logs[1] == logs[0]
    assert logs[2] == logs[0]


@pytest.mark.slow
def test_a_run_in_four_processes_goes_on_in_one_and_in_two(tmp_path):
    for name in ("moved", "whole"):
        (tmp_path / name).mkdir()
    finish(4, tmp_path / "moved", 6, "fsdp=4")
    finish(1, tmp_path / "moved", 12, "fsdp=2,model=2")
    finish(2, tmp_path / "moved", 18, "fsdp=4")
    finish(1, tmp_path / "whole", 18, "fsdp=4")
    moved, whole = log_of(tmp_path / "moved"), log_of(tmp_path / "whole")
    assert [number for number, _ in moved] == list(range(1, 19))
    assert [loss for _, loss in moved] == pytest.approx([loss for _, loss in whole], rel=1e-5)


@pytest.mark.slow
def test_several_that_are_asked_to_end_save_the_same_step_and_go_on(tmp_path):
    with launched(2, tmp_path, 30, "fsdp=4", 0.1) as process:
        wait_for(process, "[0] 8")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(60)
        assert time.monotonic() - began < 20
    assert code == 143, process.stderr.read()[-2000:]
    finish(2, tmp_path, 30, "fsdp=4")
    assert [number for number, _ in log_of(tmp_path)] == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            "ends",
            "FitError: Process 1 of 2 has no batch after step 7, but steps=30: all stop. Give each process as many",
        ),
        ("fails", "has no batch after step 7, .* Here they failed, with OSError: the disk is gone. Give each"),
    ],
)
def test_batches_that_end_in_one_process_are_named_in_all_and_the_state_is_saved(tmp_path, when, message):
    with launched(2, tmp_path, 30, "fsdp=4", 0.0, when) as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 1, out[-1000:] + err[-2000:]
    named = re.findall(r"^\[(\d)\] .*Process 1 of 2 has no batch", out, re.MULTILINE)
    assert sorted(set(named)) == ["0", "1"], out[-3000:]
    assert re.search(message, out)
    assert [number for number, _ in log_of(tmp_path)] == list(range(1, 8))
    # The next run goes on with what was saved.
    finish(1, tmp_path, 9, "fsdp=4")
    assert [number for number, _ in log_of(tmp_path)] == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["compiling", "evaluating"])
def test_several_that_compile_or_evaluate_note_it_and_save_the_next_step(tmp_path, when):
    # A run that goes on, whose steps don't begin at 1.
    finish(2, tmp_path, 7, "fsdp=4")
    with launched(2, tmp_path, 10**6, "fsdp=4", 4, when) as process:
        wait_for(process, f"[0] {when}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, process.stderr.read()[-2000:]
    reached = [number for number, _ in log_of(tmp_path)]
    # Two steps at most: the one that they are at, and one that all agree on.
    assert reached[-1] <= {"compiling": 9, "evaluating": 12}[when]
    finish(2, tmp_path, 15, "fsdp=4")
    assert [number for number, _ in log_of(tmp_path)] == list(range(1, 16))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["compiling", "evaluating", "stepping"])
def test_a_second_sigterm_ends_several_at_once(tmp_path, when):
    with launched(2, tmp_path, 30, "fsdp=4", 60, when if when != "stepping" else "") as process:
        wait_for(process, f"[0] {when}" if when != "stepping" else "[0] 1")
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(30) == 143, process.stderr.read()[-2000:]
        assert time.monotonic() - began < 5


def test_one_that_was_asked_to_end_and_did_leaves_the_others_time_to_save(capfd, tmp_path):
    code = "import os, sys, time, pathlib; i = int(os.environ['JAXPAR_PROCESS']); time.sleep(2 * i)"
    code += f"; pathlib.Path({str(tmp_path)!r}, str(i)).touch(); sys.exit(143)"
    assert main(["launch", "-n", "2", "--", sys.executable, "-c", code]) == 143
    assert (tmp_path / "1").exists()


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing_behind(tmp_path):
    with launched(2, tmp_path, 10**6, "fsdp=4", 0.1) as process:
        wait_for(process, "[0] 3")
        process.kill()
        process.wait(30)
    # Their command tells the folder.
    left = lambda: subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout.split()
    end = time.monotonic() + 15
    while left() and time.monotonic() < end:
        time.sleep(0.1)
    assert not left()


@pytest.mark.parametrize(
    ("error", "processes", "is_noted"),
    [
        (jax.errors.JaxRuntimeError("Connection closed by peer"), 2, True),
        (ValueError("UNKNOWN: Gloo AllGather failed"), 2, True),
        (jax.errors.JaxRuntimeError("out of memory"), 1, False),
        (FitError("The loss is nan"), 2, False),
    ],
)
def test_an_error_in_one_of_many_says_where_to_look_and_what_to_do(monkeypatch, error, processes, is_noted):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(type(error)) as raised, agreement.noting_others():
        raise error
    note = "This is process 0 of 2. If its connection was closed, another one has died, and says why in its own output"
    assert [text.startswith(note) for text in getattr(raised.value, "__notes__", [])] == [True] * is_noted


@pytest.mark.slow
def test_a_peer_that_hangs_ends_the_others(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    env |= {"JAXPAR_ADDRESS": address, "JAXPAR_PROCESSES": "2"}
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(2):
            log = stack.enter_context((tmp_path / f"{index}.txt").open("w"))
            command = [sys.executable, str(PROGRAM), str(tmp_path), "1000", "fsdp=4", "0.1", "", "10"]
            each = subprocess.Popen(command, env={**env, "JAXPAR_PROCESS": str(index)}, stdout=log, stderr=log)
            stack.callback(each.wait)
            stack.callback(each.kill)
            processes.append(each)
        end = time.monotonic() + 60
        while "\n6\n" not in (tmp_path / "0.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        # As one that is dead, but that its connection stays open.
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert processes[0].wait(60) != 0
        # The heartbeat, and ten seconds.
        assert time.monotonic() - began < 20
    assert re.search(r"process 1|task[:/ ]*1|another|peer|Connection|heartbeat", (tmp_path / "0.txt").read_text())
