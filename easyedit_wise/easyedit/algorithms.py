"""Editing algorithms by name, each in the middle of a stream: ours, EasyEdit's, and EasyEdit's own WISE.

All have the shape of :class:`~easyedit_wise.evaluation.lifelong.StreamEditor`, so one protocol scores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import number_from_scientific_notation
from ..data import neutral_prompts
from ..evaluation.datasets import Request
from ..evaluation.lifelong import RouteProbe, StreamEditor
from ..hparams import WISEHyperParams
from ..hparams_files import read_settings
from .host_settings import BASE_METHOD, BASE_SETTINGS
from .host_stream import UPSTREAM_WISE, WISE, HostStream
from .upstream import UpstreamWise, load_upstream, why_not
from .wise_stream import WiseStream


def make_editor(
    name: str,
    model: nn.Module,
    tok: Any,
    config: dict[str, Any],
    seed: int = 0,
    stats_texts: Sequence[str] | None = None,
    journal: Path | None = None,
) -> tuple[StreamEditor, dict[str, Any]]:
    """An editor on a model without edits.

    Args:
        name: ``WISE``; ``upstream-WISE``, EasyEdit's own from the checkout that ``EASYEDIT_HOME`` names; or what the
            installed EasyEdit calls an algorithm (``ROME``, ``FT``, ``MEMIT``, ...).
        model: edited in place.
        tok: its tokenizer.
        config: its settings, as :func:`settings_of` gives them.
        seed: of the random numbers that EasyEdit's algorithms draw. WISE has its own setting ``seed``.
        stats_texts: for MEMIT's covariances; None lets the model write texts.
        journal: for WISE, the folder in which each edit is kept when it is made; what it holds is on the model at once.

    Returns:
        (the editor, all its settings as plain values).

    Raises:
        ValueError: no such algorithm, or settings that do not fit.
        ImportError: EasyEdit is not installed, or ``EASYEDIT_HOME`` does not name a checkout.
    """
    if name == WISE:
        wise = WISEHyperParams.from_dict(config)
        return WiseStream(model, tok, wise, journal), wise.to_dict()
    if name == UPSTREAM_WISE:
        upstream = load_upstream()
        if upstream is None:
            raise ImportError(why_not() or "EasyEdit's checkout cannot be loaded.")
        return UpstreamStream(upstream, model, tok, config), {**config, "easyedit": upstream.commit}
    editor = HostStream(name, model, tok, config, seed, stats_texts)
    return editor, editor.settings


def settings_of(name: str, hparams: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of an algorithm's YAML file with some values changed; of WISE all settings, defaults included.

    Where the file names a base method (SimIE's), that one's settings are among them, as ``base_hparams``.

    Raises:
        FileNotFoundError: neither a file nor a packaged name.
        ValueError: not a YAML mapping, or for WISE a setting that does not fit.
    """
    config = read_settings(hparams, name)
    merged = {**config, **changes}
    if "act_margin" in config and {"alpha", "beta", "gamma"} & changes.keys():
        merged["alpha"], merged["beta"], merged["gamma"] = merged.pop("act_margin")
        merged |= changes
    if BASE_METHOD in merged and BASE_SETTINGS not in merged:
        merged[BASE_SETTINGS] = settings_of(str(merged[BASE_METHOD]), _beside(hparams, name, merged[BASE_METHOD]), {})
    numbers = {key: number_from_scientific_notation(value) for key, value in merged.items()}
    return WISEHyperParams.from_dict(numbers).to_dict() if name == WISE else numbers


def _beside(hparams: str | Path, name: str, base: str) -> str:
    """The base method's settings of the same name: in the folder beside, as for EasyEdit, or packaged."""
    path = Path(hparams)
    return str(path.parent.parent / base / path.name) if path.parent.name == name else path.stem


class UpstreamStream:
    """EasyEdit's own WISE. Its route is one for a whole batch and is taken anew at every decode step, so it is asked
    one prompt at a time and without a cache, as EasyEdit's own evaluation does."""

    one_by_one = True
    use_cache = False
    route_probe: RouteProbe | None = None

    def __init__(self, upstream: UpstreamWise, model: nn.Module, tok: Any, config: dict[str, Any]) -> None:
        self.model: Any = model
        self._upstream, self._tok = upstream, tok
        self._config = {**config, "device": str(next(model.parameters()).device)}
        upstream.start(model, tok, self._config)
        self._irrelevant = cycle(neutral_prompts())

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        """Make these edits; one without an irrelevant prompt, which EasyEdit cannot do without, gets a neutral one."""
        for request in requests:
            complete = request if "loc_prompt" in request else {**request, "loc_prompt": next(self._irrelevant)}
            self._upstream.edit(self.model, self._tok, [complete], self._config)
            on_edit()

    def holders(self) -> list[str] | None:
        """Not known."""
        return None
