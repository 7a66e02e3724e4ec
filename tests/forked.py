"""Processes that run a script, forked from one that has imported everything: an import of torch and what stands on it takes
some four seconds of a core, and the tests start dozens.

A script runs as ``__main__`` with its own arguments, environment, folder, process group of the interpreter and exit; only its
imports are done. What happens while a program imports, or depends on the interpreter's options, needs a fresh process.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class Forked:
    """As subprocess.Popen, as far as the tests need it: ``stdout``, ``stderr`` are -1 (a pipe), -3 (nothing) or a number."""

    def __init__(self, arguments: list[str], environment: dict[str, str], stdout: int = -3, stderr: int = -3):
        self.returncode, self._said = None, b""
        self.stdout = self.stderr = None
        self._status, status = socket.socketpair()
        handles, opened = [status.fileno()], []
        for name, kind in (("stdout", stdout), ("stderr", stderr)):
            if kind == -1:
                read, kind = os.pipe()
                setattr(self, name, open(read, "rb", buffering=0))  # a line read takes nothing of the next
                opened.append(kind)
            elif kind == -3:
                kind = os.open(os.devnull, os.O_WRONLY)
                opened.append(kind)
            handles.append(kind)
        request = {"arguments": list(map(str, arguments)), "environment": environment, "folder": os.getcwd()}
        socket.send_fds(_server(), [json.dumps(request).encode()], handles)
        for handle in opened:
            os.close(handle)
        status.close()
        self.pid = self._read(60)

    def _read(self, timeout: float | None) -> int | None:
        """The next number that the server writes on this process: its pid, then its exit status."""
        until = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._said:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                return None
            data = self._status.recv(100)
            assert data, "the server of forks has ended"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def poll(self) -> int | None:
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._read(timeout)
            if self.returncode is not None:
                self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes | None, bytes | None]:
        """What is left in the pipes until they end, and then the exit code. A pipe that is not read must not fill."""
        until = None if timeout is None else time.monotonic() + timeout
        said: dict = {file: b"" for file in (self.stdout, self.stderr) if file}
        left = list(said)
        while left:
            seconds = None if until is None else max(0.0, until - time.monotonic())
            ready = select.select(left, [], [], seconds)[0]
            if not ready:
                raise subprocess.TimeoutExpired("a forked script", timeout)
            for file in ready:
                data = os.read(file.fileno(), 1 << 16)
                said[file] += data
                if not data:
                    left.remove(file)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return said.get(self.stdout), said.get(self.stderr)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, if it has not ended, and let go of its pipes."""
        self.send_signal(signal.SIGKILL)
        self.wait(60)
        for file in filter(None, (self.stdout, self.stderr)):
            file.close()


def pair(arguments: list[str], environment: dict[str, str]) -> tuple[list[int], list[str]]:
    """Two processes of a group, as a launcher starts them: exit codes, and what each writes to stderr."""
    return group(2, arguments, environment)


def group(
    n: int, arguments: list[str], environment: dict[str, str], timeout: float = 120, keeps_store: bool = False
) -> tuple[list[int], list[str]]:
    """:func:`pair` of ``n`` processes. ``keeps_store``: the store of the group outlives them, as with a launcher."""
    of_launcher = {}
    if keeps_store:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        of_launcher = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = start_group(n, arguments, environment, of_launcher)
    try:
        said = [process.communicate(timeout)[1].decode() for process in processes]
        return [process.wait(10) for process in processes], said
    finally:
        for process in processes:
            process.kill()


def start_group(
    n: int, arguments: list[str], environment: dict[str, str], of_launcher: dict[str, str]
) -> list[Forked]:
    """The processes of :func:`group`, which the caller waits for and kills; ``of_launcher``: what a launcher sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**environment, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", **of_launcher}  # fmt: skip
    return [Forked(arguments, {**shared, "RANK": r, "LOCAL_RANK": r}, stderr=-1) for r in map(str, range(n))]


@functools.cache
def _server() -> socket.socket:
    """The process that forks, started when first asked for; it ends with this one."""
    here, there = socket.socketpair()
    path = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    server = subprocess.Popen([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    there.close()

    def end() -> None:
        here.close()
        server.wait()

    atexit.register(end)
    return here


def serve(connection: socket.socket) -> None:
    """Fork for every request. The fork's parent is a small process of its own, which waits for it and tells its end."""
    small = set()
    while True:
        small = {pid for pid in small if os.waitpid(pid, os.WNOHANG)[0] == 0}
        data, handles, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not data:
            return
        small.add(child := os.fork())
        if child == 0:
            connection.close()
            pid = os.fork()
            if pid == 0:
                os.close(handles[0])
                _become(json.loads(data), *handles[1:])
                return
            os.close(handles[1]), os.close(handles[2])
            os.write(handles[0], b"%d\n" % pid)
            _, status = os.waitpid(pid, 0)
            os.write(handles[0], b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        for handle in handles:
            os.close(handle)


def _become(request: dict, stdout: int, stderr: int) -> None:
    """Run the script as the main program, and end as it does."""
    for number, handle in ((1, stdout), (2, stderr)):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    before = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path(sys.argv[0]).parent), *before, *sys.path[1:]]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import kill_and_resume
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch._dynamo  # noqa: F401  with the first step of an objective

    kill_and_resume.load_script()
    kill_and_resume.load_script.cache_clear()
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
