"""A stand-in for the `python` command that skips the imports of large libraries, for tests that start processes.

    subprocess.run([forked_python, "-m", "modeling_querit", "rerank", ...], env=..., cwd=...)

A server imports torch, scipy, scikit-learn and pandas once. The command connects to it and hands over its arguments,
environment, working directory and standard streams; the server forks, and the child becomes what a new interpreter
would be: nothing of transformers, huggingface_hub or this package was imported, so it reads the environment that it was
given, and ends with tracebacks, exit functions and signals of its own. Only the seed of its hashes is the server's, and
it ends without taking the interpreter apart, which would take longer than many a test.

Where imports themselves are tested, or processes must differ in their hash seeds, use `sys.executable`. Options other
than `-I` or `-u`, `-c` and `-m` start the real interpreter. Signals are passed on; SIGKILL cannot be, and reaches the
child a moment after the command has ended: to kill a process as abruptly and wait for its end, send SIGUSR1.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

# What transformers, sentence-transformers, accelerate, datasets and mteb import, unless it reads settings of the Hub.
LIBRARIES = [
    "torch",
    "torch._dynamo",
    "torch._inductor.decomposition",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.experimental",
    "torch.onnx",
    "torch.utils.data",
    "bm25s",
    "filelock",
    "fsspec",
    "httpcore2",
    "httpx",
    "httpx2",
    "jinja2.sandbox",
    "multiprocess",
    "numpy",
    "pandas",
    "PIL.Image",
    "polars",
    "psutil",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic.json_schema",
    "regex",
    "rich.progress",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.metrics",
    "sympy",
    "tokenizers",
    "torchao.quantization",
    "trio",
    "typer",
    "yaml",
]
# Runs without site-packages. One that is killed closes its connection, and the server kills the child.
COMMAND = """#!{executable} -IS
import json, os, signal, socket, sys
arguments = sys.argv[1:]
first = arguments[arguments[:1] in (["-I"], ["-u"]) :][:1]
if not first or (first[0].startswith("-") and first[0] not in ("-c", "-m")):
    os.execv({executable!r}, [{executable!r}, *arguments])
signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR1)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([sys.argv[0], arguments, dict(os.environ), os.getcwd()]).encode(errors="surrogateescape")
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
answers = connection.makefile()
child = int(answers.readline())
for number in signals:
    signal.signal(number, lambda number, frame: os.kill(child, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
status = int(answers.readline())
if status < 0:
    if -status in signals:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def forked_python(folder: Path):
    """The path of the command, written to a folder; the interpreter itself where processes cannot be forked like this.

    The server starts at once and imports while the caller goes on; it ends with this process at the latest.
    """
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    address, path = str(folder / "socket"), folder / "python"
    path.write_text(COMMAND.format(executable=sys.executable, address=address))
    path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        command = [sys.executable, "-I", __file__, str(listener.fileno())]
        # Interrupts from the terminal are for the commands, which pass them on.
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
    with server:
        yield str(path)
        # Its children end with their commands.
        server.kill()


def serve(listener):
    """Import the libraries, then fork for each connection. Returns a request in the child, None in the end."""
    with quiet_stderr():
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    # The collector of a child would read, and so copy, the whole heap.
    gc.collect()
    gc.freeze()
    # Processes that wait for children leave nothing behind.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return receive_and_fork(connection)
        connection.close()


@contextlib.contextmanager
def quiet_stderr():
    """Drop what is written to file descriptor 2: torchao complains about kernels for GPUs."""
    before = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    yield
    os.dup2(before, 2)
    os.close(before)


def receive_and_fork(connection):
    """Receive a request and fork once more; the parent waits for the child, which returns the request."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    rest = connection.makefile("rb").read(int.from_bytes(header, "big"))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(rest)
    for stream in [0, 1, 2, *streams]:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(executable, arguments, environment, folder):
    """Run a program as the interpreter would with these arguments, and exit."""
    is_isolated, is_unbuffered = arguments[0] == "-I", arguments[0] == "-u"
    arguments = arguments[is_isolated or is_unbuffered :]
    open_streams(is_unbuffered or (not is_isolated and bool(environment.get("PYTHONUNBUFFERED"))))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable
    # The state of torch's generators is the same in every process; `random` seeds itself anew after a fork.
    sys.modules["numpy"].random.seed()
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if arguments[0] in ("-c", "-m"):
        option, program, *rest = arguments
        first = "" if option == "-c" else folder
        sys.argv = ["-c" if option == "-c" else "-m", *rest]
    else:
        option, program, first = None, arguments[0], str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        main.__file__ = os.path.abspath(program)
    if not is_isolated:
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [first, *(os.path.abspath(path) for path in paths if path)]
    if option == "-m":
        end_with(lambda: runpy._run_module_as_main(program))
    else:
        code = program if option == "-c" else Path(program).read_bytes()
        name = "<string>" if option == "-c" else program
        end_with(lambda: exec(compile(code, name, "exec"), main.__dict__))


def open_streams(is_unbuffered):
    """Open the standard streams anew: those of the server may believe that they are files, or a terminal."""
    sys.stdin = os.fdopen(0, closefd=False)
    binary = os.fdopen(1, "wb", buffering=0 if is_unbuffered else -1, closefd=False)
    sys.stdout = io.TextIOWrapper(binary, write_through=is_unbuffered)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def end_with(run):
    """Run, and end as the interpreter ends: threads, exit functions, buffers, exit code or signal."""
    status = 0
    try:
        run()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        status = 120
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        request = serve(listener)
    if request is not None:
        become(*request)
