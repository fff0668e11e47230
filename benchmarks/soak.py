"""A run that is killed again and again: what it loses, and whether its losses are those of a run that nothing ended.

    python benchmarks/soak.py [--kills 50] [--processes 1,2,4] [--seed 0] [--heartbeat 10]

The kills come at random moments, while the run starts, restores, compiles, steps or saves, by SIGKILL, SIGTERM or
SIGSTOP, to the launcher or to one of its processes. It prints a line for each, and asks of each:

- steps done after the last finished checkpoint, one every five steps and written while the steps go on, are two
  intervals at most: one that was being written, and one since. After a SIGTERM they are none;
- every finished checkpoint has the digests that it had when it was saved;
- all processes are gone in time: others than a stopped one within the heartbeat and ten seconds.

After them each run goes on to its end, and every loss that was told must be, bit for bit, that of a run in as many
processes which nothing ended.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxpar.manifest import NAME, ManifestError, check_manifest

PROGRAM = pathlib.Path(__file__).parent.parent / "tests" / "fit_program.py"
EVERY = 5
PHASES = ("start", "restore", "compile", "step", "save")
# Of ten kills: most of them where there is something to lose.
SHARES = (1, 2, 2, 3, 2)
# The launcher gives those that are left ten seconds; Python and gloo take some on a busy machine.
GRACE = 20


class Kill(NamedTuple):
    """One kill, and what came of it: `seconds` until those not stopped had ended, `limit` what they may take."""

    phase: str
    sent: str
    to: str
    reached: int
    lost: int
    damaged: int
    seconds: float
    limit: float

    def faults(self) -> list[str]:
        """Returns what went wrong."""
        allowed = 0 if self.sent == "SIGTERM" else 2 * EVERY
        found = {
            f"{self.lost} steps lost of {allowed} allowed": self.lost > allowed,
            f"{self.damaged} checkpoints damaged": self.damaged > 0,
            f"ended after {self.seconds:.0f} s of {self.limit:.0f}": self.seconds > self.limit,
        }
        return [what for what, is_so in found.items() if is_so]


def start(count: int, folder: pathlib.Path, steps: int, pause: float, heartbeat: int) -> subprocess.Popen:
    """Returns a run in so many processes, which writes its log and what it prints into the folder."""
    command = [sys.executable, "-u", str(PROGRAM), str(folder), str(steps), "data=4", str(pause), "", str(heartbeat)]
    if count > 1:
        command = [sys.executable, "-m", "jaxpar", "launch", "-n", str(count), "--", *command]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def read_log(folder: pathlib.Path) -> list[tuple[int, float]]:
    """Returns the steps and losses that were logged, a half-written last line left out."""
    path = folder / "log.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append((row["step"], row["loss"]))
    return rows


def told(folder: pathlib.Path) -> str:
    """Returns what a run printed last, but for the numbers of its steps."""
    lines = (folder / "out.txt").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if not line[-1:].isdecimal())[-3000:]


def saved(folder: pathlib.Path) -> int:
    """Returns the latest finished checkpoint's step, or 0."""
    return max((int(path.parent.name) for path in folder.glob(f"checkpoints/*/{NAME}")), default=0)


def damaged(folder: pathlib.Path) -> int:
    """Returns how many finished checkpoints aren't as they were saved."""
    found = 0
    for path in folder.glob(f"checkpoints/*/{NAME}"):
        try:
            check_manifest(path.parent)
        except ManifestError as error:
            print(f"  {error}", flush=True)
            found += 1
    return found


