"""Python processes that have imported what commands need, and fork themselves for each command.

What libraries read from the environment when they are imported they read once for a process; so there is one
for every environment.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import json, os, runpy, sys, traceback
import torch, transformers.modeling_utils, transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto, transformers.models.llama.modeling_llama
import surgery.cli.main, surgery.index.build, surgery.pruning.prune, surgery.evaluate.perplexity
import matplotlib.figure, matplotlib.backends.backend_agg, datasets
import surgery.card.publish, surgery.checkpoint.hub, surgery.checkpoint.push
def run(where, command):
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(os.path.join(where["streams"], name), os.O_RDWR | os.O_CREAT), number)
    os.chdir(where["folder"])
    sys.path[0] = ""
    flagged = command[0] in ("-m", "-c")
    sys.argv = [command[0], *command[2:]] if flagged else command
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif flagged:
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(*json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
SERVERS: dict[str, subprocess.Popen[str]] = {}


def run_prepared(
    command: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in `folder`, as subprocess.run would."""
    kept = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
    server = _server(kept)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as streams:
        where = {"folder": str(folder), "streams": streams}
        server.stdin.write(json.dumps([where, command]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = ((Path(streams) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, code, out, err)


def _server(environment: dict[str, str]) -> subprocess.Popen[str]:
    key = json.dumps(environment, sort_keys=True)
    if key not in SERVERS:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        SERVERS[key] = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes)
        atexit.register(SERVERS[key].kill)
    return SERVERS[key]
