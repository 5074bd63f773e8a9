"""Runs code that a model wrote: a separate process with limits on time and memory, and nothing of our environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError

# The child limits itself before it reads the code. Its results go to a copy of the original stdout, since the code
# may print. Expected results never enter the child, so no code can pass by reporting success.
_CHILD = """
import json, os, resource, sys
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
report = os.dup(1)
os.write(report, b"limited ")
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
try:
    names = {"__name__": "solution"}
    exec(compile(job["code"], "solution", "exec"), names)
    function = names[job["function"]]
    answer = {"results": [function(*arguments) for arguments in job["calls"]]}
    text = json.dumps(answer)
except BaseException as error:
    text = json.dumps({"error": type(error).__name__ + ": " + str(error)[:200]})
os.write(report, text.encode()[:job["longest"]])
"""
_LIMITED = b"limited "  # what the child says once its limits hold, before it looks at the code
_LONGEST = 60_000  # bytes of results; below a pipe's capacity, so the child never waits for us


@dataclass(frozen=True)
class Outcome:
    """`results`, one for each call, or the `error` that ended the run."""

    results: list[Any] | None
    error: str | None


def run(code: str, function: str, calls: Sequence[Sequence[Any]], *, seconds: int = 2, memory_mb: int = 256) -> Outcome:
    """Define `function` by running `code`, call it with each of `calls`, and give back what it returned.

    Arguments and results pass as JSON, so a tuple comes back as a list. The code cannot write to files, nor start
    processes unless its user is root; it may read what its user may read, and use the network: this contains a
    model's mistakes, it is no cage for hostile code.

    Args:
        seconds: of processor time; twice that of waiting.
        memory_mb: of address space, in MiB.

    Raises:
        DataError: the limits cannot be set on this system.
    """
    if os.name != "posix":
        raise DataError("Running programs needs a POSIX system such as Linux, whose resource limits contain them.")
    job = {
        "code": code,
        "function": function,
        "calls": [list(arguments) for arguments in calls],
        "seconds": seconds,
        "memory": memory_mb * 2**20,
        "longest": _LONGEST,
    }
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            text, _ = child.communicate(json.dumps(job).encode(), timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return Outcome(None, f"stopped after {2 * seconds} s")
    if not text.startswith(_LIMITED):
        raise DataError(
            f"Running programs: the limits ({seconds} s, {memory_mb} MiB) could not be set on this system; the process "
            f"ended with status {child.returncode}. Linux can; on other systems run this part in a Linux container."
        )
    try:
        answer = json.loads(text.removeprefix(_LIMITED))
        return Outcome(answer.get("results"), answer.get("error"))
    except (ValueError, AttributeError, RecursionError):
        return Outcome(None, f"ended with status {child.returncode} and no result")
