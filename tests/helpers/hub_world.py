"""Commands run in processes of their own that know only a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.prepared_python import run_prepared

SEVERAL = """
import json, sys, traceback
from click.testing import CliRunner
from surgery.cli.main import main
results = []
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, words)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    results.append({"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
print(json.dumps(results))
"""


@dataclass
class World:
    """A loopback Hub, a folder to work in, and a way to run commands against it.

    `home` is a link to the folder's "home" whose path is the same for all tests.
    """

    hub: LoopbackHub
    folder: Path
    home: Path
    outputs: list[str]

    def run(
        self, *command: str, code: int = 0, home: str = "home", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python command in a process of its own that knows only the loopback Hub."""
        env = {
            **os.environ,
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(self.folder / home),
            **environment,
        }
        if home == "home":
            result = run_prepared(command, self.folder, env | {"HF_HOME": str(self.home)})
        else:
            command = (sys.executable, *command)
            result = subprocess.run(
                command, cwd=self.folder, env=env, capture_output=True, text=True, check=False
            )
        self.outputs += [result.stdout, result.stderr]
        assert result.returncode == code, result.stderr[-3000:]
        return result

    def surgeon(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a surgeon command."""
        return self.run("-m", "surgery", *arguments, code=code, **environment)

    def several(self, *commands: list[str], **environment: str) -> list[dict[str, Any]]:
        """Run surgeon commands one after the other in one process: code, stdout and stderr of each."""
        found = self.run("-c", SEVERAL, json.dumps(commands), **environment)
        results: list[dict[str, Any]] = json.loads(found.stdout)
        return results
