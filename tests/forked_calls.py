"""Functions in processes of their own, forked from one that has imported what they need and done nothing."""

import gc
import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# There is one such process for all tests: what any of them imports. Backbones and plots are imported when first used.
CONTEXT.set_forkserver_preload(
    [
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "peft",
        "sentence_transformers",
        "torch.utils.tensorboard",
        "transformers.models.deepseek_v3.modeling_deepseek_v3",
        "transformers.models.qwen3.modeling_qwen3",
        "modeling_querit.adaptation.pipeline",
        "modeling_querit.training.train",
    ]
)


def exit_code_of(function, *arguments):
    """The exit code of a function in a process of its own: negative if a signal killed it."""
    process = CONTEXT.Process(target=_call, args=(function, *arguments))
    process.start()
    process.join()
    return process.exitcode


def _call(function, *arguments):
    # The collector would read, and so copy, all that was imported.
    gc.freeze()
    function(*arguments)
