"""Several processes, each with the model on a device of its own, that share work out among them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Maximum number of pairs that a worker gets at once.
_MAX_CHUNK = 64
# Bytes that each tensor in shared memory is aligned to: a cache line.
_ALIGNMENT = 64
# Seconds until a worker that does not end is killed.
_PATIENCE = 5.0
_CLOSED = "The pool was closed before all pairs had their scores: start a new one."


def plan_chunks(queries: Sequence[str], lengths: Sequence[int], num_workers: int) -> list[list[int]]:
    """Divide pairs into chunks of like work, two or more for each worker, so that chunks still share prefixes.

    A query of few pairs stays whole, and has others beside it; the pairs of one with many are dealt out by length.

    Args:
        queries: Query of each pair.
        lengths: Length of each pair's document, in any unit.
        num_workers: Number of workers.

    Returns:
        Indices of the pairs of each chunk; every pair is in one chunk.
    """
    size = max(1, min(_MAX_CHUNK, math.ceil(len(queries) / (2 * num_workers))))
    by_query: dict[str, list[int]] = {}
    for pair, query in enumerate(queries):
        by_query.setdefault(query, []).append(pair)
    chunks: list[list[int]] = []
    shared: list[int] = []
    for pairs in by_query.values():
        if len(pairs) > size:
            parts = math.ceil(len(pairs) / size)
            ordered = sorted(pairs, key=lambda pair: -lengths[pair])
            chunks.extend(ordered[part::parts] for part in range(parts))
        else:
            if len(shared) + len(pairs) > size:
                chunks.append(shared)
                shared = []
            shared = shared + pairs
    return [*chunks, shared] if shared else chunks


def check_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    """Check the devices of processes that a user gives.

    Raises:
        TypeError: if they are not in a list, or not the names of devices.
        ValueError: if the list is empty.
    """
    advice = (
        "give a list with the device of each process, such as ['cuda:0', 'cuda:1'] or ['cpu'] * 4; for a single one, "
        "model.to(device) will do."
    )
    if not isinstance(devices, list | tuple) or not all(isinstance(device, str | torch.device) for device in devices):
        raise TypeError(f"device is {devices!r}: {advice}")
    if not devices:
        raise ValueError(f"device is {devices!r}: {advice}")
    try:
        return [torch.device(device) for device in devices]
    except RuntimeError as error:
        raise ValueError(f"device is {devices!r}, and one of them is none: {advice}") from error


class ProcessPool:
    """Worker processes that hold a model as it was when they were started; see `start_multi_process_pool`.

    Workers are started by spawn, so a script needs `if __name__ == "__main__":`. Those on CPUs share one copy of the
    weights in shared memory. They end with the pool, and with the process that started it, however that ends.

    Args:
        model: The model; it is not changed.
        devices: Device of each worker; one may be named several times.
        task: Function of a module, called in a worker with the model and the arguments of a call.

    Raises:
        TypeError: if `devices` is not a list of devices.
        ValueError: if the model cannot be sent to other processes.
        RuntimeError: if a worker does not start, or a device cannot be used.
    """

    def __init__(self, model: nn.Module, devices: Sequence[str | torch.device], task: Callable[..., Any]):
        self.devices = check_devices(devices)
        self._model = model
        self._state = _state_of(model)
        self._lock = threading.Lock()
        self._runs = itertools.count()
        self._workers: list[_Worker] = []
        # The cores that this process computes with, shared out.
        num_threads = max(1, torch.get_num_threads() // len(self.devices))
        sent = _to_shared_memory(model)
        try:
            self._workers.extend(_start_workers(self.devices, (sent, num_threads, task)))
            for worker in self._workers:
                _, _, error = worker.receive(
                    "before it was ready; a script that starts processes needs `if __name__ == '__main__':`"
                )
                if error is not None:
                    raise RuntimeError(f"The worker process on {worker.device} cannot use it: {error}") from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def processes(self) -> list[Any]:
        """The worker processes, in the order of their devices; none once the pool is closed."""
        return [worker.process for worker in self._workers]

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_model(self, model: nn.Module) -> None:
        """Check that the workers hold this model as it is now.

        Raises:
            ValueError: if the pool is closed, is that of another model, or the weights or tokenizer have changed since.
        """
        if not self._workers:
            raise ValueError("The pool is closed: start a new one.")
        if model is not self._model:
            raise ValueError("The pool is that of another model: start one with this model.")
        if _state_of(model) != self._state:
            raise ValueError("The model has changed since its pool was started: start a new one.")

    def run(self, calls: Sequence[tuple[Any, ...]], on_done: Sequence[Callable[[], None]]) -> list[Any]:
        """Call the task once for each tuple of arguments, and return the results in their order.

        Args:
            calls: Arguments of each call.
            on_done: Functions to call when each of them has ended.

        Raises:
            RuntimeError: if a worker was killed, which closes the pool, or the pool is closed.
            Exception: what a call has raised, with the traceback in the worker as a note.
        """
        results: list[Any] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        with self._lock:
            run = next(self._runs)
            pending = len(calls)
            try:
                while pending:
                    # Another thread may close the pool at any time.
                    workers = self._workers
                    if not workers:
                        raise _WorkerEnded(_CLOSED)
                    for worker in workers:
                        if waiting and not worker.is_busy:
                            index = waiting.popleft()
                            worker.send((run, index), calls[index])
                    busy = [worker for worker in workers if worker.is_busy]
                    readable = _readable(busy)
                    for worker in (worker for worker in busy if worker.connection in readable):
                        (run_of_answer, index), result, error = worker.receive("while it was scoring")
                        # A worker may have been left at the call of a run that ended early.
                        if run_of_answer != run:
                            continue
                        if error is not None:
                            raise error
                        results[index] = result
                        pending -= 1
                        on_done[index]()
            except _WorkerEnded as error:
                message = str(error) if self._workers else _CLOSED
                self.close()
                raise RuntimeError(message) from None
        return results

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.end()


class _WorkerEnded(RuntimeError):
    """A worker process has ended by itself."""


class _Sent(NamedTuple):
    """A model on its way to a worker.

    Args:
        skeleton: Pickle of the model with weights on the meta device.
        weights: Bytes of all weights, (bytes,), in shared memory.
        layout: Offset, shape and dtype of each weight by its name.
    """

    skeleton: bytes
    weights: Tensor
    layout: dict[str, tuple[int, torch.Size, torch.dtype]]

    def build(self) -> nn.Module:
        """Build the model, whose weights are views of the shared memory."""
        model: nn.Module = pickle.loads(self.skeleton)
        tensors = {
            name: self.weights[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, shape, dtype) in self.layout.items()
        }
        model.load_state_dict(tensors, strict=False, assign=True)
        return model.eval()


class _Worker:
    """A worker process as its parent sees it.

    Args:
        process: The process.
        connection: The parent's end of the pipe.
        device: Device of the worker.
    """

    def __init__(self, process: Any, connection: Any, device: torch.device):
        self.process = process
        self.connection = connection
        self.device = device
        self.is_busy = False

    def send(self, call_id: tuple[int, int], arguments: tuple[Any, ...]) -> None:
        self.is_busy = True
        try:
            self.connection.send((call_id, arguments))
        except OSError:
            raise self._ended("while it was scoring") from None

    def receive(self, when: str) -> tuple[tuple[int, int], Any, BaseException | None]:
        """Wait for the next answer: the call it is to, and the result or error."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended(when) from None
        self.is_busy = False
        return answer

    def _ended(self, when: str) -> _WorkerEnded:
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        cause = ", perhaps for lack of memory" if code == -getattr(signal, "SIGKILL", 9) else ""
        return _WorkerEnded(
            f"The worker process {self.process.pid} on {self.device} ended with exit code {code}{cause} {when}."
        )

    def end(self) -> None:
        self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _readable(workers: Sequence[_Worker]) -> list[Any]:
    """Wait until some of the workers have answered or ended, and return their connections."""
    try:
        return connection.wait([worker.connection for worker in workers])
    except OSError:
        raise _WorkerEnded(_CLOSED) from None


