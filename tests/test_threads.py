import threading

import pytest

from modeling_querit.threads import threads


def test_jobs_return_their_results():
    with threads(2) as pool:
        assert [job.result() for job in [pool.submit(abs, number) for number in (-1, 2)]] == [1, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_pending_jobs_are_cancelled_after_an_error(error):
    begun, running, go_on = [], threading.Event(), threading.Event()

    def work(number):
        begun.append(number)
        running.set()
        go_on.wait(30)

    def start_and_fail():
        with threads(1) as pool:
            for number in range(9):
                pool.submit(work, number)
            running.wait(30)
            threading.Timer(0.1, go_on.set).start()
            raise error

    with pytest.raises(error):
        start_and_fail()
    assert begun == [0]
