"""Commands in processes of their own: several by torchrun, and ones that kill themselves at a moment.

KILL is Python that runs `surgeon` and sends itself SIGKILL when it opens a file for the n-th time: KILL_AT is
"file name:n", KILL_IN the end of its folder's name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KILL = """
import os, signal, sys
sys.argv[0] = "surgeon"
name, left = os.environ["KILL_AT"].split(":")
folder = os.environ.get("KILL_IN", "surgeon-journal/")
left = int(left)
def watch(event, arguments):
    global left
    if event == "open" and str(arguments[0]).endswith(folder + name):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from surgery.cli.main import main
main()
"""


def torchrun(where: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*RUN, *arguments],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