def children(pid: int) -> list[int]:
    """Returns the processes that a launcher has started, in order."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return sorted(map(int, found.split()))


def is_there(pid: int) -> bool:
    """Returns whether a process is one of this run that has not ended."""
    told = subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return PROGRAM.name in told.stdout and not told.stdout.lstrip().startswith("Z")


def wait_for(is_so: Callable[[], bool], seconds: float, every: float = 0.01) -> float:
    """Returns how long it took until something is so, at most so many seconds."""
    began = time.monotonic()
    while not is_so() and time.monotonic() - began < seconds:
        time.sleep(every)
    return time.monotonic() - began


def reach(process: subprocess.Popen, folder: pathlib.Path, phase: str, draw: random.Random) -> None:
    """Waits until a run is in a phase, and then a little."""
    before = len(read_log(folder))
    some = draw.randrange(1, 25)
    out = folder / "out.txt"
    being_saved = lambda: any(
        not (path / NAME).exists() for path in folder.glob("checkpoints/*") if path.name[:1].isdecimal()
    )
    is_so, more = {
        "start": (lambda: True, 4.0),
        "restore": (lambda: "ready" in out.read_text(errors="replace"), 0.5),
        "compile": (lambda: "compiling" in out.read_text(errors="replace"), 1.0),
        "step": (lambda: len(read_log(folder)) >= before + some, 0.2),
        "save": (lambda: len(read_log(folder)) > before + some and being_saved(), 0.05),
    }[phase]
    wait_for(lambda: is_so() or process.poll() is not None, 300, 0.005)
    time.sleep(draw.uniform(0, more))


def kill(process: subprocess.Popen, sent: signal.Signals, at: int | None, heartbeat: int) -> tuple[float, float]:
    """Sends a signal to a run, or to one of its processes; returns how long the others took to end, and may take."""
    peers = children(process.pid) if at is not None else []
    all_of_them = children(process.pid)
    target = peers[at % len(peers)] if at is not None and peers else process.pid
    os.kill(target, sent)
    is_stopped = sent == signal.SIGSTOP
    if is_stopped and target == process.pid:
        # Nobody waits for it: a host that freezes, and is then taken away.
        time.sleep(1)
        os.kill(target, signal.SIGKILL)
    others = [pid for pid in all_of_them if not (is_stopped and pid == target)]
    limit = heartbeat + 10 if is_stopped and target != process.pid else GRACE
    ended = lambda: (process.poll() is not None or is_stopped) and not any(map(is_there, others))
    seconds = wait_for(ended, 2 * limit + 60, 0.1)
    wait_for(lambda: process.poll() is not None and not any(map(is_there, all_of_them)), GRACE, 0.1)
    for pid in filter(is_there, all_of_them):
        os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()
    return seconds, limit


def kill_once(count: int, folder: pathlib.Path, draw: random.Random, heartbeat: int) -> Kill | None:
    """Runs on, and is killed; returns None where it ended before, as no run may."""
    before = len(read_log(folder))
    [phase] = draw.choices(PHASES, SHARES)
    sent = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
    # Mostly one of the processes: the first, which all others need, as well as any other.
    at = draw.randrange(count) if count > 1 and draw.random() < 0.7 else None
    if phase == "start" and sent == signal.SIGSTOP:
        # One that has not joined yet is waited for: for JAX's five minutes.
        phase = "restore"
    process = start(count, folder, 10**6, 0.02, heartbeat)
    reach(process, folder, phase, draw)
    if process.poll() is not None:
        print(told(folder), flush=True)
        return None
    seconds, limit = kill(process, sent, at, heartbeat)
    reached = max((number for number, _ in read_log(folder)[before:]), default=0)
    to = "the run" if at is None else f"process {at}"
    return Kill(
        phase, sent.name, to, reached, max(reached - saved(folder), 0), damaged(folder), round(seconds, 1), limit
    )


def soak(count: int, kills: int, draw: random.Random, heartbeat: int = 10) -> dict[str, object]:
    """Returns what a run in so many processes lost over its kills."""
    with tempfile.TemporaryDirectory() as name:
        folder, whole = pathlib.Path(name) / "killed", pathlib.Path(name) / "whole"
        folder.mkdir()
        whole.mkdir()
        done: list[Kill] = []
        faults: list[str] = []
        for number in range(kills):
            killed = kill_once(count, folder, draw, heartbeat)
            if killed is None:
                faults.append(f"kill {number}: the run ended before")
                continue
            done.append(killed)
            faults += [f"kill {number}: {fault}" for fault in killed.faults()]
            print(f"{count} processes, kill {number}: {killed._asdict()} {killed.faults() or ''}", flush=True)
            if killed.faults():
                print(told(folder), flush=True)
        last = max(saved(folder), 1) + 10
        for each in (folder, whole):
            assert start(count, each, last, 0, heartbeat).wait(600) == 0, told(each)
        expected = dict(read_log(whole))
        rows = [(number, loss) for number, loss in read_log(folder) if number in expected]
        by = lambda names: dict(collections.Counter(names))
        of = lambda sent: [killed.lost for killed in done if (killed.sent == "SIGTERM") == sent]
        return {
            "kills": len(done),
            "by signal": by(killed.sent for killed in done),
            "by phase": by(killed.phase for killed in done),
            "to": by(killed.to for killed in done),
            "most steps lost": max(of(False), default=0),
            "most steps lost by SIGTERM": max(of(True), default=0),
            "most seconds beside a stopped process": max(
                (each.seconds for each in done if each.sent == "SIGSTOP" and each.to != "the run"), default=0
            ),
            "steps": last,
            "missing": len(set(range(1, last + 1)) - {number for number, _ in rows}),
            "differing losses": sum(loss != expected[number] for number, loss in rows),
            "faults": faults,
        }


def main() -> None:
    """Prints what was lost, for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each number of processes")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--heartbeat", type=int, default=10, help="seconds after which a silent process is given up")
    options = parser.parse_args()
    for count in map(int, options.processes.split(",")):
        found = soak(count, options.kills, random.Random(options.seed + count), options.heartbeat)
        print(f"{count} processes: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
