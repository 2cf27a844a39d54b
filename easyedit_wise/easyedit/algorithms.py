"""Editing algorithms by name, each in the middle of a stream: ours, EasyEdit's, and EasyEdit's own WISE.

All have the shape of :class:`~easyedit_wise.evaluation.lifelong.StreamEditor`, so one protocol scores them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import nearest, number_from_scientific_notation
from ..data import neutral_prompts
from ..evaluation.datasets import Request
from ..evaluation.lifelong import RouteProbe, StreamEditor
from ..hparams import WISEHyperParams
from ..hparams_files import read_settings
from .covariance import second_moments_of_samples, second_moments_of_texts
from .registry import HOST
from .upstream import UpstreamWise, load_upstream, why_not
from .wise_stream import WiseStream

WISE = "WISE"
UPSTREAM_WISE = "upstream-WISE"


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

    Raises:
        FileNotFoundError: neither a file nor a packaged name.
        ValueError: not a YAML mapping, or for WISE a setting that does not fit.
    """
    config = read_settings(hparams, name)
    merged = {**config, **changes}
    if "act_margin" in config and {"alpha", "beta", "gamma"} & changes.keys():
        merged["alpha"], merged["beta"], merged["gamma"] = merged.pop("act_margin")
        merged |= changes
    numbers = {key: number_from_scientific_notation(value) for key, value in merged.items()}
    return WISEHyperParams.from_dict(numbers).to_dict() if name == WISE else numbers


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


class HostStream:
    """An algorithm of the EasyEdit that is installed; each edit starts from the model that the one before left.

    Raises:
        ImportError: EasyEdit is not installed.
        ValueError: it has no such algorithm, or the settings do not fit.
    """

    one_by_one = False
    use_cache = True
    route_probe: RouteProbe | None = None

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tok: Any,
        config: Mapping[str, Any],
        seed: int,
        stats_texts: Sequence[str] | None,
    ) -> None:
        self.model: Any = model
        with quiet():
            algorithms = importlib.import_module(f"{HOST}.util.alg_dict").ALG_DICT
        if name not in algorithms:
            raise ValueError(
                f"{name!r} is no algorithm{nearest(name, (*algorithms, UPSTREAM_WISE))} "
                f"There are {', '.join(sorted({*algorithms, WISE}))}, and {UPSTREAM_WISE} with a checkout of EasyEdit."
            )
        self._name, self._apply = name, algorithms[name]
        self._hparams = _host_settings(name, {**config, "device": str(next(model.parameters()).device)})
        self._module = sys.modules[self._apply.__module__]
        # Both are kept by the host for the life of the process; another model or seed must not find them.
        for cache, empty in (("CONTEXT_TEMPLATES_CACHE", None), ("COV_CACHE", {})):
            if hasattr(self._module, cache):
                setattr(self._module, cache, empty)
        self._tok = _prepared(tok, name)
        self.settings = {**config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._random_state = _random_state()
        if hasattr(self._module, "COV_CACHE"):
            self._fill_covariances(stats_texts, seed)

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        """Make these edits on top of the earlier ones."""
        for request in requests:
            with quiet(), torch.random.fork_rng(), layers_answer_with_tuples(self.model, self._hparams):
                _set_random_state(self._random_state)
                self.model = self._edited(request)
                self._random_state = _random_state()
            on_edit()

    def holders(self) -> list[str] | None:
        """There are no memories."""
        return None

    def _edited(self, request: Request) -> Any:
        try:
            model, _ = self._apply(self.model, self._tok, [dict(request)], self._hparams)
        except Exception as error:  # whatever it is, the user has to know which algorithm and edit
            raise RuntimeError(
                f"EasyEdit's {self._name} failed on the edit {request['prompt']!r} -> {request['target_new']!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return model

    def _fill_covariances(self, texts: Sequence[str] | None, seed: int) -> None:
        """Put E[k k^T] of the unedited model where MEMIT looks first, unless ``stats_dir`` has a file of it."""
        hparams, name = self._hparams, self.model.config._name_or_path.replace("/", "_")
        modules = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
        folder = Path(hparams.stats_dir) / name / f"{hparams.mom2_dataset}_stats"
        ending = f"{hparams.mom2_dtype}_mom2_{hparams.mom2_n_samples}.npz"
        missing = [module for module in modules if not (folder / f"{module}_{ending}").exists()]
        if not missing:
            self.settings["covariances"] = str(folder)
            return
        if texts is None:
            moments, n = second_moments_of_samples(self.model, self._tok, missing, seed)
        else:
            moments, n = second_moments_of_texts(self.model, self._tok, missing, texts)
        source = "texts that the model wrote" if texts is None else "the text given"
        self.settings["covariances"] = f"{n} tokens of {source}"
        self._module.__dict__["COV_CACHE"].update({(name, module): moments[module] for module in missing})


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """Of the global generators, which EasyEdit's algorithms draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _host_settings(name: str, config: Mapping[str, Any]) -> Any:
    """The host's own settings object. Its class is called ``ROMEHyperParams`` and the like."""
    wanted = f"{name}HyperParams".casefold().replace("-", "")
    places = [module for key, module in sys.modules.items() if key.split(".")[:2] == [HOST, "models"] and module]
    found = (value for module in places for key, value in vars(module).items() if key.casefold() == wanted)
    cls: Any = next(found, None)
    if not hasattr(cls, "__dataclass_fields__"):
        raise ValueError(f"{HOST} has no settings class for {name}: it cannot be run in a stream.")
    known = {one.name for one in dataclasses.fields(cls)}
    unknown = [key for key in config if key not in known]
    if unknown:
        raise ValueError(f"unknown {name} setting {unknown[0]!r}{nearest(unknown[0], tuple(known))}")
    try:
        return cls(**config)
    except TypeError as error:
        raise ValueError(f"the settings of {name} are not complete: {error}.") from error


def _prepared(tok: Any, name: str) -> Any:
    """The tokenizer as EasyEdit's editor prepares it: padded left, but for ROME and MEMIT right; a copy."""
    import copy

    prepared = copy.deepcopy(tok)
    prepared.padding_side = "right" if name in ("ROME", "MEMIT") else "left"
    prepared.pad_token = prepared.pad_token or prepared.eos_token
    # FT compares targets with it, and fails where there is none.
    prepared.unk_token = prepared.unk_token or prepared.pad_token
    return prepared


@contextlib.contextmanager
def layers_answer_with_tuples(model: nn.Module, hparams: Any) -> Iterator[None]:
    """Inside, the decoder layers that ``layer_module_tmp`` names give (hidden,), as before transformers 5.

    ROME and MEMIT in EasyEdit's wheel take the first item of a layer's output. What the next layer and the final
    norm are given is unpacked again, so the model computes what it did.
    """
    template, norm = getattr(hparams, "layer_module_tmp", None), getattr(hparams, "ln_f_module", None)
    handles = []
    if template and norm:
        names = {template.format(i) for i in range(getattr(model.config, "num_hidden_layers", 0))}
        layers = [module for name, module in model.named_modules() if name in names]
        for layer in layers:
            handles.append(layer.register_forward_hook(lambda _, args, out: out if isinstance(out, tuple) else (out,)))
        for module in (*layers, model.get_submodule(norm)):
            handles.append(module.register_forward_pre_hook(_unpack))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unpack(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][0], *args[1:]) if args and isinstance(args[0], tuple) else args


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """EasyEdit prints every step: inside, its prints and messages below warnings go nowhere."""
    logger = logging.getLogger(HOST)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
