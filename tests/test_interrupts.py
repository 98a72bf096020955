import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from modeling_querit.interrupts import EXIT_CODE, one_line_interrupts

LINE = "querit: interrupted.\n"


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [None, ValueError, ImportError, SystemExit])
def test_an_interrupt_becomes_one_line_whatever_a_library_makes_of_it(capfd, error):
    def work():
        try:
            interrupt()
        except KeyboardInterrupt:
            if error is None:
                raise
            raise error(3) from None

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop, one_line_interrupts():
        work()
    assert stop.value.code == EXIT_CODE == 130
    assert capfd.readouterr() == ("", LINE)
    assert signal.getsignal(signal.SIGINT) is before


def test_blocks_within_a_block_report_once(capfd):
    with pytest.raises(SystemExit), one_line_interrupts(), one_line_interrupts():
        interrupt()
    assert capfd.readouterr().err == LINE


def test_other_errors_and_exits_pass(capfd):
    with pytest.raises(ValueError, match="x"), one_line_interrupts():
        raise ValueError("x")
    with pytest.raises(SystemExit) as stop, one_line_interrupts():
        sys.exit(2)
    assert stop.value.code == 2
    assert capfd.readouterr().err == ""


def test_an_interrupt_in_a_finalizer_is_not_lost(capfd):
    class Interrupted:
        def __del__(self):
            interrupt()

    def work():
        Interrupted()
        # Sleeping, not busy: the interrupt comes again.
        time.sleep(10)

    with pytest.raises(SystemExit), one_line_interrupts():
        work()
    assert capfd.readouterr().err == LINE


def test_a_second_interrupt_at_once_is_the_same_one(capfd):
    def work():
        try:
            interrupt()
        finally:
            interrupt()

    with pytest.raises(SystemExit), one_line_interrupts():
        work()
    assert capfd.readouterr().err == LINE


def test_nothing_changes_off_the_main_thread():
    handlers = []

    def work():
        with one_line_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def run_interrupted(seconds, *arguments):
    """Exit code and standard error of the command line, interrupted some seconds after it has started."""
    program = "from modeling_querit.cli import main; print('started', flush=True); main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # However long a busy machine takes until then: no program can catch an interrupt before.
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 2.5, 4])
def test_a_command_is_interrupted_at_any_time(saved_folders, tmp_path, seconds):
    (tmp_path / "documents.txt").write_text("a fox\n" * 2000)
    arguments = ("rerank", "-q", "fox", "--model", saved_folders("qwen3"), tmp_path / "documents.txt")
    code, err = run_interrupted(seconds, *arguments)
    if code == 0:
        warnings.warn(f"the command took less than {seconds} s", stacklevel=1)
    assert (code, err) in [(0, ""), (130, LINE)]
    assert [path.name for path in tmp_path.iterdir()] == ["documents.txt"]