def _start_workers(devices: Sequence[torch.device], arguments: tuple[Any, ...]) -> Iterator[_Worker]:
    context = torch.multiprocessing.get_context("spawn")
    for device in devices:
        parent_end, child_end = context.Pipe()
        process = context.Process(target=_work, args=(child_end, device, *arguments), daemon=True)
        with _interrupts_blocked():
            process.start()
        # The worker's alone, so that its end is noticed here, and the end of this process there.
        child_end.close()
        yield _Worker(process, parent_end, device)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for what is started meanwhile: Ctrl-C reaches all processes, but the parent alone acts on it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # What multiprocessing starts beside the first process; it would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Any, device: torch.device, sent: _Sent, num_threads: int, task: Callable[..., Any]) -> None:
    """Run calls as they come, until the parent is gone; this is all that a worker does."""

    def answer(call_id: tuple[int, int] | None, function: Callable[..., Any], *arguments: Any) -> Any:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as caught:
            error = _portable(caught, device)
        # The first answer, to no call, says that the worker is ready.
        pipe.send((call_id, None if call_id is None else result, error))
        return result

    # Here too, for systems that cannot block it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        torch.set_num_threads(num_threads)
        model = answer(None, lambda: sent.build().to(device))
        while model is not None:
            call_id, arguments = pipe.recv()
            answer(call_id, task, model, *arguments)
    except (EOFError, OSError):
        return


