"""Registration of our classes with transformers' auto classes, without importing transformers before it is needed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Packages whose imports are followed: those that must not be half imported when our classes are.
_PACKAGES = ("transformers", __package__)
_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
_MODEL_MODULE = "transformers.models.auto.modeling_auto"


def register_when_imported() -> None:
    """Register our classes as soon as transformers' auto classes are imported; at once if they already are.

    After `import modeling_querit`, `AutoModel.from_pretrained(folder)` loads our folders without remote code, whichever
    of the two packages was imported first. Importing transformers for this would take seconds, also for
    `querit --help`; instead, a finder on `sys.meta_path` registers our classes when somebody imports it.
    """
    finder = _RegisteringFinder()
    sys.meta_path.insert(0, finder)
    finder.register_imported()


class _RegisteringFinder(MetaPathFinder):
    """Finds modules as Python does, and registers our classes after an import of one of the packages above.

    It acts after the outermost import alone: during an inner one, a module that ours need may be half imported.
    """

    def __init__(self) -> None:
        self._depth = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in _PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._depth.value = getattr(self._depth, "value", 0) + 1
            try:
                execute(module)
            finally:
                self._depth.value -= 1
            if not self._depth.value:
                self.register_imported()

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def register_imported(self) -> None:
        """Register the config if `AutoConfig` is imported, and the rest if `AutoModel` is, which ends the task."""
        try:
            if _CONFIG_MODULE in sys.modules:
                _register_config()
            if _MODEL_MODULE in sys.modules:
                with suppress(ValueError):
                    # Not there if another thread was faster.
                    sys.meta_path.remove(self)
                _register_models()
        except (ImportError, AttributeError):
            # Another thread is importing one of the modules right now: the next import tries again.
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_querit import QueritConfig

    AutoConfig.register(QueritConfig.model_type, QueritConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    from .configuration_querit import QueritConfig
    from .modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking
    from .tokenization_querit import QueritTokenizer

    AutoModel.register(QueritConfig, QueritForSequenceRanking, exist_ok=True)
    AutoModelForSequenceClassification.register(QueritConfig, QueritForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(QueritConfig, fast_tokenizer_class=QueritTokenizer, exist_ok=True)
