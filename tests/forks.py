"""Runs that start in no time: they are forked from a process that has already imported PyTorch.

They are real processes, for real signals, on files of their own for what they print. This file as
a script is the process that forks them. Linux only.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path


class Server:
    """The process that forks, started after the command `prefix`."""

    def __init__(self, *prefix):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.places = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen([*prefix, sys.executable, __file__], **pipes)

    def start(self, program, arguments, cwd, env=None, **options):
        """Start what `python PROGRAM ARGUMENTS` runs, a file or -c CODE: a Fork.

        `tty`: a terminal for all its streams; `nohup`: as after nohup; `limit`: bytes of a file.
        """
        job = options | {
            "program": list(map(str, program)),
            "arguments": list(map(str, arguments)),
            "cwd": os.path.abspath(cwd),
            "env": os.environ | (env or {}),
            "place": tempfile.mkdtemp(dir=self.places.name),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Fork(int(self.process.stdout.readline()), Path(job["place"]))


class Fork:
    """A forked run, with those methods of subprocess.Popen that the tests use."""

    def __init__(self, pid, place):
        self.pid, self.place, self.returncode = pid, place, None

    def poll(self):
        if self.returncode is None and (self.place / "status").exists():
            self.returncode = int((self.place / "status").read_text())
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, timeout=300):
        self.wait(timeout)
        return (self.place / "stdout").read_text(), (self.place / "stderr").read_text()

    def send_signal(self, signum):
        with contextlib.suppress(ProcessLookupError):  # it may have ended just now
            if self.poll() is None:
                os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()


def serve():
    """For each job, a line of JSON from stdin: fork. Returns the job in the new process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        job = json.loads(line)
        for name in ("stdout", "stderr"):  # there to be read, however soon it is killed
            Path(job["place"], name).touch()
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            return job
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        part = Path(job["place"], "status.part")
        part.write_text(str(status))
        part.rename(part.with_suffix(""))
        os._exit(0)
    sys.exit()


def surround(job):
    """Give this process the streams, the folder and the environment of the job."""
    import resource

    os.setsid()
    os.chdir(job["cwd"])
    places = [os.devnull, *(os.path.join(job["place"], name) for name in ("stdout", "stderr"))]
    for number, place in enumerate(places):
        os.dup2(os.open(job.get("tty") or place, os.O_RDWR), number)
    os.environ.clear()
    os.environ.update(job["env"])
    signal.alarm(300)
    if job.get("nohup"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if limit := job.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def run(program, arguments):
    """What `python PROGRAM ARGUMENTS` does, PROGRAM being [file, …] or ["-c", code]."""
    first, *rest = program
    if first == "-c":
        sys.argv, sys.path[0] = [first, *arguments], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(main))
    else:
        sys.argv, sys.path[0] = [first, *rest, *arguments], os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for module in ("filelock", "matplotlib.figure", "torch._dynamo", "torchvision", "tqdm.auto"):
        importlib.import_module(module)
    job = serve()
    surround(job)
    run(job["program"], job["arguments"])