def _portable(error: BaseException, device: torch.device) -> BaseException:
    """An error as it can be sent, with its traceback as a note."""
    note = f"In a worker process on {device}:\n{''.join(traceback.format_exception(error))}"
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(note)
    return sent


def _to_shared_memory(model: nn.Module) -> _Sent:
    """Copy the weights into shared memory, and pickle the rest of the model; nothing of the model is changed."""
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if _is_plain(tensor)}
    if any(tensor.is_meta for tensor in tensors.values()) or any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise ValueError(
            "accelerate spreads this model over devices: load it without device_map for several processes."
        )
    offsets: dict[int, int] = {}
    layout, size = {}, 0
    for name, tensor in tensors.items():
        if id(tensor) not in offsets:
            offsets[id(tensor)] = size
            size += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        layout[name] = offsets[id(tensor)], tensor.shape, tensor.dtype
    try:
        weights = torch.empty(size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise ValueError(
            f"There is no room for {size:,} bytes of weights in shared memory: make /dev/shm larger (docker run "
            "--shm-size)."
        ) from error
    sent = _Sent(_pickled_skeleton(model, tensors), weights, layout)
    for name, (offset, shape, dtype) in layout.items():
        weights[offset : offset + tensors[name].nbytes].view(dtype).view(shape).copy_(tensors[name].detach())
    return sent


def _pickled_skeleton(model: nn.Module, tensors: dict[str, Tensor]) -> bytes:
    """Pickle a model with these tensors on the meta device, and its others on the CPU."""
    memo: dict[int, Any] = {id(buffer): buffer.detach().cpu() for buffer in model.buffers()}
    for tensor in tensors.values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    # Not copied: it changes nothing of itself when it is pickled.
    processor = getattr(model, "_processor", None)
    memo[id(processor)] = processor
    try:
        return pickle.dumps(copy.deepcopy(model, memo))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"The model cannot be sent to other processes ({error}): with int8 weights, and with hooks that are "
            "local functions, rank in one process."
        ) from error


def _is_plain(tensor: Any) -> bool:
    # Quantized weights are of classes of their own, which know how to pickle themselves.
    return type(tensor) in (Tensor, nn.Parameter)


def _state_of(model: nn.Module) -> list[Any]:
    """What changes with the weights, the adapters or the tokenizer of a model."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    versions = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    return [*versions, getattr(model, "_processor", None)]
