"""`pipeline("text-classification")` of a saved folder, which returns the same score as `rank`."""

from __future__ import annotations

from typing import Any

from transformers import TextClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction


class QueritPipeline(TextClassificationPipeline):
    """Scores `{"text": query, "text_pair": document}`, or a list of them, as `rank` does: p1 - p0, in [-1, 1].

    A pipeline of transformers would apply a sigmoid to the logit. Pairs over the limit are cut as by `rank`, unless
    `truncation=False` is given.

    Example:
        ```python
        >>> scorer = pipeline("text-classification", folder, trust_remote_code=True)
        >>> scorer({"text": "who wrote Faust", "text_pair": "Goethe finished Faust in 1831."})
        {'label': 'LABEL_0', 'score': 0.65}
        ```
    """

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:  # type: ignore[override]  # of the base class
        """Tokenize one pair; see `TextClassificationPipeline`."""
        return super().preprocess(inputs, **{"truncation": True} | tokenizer_kwargs)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, **kwargs: Any
    ) -> Any:
        """Give the score, or what `function_to_apply` makes of the logit if one is asked for."""
        if function_to_apply is None:
            model_outputs, function_to_apply = {"logits": model_outputs["score"]}, ClassificationFunction.NONE
        return super().postprocess(model_outputs, function_to_apply=function_to_apply, **kwargs)
