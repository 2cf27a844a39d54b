"""EasyEdit's token accuracy of WISE, asked of the text that was trained.

EasyEdit's scorer puts a space between every prompt and target, behind a chat template's end of line, too, and it adds
special tokens to what a template has written. Such a text is not the one that an edit was made for, and not the one
that a user asks. So where the two differ, the evaluation of this package asks; everything else stays EasyEdit's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..evaluation.asking import Query, teacher_forced
from ..separators import AUTO
from ..wording import Wording

SCORER = "test_prediction_acc"


def score_as_trained(host: str, alg_name: str, replace: Callable[[Any, str, Any], None]) -> None:
    """Let a host's scorer ask an algorithm's prompts as its edits are trained.

    Args:
        host: name of the host's package, imported.
        alg_name: as the settings that the scorer is given name it.
        replace: sets an attribute of a module and remembers what it was.
    """
    own = getattr(sys.modules.get(f"{host}.evaluate.evaluate_utils"), SCORER, None)
    if own is None:
        return
    scorer = asked_as_trained(own, alg_name)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{host}.") and module is not None and vars(module).get(SCORER) is own:
            replace(module, SCORER, scorer)


def asked_as_trained(scorer: Callable[..., list[Any]], alg_name: str) -> Callable[..., list[Any]]:
    """EasyEdit's ``test_prediction_acc`` that asks one algorithm's prompts as its edits are trained.

    Args:
        scorer: EasyEdit's own.
        alg_name: the algorithm.
    """

    @functools.wraps(scorer)
    def scored(
        model: Any,
        tok: Any,
        hparams: Any,
        prompts: str | Sequence[str],
        targets: str | Sequence[str],
        device: Any,
        locality: bool = False,
        **options: Any,
    ) -> list[Any]:
        def by_host(some_prompts: Any, some_targets: Any) -> list[Any]:
            return scorer(model, tok, hparams, some_prompts, some_targets, device, locality=locality, **options)

        # Its arithmetic to the letter is scored by its scorer; a locality prompt is nobody's turn in a chat, as there.
        if getattr(hparams, "alg_name", None) != alg_name or getattr(hparams, "padding_counts", False):
            return by_host(prompts, targets)
        chat = bool(getattr(hparams, "use_chat_template", False)) and not locality
        wording = Wording(tok, chat, getattr(hparams, "target_separator", AUTO))
        pairs = list(zip(*([one] if isinstance(one, str) else one for one in (prompts, targets)), strict=True))
        otherwise = [
            prompt.strip() and target.strip() and _differs(wording, prompt, target) for prompt, target in pairs
        ]
        if not any(otherwise):
            return by_host(prompts, targets)
        queries = [Query(prompt, target) for (prompt, target), ours in zip(pairs, otherwise, strict=True) if ours]
        answers = iter(teacher_forced(model, wording, queries))
        results: list[Any] = []
        for (prompt, target), ours in zip(pairs, otherwise, strict=True):
            if not ours:
                results += by_host([prompt], [target])
                continue
            answer = next(answers)
            results.append(list(answer.predicted) if locality else answer.accuracy)
        return results

    return scored


def _differs(wording: Wording, prompt: str, target: str) -> bool:
    return wording.chat or wording.answered(prompt, target) != f"{prompt} {target}"
