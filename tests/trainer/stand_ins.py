"""Commands of clusters that test machines lack, as scripts on PATH: they start the processes here.

srun: a task on each of two machines, the loopback addresses 127.0.0.1 and 127.0.0.2, with the variables that
SLURM sets; a signal goes to the last task alone, of which the others have to hear; the exit code is the
highest. ssh and pdsh: a shell here, for hosts that begin with 127. scontrol writes down what it was asked.
acdc and torchrun: this interpreter's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2]"}
step |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: tasks[-1].send_signal(number))
for number in ("0", "1"):
    task = {"SLURM_PROCID": number, "SLURM_NODEID": number}
    tasks.append(subprocess.Popen(words, env={**os.environ, **step, **task}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SSH = """
import subprocess, sys
words = sys.argv[1:]
while words[0] == "-o":
    words = words[2:]
host, *command = words
if not host.startswith("127."):
    print(f"ssh: connect to host {host} port 22: No route to host", file=sys.stderr)
    sys.exit(255)
sys.exit(subprocess.call(["sh", "-c", " ".join(command)]))
"""
PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])
if command.startswith("pkill"):  # the launcher's way to stop: here the group gets the signal as well
    sys.exit(0)
calls = [subprocess.Popen(["sh", "-c", command.replace("%n", str(i))]) for i in range(len(hosts))]
sys.exit(max(call.wait() % 256 for call in calls))
"""


def install(folder: Path) -> dict[str, str]:
    """Write them to `folder`; variables with which a process finds them."""
    folder.mkdir()
    python = f"#!{sys.executable}\n"
    scripts = {
        "srun": python + SRUN,
        "ssh": python + SSH,
        "pdsh": python + PDSH,
        "hostname": "#!/bin/sh\necho 127.0.0.1 10.9.8.7\n",
        "scontrol": f'#!/bin/sh\necho "$@" >> {folder}/asked\n',
        "acdc": f'#!/bin/sh\nexec {sys.executable} -m trainer.cli.main "$@"\n',
        "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}
