"""An algorithm of the EasyEdit that is installed, in the middle of a stream.

What differs between the two EasyEdits and from one algorithm to the next is here: where its settings class is, what
the tokenizer and the layers have to look like, and what stands around the edited model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import nearest
from ..evaluation.datasets import Request
from ..evaluation.lifelong import RouteProbe
from . import wheel
from .covariance import second_moments_of_samples, second_moments_of_texts
from .host_settings import Algorithms, host_settings, method_of
from .host_state import RunState
from .registry import HOST

WISE = "WISE"
UPSTREAM_WISE = "upstream-WISE"


# GRACE's layer: the position of the one token that it compares with its keys.
KEY_POSITION = "key_id"
# Methods for which EasyEdit's editor pads on the right: they count tokens of a prompt from its start.
_PADDED_RIGHT = frozenset({"ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE"})


class HostStream:
    """An algorithm of the EasyEdit that is installed; each edit starts from the model that the one before left.

    GRACE answers by one token of a query, whose position it keeps (``key_id``): that of the latest edit, or of the
    first prompt that was generated from. Here it is each query's own, the last token of its prompt, and queries are
    asked one by one, so that no two have to share it.

    What a method keeps in its modules, and what it writes, is this run's own (:mod:`.host_state`).

    Raises:
        ImportError: EasyEdit is not installed, or misses a package.
        ValueError: it has no such algorithm, or the settings do not fit.
    """

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
        self.one_by_one = False
        algorithms = _algorithms()
        if name not in algorithms:
            raise ValueError(
                f"{name!r} is no algorithm{nearest(name, (*algorithms, UPSTREAM_WISE))} "
                f"There are {', '.join(sorted({*algorithms, WISE}))}, and {UPSTREAM_WISE} with a checkout of EasyEdit."
            )
        self._name, self._apply = name, _of_this_run(algorithms[name])
        self._state = RunState()
        with quiet():
            self._hparams = host_settings(name, algorithms, config, model, self._state.folder)
        self._module = sys.modules[self._apply.__module__]
        self._tok = _prepared(tok, method_of(name, config))
        self.settings = {**config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._random_state = _random_state()
        if hasattr(self._module, "COV_CACHE"):
            with self._state.entered():
                self._fill_covariances(stats_texts, seed)

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        """Make these edits on top of the earlier ones."""
        for request in requests:
            with (
                quiet(),
                self._state.entered(),
                torch.random.fork_rng(),
                layers_answer_with_tuples(self.model, self._hparams),
            ):
                _set_random_state(self._random_state)
                self.model = _language_model(self._edited(request))
                self._random_state = _random_state()
            self._point_at_prompts()
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

    def _point_at_prompts(self) -> None:
        """Let layers that look at one token of a query look at the last one of its prompt from now on."""
        keyed = [module for module in self.model.modules() if hasattr(module, KEY_POSITION)]
        if not keyed or self.one_by_one:
            return
        self.one_by_one = True

        def point(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Who asks wants logits from the prompt's last token on. An edit wants all, and sets the position itself.
            kept = kwargs.get("logits_to_keep")
            if kept:
                for module in keyed:
                    setattr(module, KEY_POSITION, kwargs["input_ids"].shape[1] - kept)

        self.model.register_forward_pre_hook(point, with_kwargs=True)

    def _fill_covariances(self, texts: Sequence[str] | None, seed: int) -> None:
        """Put E[k k^T] of the unedited model where MEMIT looks first, unless ``stats_dir`` has a file of it."""
        hparams, path = self._hparams, self.model.config._name_or_path
        name = path.replace("/", "_")
        modules = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
        in_files = name if wheel.is_bridged(sys.modules.get(HOST)) else path.rsplit("/")[-1]
        folder = Path(hparams.stats_dir) / in_files / f"{hparams.mom2_dataset}_stats"
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


def _algorithms() -> Algorithms:
    """EasyEdit's registry.

    Raises:
        ImportError: EasyEdit is not there, or misses a package.
    """
    try:
        with quiet():
            algorithms: Algorithms = importlib.import_module(f"{HOST}.util.alg_dict").ALG_DICT
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == HOST:
            raise ImportError(
                "EasyEdit is not importable, and every algorithm but WISE is its own: put a checkout of "
                "https://github.com/zjunlp/EasyEdit on PYTHONPATH, or install the wheel with "
                f"'pip install --no-deps easyeditor=={wheel.WHEEL_VERSION}'."
            ) from error
        spec = importlib.util.find_spec(HOST)
        folder = next(iter((spec.submodule_search_locations if spec else None) or ["?"]))
        raise ImportError(
            f"EasyEdit in {folder} cannot be imported: it needs the package that provides {error.name!r}, which is not "
            "installed. Install it, and what EasyEdit's requirements.txt names besides; or take that folder off "
            "PYTHONPATH and run the PyPI wheel, which does without: "
            f"pip install --no-deps easyeditor=={wheel.WHEEL_VERSION}."
        ) from error
    return algorithms


def _of_this_run(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The same; of a method of an object that EasyEdit keeps, which holds on to a model, that of a new one."""
    owner = getattr(apply, "__self__", None)
    if owner is None:
        return apply
    fresh: Callable[..., Any] = getattr(type(owner)(), apply.__name__)
    return fresh


def _language_model(model: Any) -> Any:
    """The model inside what an algorithm answers with: GRACE's has no ``forward``, and cannot be edited again."""
    while getattr(type(model), "forward", None) is nn.Module.forward and isinstance(
        getattr(model, "model", None), nn.Module
    ):
        model = model.model
    return model


def _prepared(tok: Any, name: str) -> Any:
    """A copy of the tokenizer as EasyEdit's editor prepares it: padded left, but right for ROME and its kind."""
    prepared = copy.deepcopy(tok)
    prepared.padding_side = "right" if name in _PADDED_RIGHT else "left"
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
