"""Python in a process of its own, without the seconds that it takes to import torch: ``[*python(), "-c", CODE]``.

A server imports what is slow, computes nothing, and forks for every job. What `subprocess` starts is a client: it hands
its arguments, environment, directory and streams to such a fork, passes signals on, and ends as that ends. So a job is
what an interpreter that has just started is, but for ``sys.modules``; how it starts is tested without this.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
LARGEST = 1 << 17
"""Bytes of a message: arguments and environment."""


@functools.cache
def python() -> list[str]:
    """What takes the place of ``sys.executable``; starts the server at the first call."""
    import atexit
    import subprocess
    import tempfile

    if sys.platform != "linux":
        return [sys.executable]
    folder = tempfile.TemporaryDirectory(dir="/tmp")  # a socket's path must be short
    place = f"{folder.name}/socket"
    command = [sys.executable, __file__, "serve", place]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # closes its stdin, which ends it
    return [sys.executable, "-S", __file__, place]


def _client(place: str) -> None:
    import json

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(place)
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    message = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd(), ignored]).encode()
    waiting: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: waiting.append(number))
    socket.send_fds(connection, [message], [0, 1, 2])
    for stream in range(3):
        os.close(stream)
    job = int(connection.recv(99))
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(job, number))
    for number in waiting:
        os.kill(job, number)
    code = int(connection.recv(99))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _next_job(place: str) -> tuple[list[str], dict[str, str], str, list[int]]:
    """Returns in the fork that does the job; what it belongs to is no longer open there."""
    import json
    import select

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(place)
    listener.listen(9)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        if sys.stdin.fileno() in select.select([listener, sys.stdin.fileno()], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(connection, LARGEST, 3)
    job = os.fork()
    if job:
        for stream in (0, 1, *streams):
            os.close(stream)
        connection.send(str(job).encode())
        _mind(job, connection)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return tuple(json.loads(message))


def _mind(job: int, connection: socket.socket) -> None:
    """Says how the job ends; ends it where the client is gone."""
    import select

    end = os.pidfd_open(job)
    if connection in select.select([end, connection], [], [])[0]:
        os.kill(job, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    try:
        connection.send(str(code).encode())
    finally:
        os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], folder: str, ignored: list[int]) -> None:
    """As ``python`` does it: ``-c`` and ``-m``."""
    import runpy
    import types

    for number in SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "").partition(":")
    encoding, errors = encoding or sys.stdout.encoding, errors or sys.stdout.errors
    sys.stdin = open(0, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    kind, code, *rest = arguments
    sys.path[0], sys.argv = "" if kind == "-c" else folder, [kind, *rest]
    sys.modules["warm_python"] = sys.modules["__main__"]  # which would be taken apart without a name
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, "<string>", "exec"), main.__dict__)


def _import() -> None:
    import gc

    import torchvision  # noqa: F401

    import pwrewrite
    import pwrewrite.cli.app

    for name in dir(pwrewrite):
        getattr(pwrewrite, name)
    gc.collect()
    gc.freeze()  # so that forks need not look at all that, which would copy it


if __name__ == "__main__" and sys.argv[1] == "serve":
    _import()
    _run(*_next_job(sys.argv[2]))
elif __name__ == "__main__":
    _client(sys.argv[1])
