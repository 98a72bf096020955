"""Several processes at one run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

# Those that are done wait for the others no longer than this.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As the environment says."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Without a word about it, processes on a machine without an accelerator would not be told of each other.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes what only one can write."""
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The value of each of them, in order, once all are here."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def end(self) -> None:
        """Disconnect them: processes that exit while they are connected may hang or crash."""
        if self.count > 1:
            from accelerate import PartialState

            # A trainer that nothing needs any more still holds the connections.
            gc.collect()
            PartialState().destroy_process_group()
