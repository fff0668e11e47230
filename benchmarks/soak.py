"""A run that is killed again and again: what it loses, and whether its losses are those of a run that nothing ended.

    python benchmarks/soak.py [--kills 50] [--processes 1,2,4] [--seed 0]

The kills come at random moments, in compile, step, save or restore, by SIGKILL, SIGTERM or SIGSTOP. After them each run
goes on to its end. It prints how many steps were done after the last checkpoint that was finished, one every five steps
and written while the steps go on, and how many losses differ in any bit.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM = pathlib.Path(__file__).parent.parent / "tests" / "fit_program.py"
EVERY = 5


def start(count: int, folder: pathlib.Path, steps: int, pause: float) -> subprocess.Popen:
    """Returns a run in so many processes, which writes its log into the folder."""
    command = [sys.executable, str(PROGRAM), str(folder), str(steps), "data=4", str(pause)]
    if count > 1:
        command = [sys.executable, "-m", "jaxpar", "launch", "-n", str(count), "--", *command]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


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


def saved(folder: pathlib.Path) -> int:
    """Returns the latest finished checkpoint's step, or 0."""
    found = folder.glob("checkpoints/*/jaxpar-manifest.json")
    return max((int(path.parent.name) for path in found), default=0)


def end(process: subprocess.Popen, sent: signal.Signals) -> None:
    """Sends a signal, and waits; a stopped run is then killed."""
    process.send_signal(sent)
    if sent == signal.SIGSTOP:
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    # What a killed launcher has left.
    subprocess.run(["pkill", "-KILL", "-f", str(PROGRAM)], check=False)


def soak(count: int, kills: int, draw: random.Random) -> dict[str, int]:
    """Returns what a run in so many processes lost over its kills."""
    # More than it can reach.
    steps = 10**6
    with tempfile.TemporaryDirectory() as name:
        folder, whole = pathlib.Path(name) / "killed", pathlib.Path(name) / "whole"
        folder.mkdir()
        whole.mkdir()
        found = {"kills": 0, "most steps lost": 0, "steps of a SIGTERM lost": 0}
        for _ in range(kills):
            before = len(read_log(folder))
            process = start(count, folder, steps, 0.02)
            time.sleep(draw.uniform(1, 6 + 2 * count))
            if process.poll() is not None:
                break
            sent = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
            end(process, sent)
            found["kills"] += 1
            reached = max((number for number, _ in read_log(folder)[before:]), default=0)
            lost = max(reached - saved(folder), 0)
            found["most steps lost"] = max(found["most steps lost"], lost)
            if sent == signal.SIGTERM:
                found["steps of a SIGTERM lost"] = max(found["steps of a SIGTERM lost"], lost)
        last = max(saved(folder), 1) + 10
        for each in (folder, whole):
            assert start(count, each, last, 0).wait(600) == 0
        expected = dict(read_log(whole))
        rows = [(number, loss) for number, loss in read_log(folder) if number in expected]
        found["steps"] = last
        found["missing"] = len(set(range(1, last + 1)) - {number for number, _ in rows})
        found["differing losses"] = sum(loss != expected[number] for number, loss in rows)
        return found


def main() -> None:
    """Prints what was lost, for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each number of processes")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    options = parser.parse_args()
    for count in map(int, options.processes.split(",")):
        print(f"{count} processes: {soak(count, options.kills, random.Random(options.seed + count))}", flush=True)


if __name__ == "__main__":
    main()
