"""The stand-in for the interpreter is told from it by nothing but its speed."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs the pidfd_open of Linux"),
]
PROGRAMS = {
    "what it was given": "import os, sys; print(sys.argv, os.getcwd(), os.environ['NAME'], sys.stdin.read(), __name__)",
    "imports": "import sys; print([name for name in ('transformers', 'huggingface_hub') if name in sys.modules])",
    "exit code": "raise SystemExit(3)",
    "message": "import sys; sys.exit('wrong')",
    "error": "print('before'); 1 / 0",
    "exit functions": "import atexit; atexit.register(print, 'after'); print('before')",
    "thread": "import threading, time; threading.Timer(0.1, print, ['after']).start()",
    "killed": "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "import signal; signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("options", [[], ["-I"], ["-u"]], ids=["as usual", "isolated", "unbuffered"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_runs_alike(forked_python, tmp_path, program, options):
    results = []
    for python in (sys.executable, forked_python):
        command = [python, *options, "-c", program, "--flag", "ä"]
        environment = os.environ | {"NAME": "value"}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, input="text", capture_output=True, text=True, timeout=300
        )
        results.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert results[0] == results[1]


def test_modules_and_files_run_alike(forked_python, tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    (tmp_path / "program.py").write_text("import sys, neighbour; print(neighbour.VALUE, sys.argv, __file__)\n")
    for arguments in (["-m", "program", "x"], ["program.py", "x"], ["-X", "utf8", "program.py"]):
        outputs = [
            subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            for python in (sys.executable, forked_python)
        ]
        assert outputs[0] == outputs[1] != ""


# A shell starts what runs in the background with SIGINT ignored, and so are the processes of such a run.
SIGNALS = [
    signal.SIGTERM,
    signal.SIGUSR1,
    *([signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else []),
]


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_reach_the_program(forked_python, number):
    program = "import time; print('started', flush=True); time.sleep(600)"
    with subprocess.Popen([forked_python, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"started\n"
        process.send_signal(number)
        assert process.wait(300) == -number


def test_a_program_ends_with_its_command(forked_python):
    program = "import time; print('started', flush=True); time.sleep(600)"
    with subprocess.Popen([forked_python, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        process.kill()
        # Its end of the pipe closes.
        assert process.stdout.read() == b""
