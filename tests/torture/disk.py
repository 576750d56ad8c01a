"""python -m tests.torture.disk: runs whose disk is full of a sudden; each outcome as a line, 1 or 0.

Started by `full`, in a namespace of its own, where it may mount small disks in memory without being root.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.torture.kills import LONGEST, Alone, in_turns, is_equal, kill, start
from tests.torture.moments import fill
from tests.trainer.runs import environment_of_its_own, newest_run
from trainer.checkpoints import checkpoint

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
SIZE = 8 << 20  # bytes of a disk: a run takes less than half of it
SMALL = 150_000  # bytes: less than a training state
TIMES = {"start": 1, "write": 4, "file": 4, "record": 3}  # how often at which kind of moment


def full(data: Path, root: Path, alone: Alone, seed: int) -> Iterator[bool]:
    """For each time that a disk was full: whether the run ended with exit code 3 and a message, or had ended;
    what was saved before was still whole; and the run, gone on with once there was room, ended as `alone`
    did. Without leave to mount, files that may not grow stand in for the disk."""
    allowed = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    prefix = NAMESPACE if allowed else []
    module = [sys.executable, "-m", "tests.torture.disk", str(data), str(root), str(alone.run), str(seed)]
    counts = [f"{kind}={count}" for kind, count in alone.counts.items()] if allowed else []
    process = subprocess.Popen(
        [*prefix, *module, *counts], stdout=subprocess.PIPE, text=True, env=environment_of_its_own()
    )
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip() == "1"
    if process.wait() != 0:
        raise RuntimeError("the test of full disks has failed itself")


def main(data: Path, root: Path, whole: Path, seed: str, counts: dict[str, int]) -> None:
    root.mkdir(parents=True)
    generator = random.Random(f"{seed}-disk")
    moments = ["limit:0"]
    for kind, times in TIMES.items() if counts else ():
        total = counts.get(kind, 1)
        moments += [
            f"{kind}:{total * n // times + generator.randrange(-(-total // times))}" for n in range(times)
        ]
    for outcomes in in_turns(
        1, [lambda core, each=each: [_stands(data, root, whole, each, core)] for each in moments]
    ):
        print(int(outcomes), flush=True)


def _stands(data: Path, root: Path, whole: Path, moment: str, core: int | None) -> bool:
    kind, disk = moment.partition(":")[0], root / moment.replace(":", "-")
    disk.mkdir()
    ballast, said = disk / "ballast", root / f"{disk.name}.txt"
    options = ["log.every=1st", "save.every=6ep"] if kind == "record" else []
    variables = {"ACDC_MOMENT": f"{moment}:0", "ACDC_BALLAST": str(ballast)}
    if kind == "limit":
        variables = {"ACDC_FILE_SIZE": str(SMALL)}
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(disk)], check=True)
    if kind == "start":
        variables = {}
        fill(ballast)
    process = start(data, disk, 1, core, *options, said=said, **variables)
    code = process.wait(LONGEST)
    kill(process)
    told = said.read_text(encoding="utf-8", errors="replace")
    states = [path for path in disk.glob("*/*/checkpoints/*") if not path.name.startswith(".")]
    sound = all(_is_whole(path) for path in states)
    ballast.unlink(missing_ok=True)
    then = start(data, disk, 1, core)
    ended = then.wait(LONGEST)
    kill(then)
    words = code == 0 or (code == 3 and "error: " in told)
    stands = words and "Traceback" not in told and sound and ended == 0 and is_equal(newest_run(disk), whole)
    if not stands:
        print(f"\n{moment}: {code}, sound {sound}, then {ended}: {told[-2000:]}", file=sys.stderr)
    if kind != "limit":
        subprocess.run(["umount", str(disk)], check=True)
    shutil.rmtree(disk)
    return stands


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.read_info(folder)
    except checkpoint.CheckpointError:
        return False
    return True


if __name__ == "__main__":
    data, root, whole, seed, *rest = sys.argv[1:]
    pairs = (each.split("=") for each in rest)
    main(Path(data), Path(root), Path(whole), seed, {kind: int(count) for kind, count in pairs})
