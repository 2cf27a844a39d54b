"""The texts that come with the package: the demo's facts and neutral prompts."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["demo_facts", "neutral_prompts", "other_subjects"]


def _read_json(name: str) -> Any:
    return json.loads(files(__name__).joinpath(name).read_text(encoding="utf-8"))


def demo_facts() -> list[dict[str, Any]]:
    """The demo's 14 facts, each a fresh dictionary that the caller may change.

    Keys: ``prompt``, ``target_new``, ``ground_truth`` (what SmolLM2-135M-Instruct, the demo's
    model, answers before the edit: a true answer in seven facts, a mistake in the other seven),
    ``subject`` (occurs verbatim in the prompt), ``rephrasings`` (two prompts that ask the same),
    ``unrelated`` and ``nearby`` (each a ``{"prompt", "answer"}`` that the edit must leave as it
    is; ``nearby`` asks the same relation of a similar entity).
    """
    facts: list[dict[str, Any]] = _read_json("demo_facts.json")
    return facts


def neutral_prompts() -> tuple[str, ...]:
    """146 prompts about none of the demo's facts: diverse in topic and form, short questions of fact, other forms.

    They stand in for the irrelevant prompt x_i of the routing margin loss (Eq. 5) when an edit
    request brings no ``loc_prompt`` of its own.
    """
    return tuple(_read_json("neutral_prompts.json"))


def other_subjects() -> tuple[str, ...]:
    """Some hundred names of people, places, works, companies and things, none of them in the demo's prompts.

    They take the place of an edit's subject in its own prompt: what then stands there is a near-by
    question, which the edit must leave alone.
    """
    return tuple(_read_json("other_subjects.json"))
