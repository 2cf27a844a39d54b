"""WISEHyperParams: EasyEdit's dataclass and YAML format for WISE, validated.

EasyEdit's own WISE files load unmodified and keep their meaning (``presets``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import (
    is_number,
    nearest,
    number_from_scientific_notation,
)
from .consolidation_settings import ConsolidationSettings
from .easyedit_arithmetic import SCORE_ACTIVATION_OF_THE_MODEL, EasyEditArithmetic, activation_of
from .hparams_combinations import check_together
from .hparams_files import packaged_hparams, read_settings
from .hparams_foreign import COMPOUND, check_attributes, values_of
from .hparams_values import check_values
from .multimodal_keys import check_language_model
from .presets import implied_preset, preset_values
from .separators import AUTO


@dataclass
class WISEHyperParams(EasyEditArithmetic, ConsolidationSettings):
    """Settings of WISE. Names follow EasyEdit's YAML keys; the paper's symbols are given in brackets.

    The defaults below are this package's own, the one place where they are written: they hold for any model, since
    steps and margins count in the layer's own units. :meth:`from_preset` gives others' instead.

    Raises:
        ValueError: a value is outside its range; the message names the value, the limit and the cure.
    """

    # What to edit
    inner_params: list[str] | None = None
    """Exactly one value matrix, e.g. ``model.layers[27].mlp.down_proj.weight``. None: the one that the model carries
    edits in; in one without edits its architecture's, in the layer at four fifths of the depth, and the log says which
    (``tuner.value_matrices``)."""
    model_name: str = ""
    alg_name: str = "WISE"
    device: Any = None
    """Read by EasyEdit only; here the device is where the edited layer's weight lies."""

    # Training of one edit
    edit_lr: float = 0.3
    """eta; of "steepest" in ``layer_units``, unless said otherwise. "lion" wants 0.45; the paper's 1.0 is of "sgd"."""
    n_iter: int = 30
    optimizer: str = "steepest"
    """"steepest" with ``consolidation`` and with it alone; without it "sgd" (the paper's), or "adam" or "lion", whose
    steps do not depend on the size of the loss."""
    lr_end: float = 1.0
    """The last iteration's step as a share of the first one's, linear in between; 1 keeps it constant: the loss of a
    long target is still falling when the iterations end, and a short one's stops them long before. "lion" wants 0.1."""
    layer_units: bool = True
    """True: alpha, beta, gamma count in 1/64 of the mean norm of the layer's own output, and edit_lr is the share of
    its own size by which the first step may change it: of "steepest" at the token that changes most, of the others
    where every masked entry pulls alike. Then one set of values fits any model."""
    weight_decay: float = 0.0
    """Decay of dW inside the mask; the paper has none, EasyEdit 1e-5 (see ``decay_whole_matrix``)."""
    norm_constraint: float | None = None
    """Elementwise limit on |dW|, 1.0 in the paper; None switches it off: a solution that is cut solves nothing."""
    objective_optimization: str = "only_label"
    first_token_weight: float = 2.0
    """Weight of the first target token in L_edit; it decides whether generation starts to say the fact."""
    ending: bool = True
    """True: L_edit has one token more than the target, the one with which the model itself would end its last word, so
    that generation does not run on ("1751" as "17511111"). The paper and EasyEdit have none."""
    early_stop_loss: float = 0.005
    early_stop_change: float = 0.02

    # Routing (Eq. 3, 5, 6)
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float | None = None
    """None: epsilon is calibrated from the edits' and irrelevant prompts' own scores. A number: epsilon =
    act_ratio * min over the edits (1.0 is the paper's rule, EasyEdit's files tune it per model)."""
    epsilon_position: float = 0.4
    """Where in the gap between irrelevant prompts (0) and edits (1) a calibrated epsilon lies, of the first memory; of
    each further one nearer to the edits (``calibration.spent_position``)."""
    pooling: str = "loudest"
    """Of a prompt's token scores: "mean" (the paper's code), "max", which finds a subject in long prompts, "last", or
    "loudest": "max", and of 32 tokens or more the mean of the two largest, since one of many is loud by chance."""
    subject_routing: bool = False
    """True: where a request names its subject, its tokens shall activate the memory and the prompt's other
    tokens shall not. Goes with ``pooling: max`` or ``loudest``."""

    # Sharding and merging
    mask_ratio: float = 1.0
    """rho; the paper's is 0.2"""
    save_freq: int | None = 10
    """Edits a shard; merge_freq / save_freq is k. The paper's are 500 and 1000."""
    merge_freq: int = 10
    merge_alg: str = "ties"
    densities: float | None = 1.0
    """The share of each shard that TIES keeps; the paper's is 0.53. A solution is not to be trimmed."""
    weights: float | None = 1.0
    """lambda: each of the k shards weighs weights / k (cancels in operators that take a mean)."""
    retrieve: bool = True
    """False: WISE-Merge, one side memory. True: WISE-Retrieve, a new side memory at every merge."""
    irrelevant_prompts: int = 40
    """Packaged neutral prompts that join the request's own x_i in Eq. 5; a request without one gets at least one."""
    replay: bool = False
    """Appendix B.3: keep the memory in training quiet on edits that other memories hold."""
    rehearsal: float = 0.0
    """Weight c of the rehearsal loss on the shard's earlier edits; 0 switches it off (the paper has none).
    Without ``consolidation`` 0.1 is a good value."""

    # Prefix augmentation
    n_contexts: int = 19
    context_length: int = 10
    contexts_per_step: int | None = 4
    """Contexts of one iteration, the plain prompt among them; the iterations take turns. None: all of them."""
    context_tokens: int | None = 1024
    """Tokens of all contexts of one edit, of which an iteration has a quarter: a long prompt or target gets fewer
    contexts, at least one beside the plain prompt. An iteration's time grows with its tokens, and "steepest" keeps the
    square of their number. None: no limit."""
    use_chat_template: bool = False
    """True: prompts are a user's turns in the tokenizer's chat template, which writes the special tokens: ask as
    ``apply_chat_template(..., add_generation_prompt=True)`` does."""
    target_separator: str = AUTO
    """What stands between a prompt and its target: "auto", "space" or "none" (``separators.gap``). "auto" is a space,
    but for where there is white space already, or the two are written without ("http://", "$", "f(x).", Chinese);
    behind a chat template it is what that writes before an answer. "space": one, unless there is white space. "none":
    none, and white space at the target's end stays, too. A request's own ``target_separator`` comes first."""

    # The rest of EasyEdit's keys
    seed: int = 42
    batch_size: int = 1
    """Edits that are trained together; EasyEdit's ``batch_edit`` hands over as many at once."""
    max_length: int = 30
    model_parallel: bool = False
    fp16: bool = False
    save_path: str | None = None
    load_path: str | None = None
    journal: str | None = None
    """A folder in which every edit is kept the moment it is made, so that a stopped stream goes on and single edits can
    be taken back (docs/journal.md). None: no journal."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def n_shards(self) -> int:
        """k: how many shards one merge folds together."""
        return self.merge_freq // (self.save_freq or self.merge_freq)

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: naming the first value that does not fit, the limit and the cure.
        """
        check_values(self)
        self.validate_arithmetic()
        self.validate_consolidation()
        check_together(self)
        check_attributes(vars(self), _names(self))

    @property
    def act_margin(self) -> list[float]:
        """EasyEdit's name for [alpha, beta, gamma]; assigning it sets the three."""
        return [self.alpha, self.beta, self.gamma]

    @act_margin.setter
    def act_margin(self, margin: Any) -> None:
        self.alpha, self.beta, self.gamma = _margins(margin)

    @property
    def preset(self) -> str:
        """Not kept: a preset fills up what is not named while the settings are made, and here everything has a value.

        Raises:
            AttributeError: when it is read.
            ValueError: when it is assigned.
        """
        raise AttributeError("preset is not kept: it filled up these settings when they were made.")

    @preset.setter
    def preset(self, name: Any) -> None:
        preset_values(name)  # of an unknown one that is the error
        raise ValueError(
            f"preset {name!r} was assigned to settings that are made already, and it cannot be told which of their "
            f"values are to stay: make them with WISEHyperParams.from_preset({name!r}, inner_params, model_name=...), "
            f"or write 'preset: {name}' into the YAML file."
        )

    @classmethod
    def from_preset(cls, preset: str, inner_params: Sequence[str] | None = None, **changes: Any) -> WISEHyperParams:
        """The settings of a preset: "default", "margin", "paper", or "upstream" (EasyEdit's code).

        Args:
            preset: its name.
            inner_params: the value matrix to edit; None: chosen by the model's architecture.
            **changes: settings that override the preset's, EasyEdit's ``act_margin`` among them.

        Raises:
            ValueError: an unknown preset or setting, or a value out of range.
        """
        return cls.from_dict({**changes, "preset": preset, "inner_params": inner_params})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WISEHyperParams:
        """From the mapping of a YAML file, with EasyEdit's ``act_margin: [alpha, beta, gamma]``.

        What it does not name is the preset's that the key ``preset`` names. Without that key, a mapping in EasyEdit's
        terms (``edit_lr``, but neither ``optimizer`` nor ``layer_units``) gets the paper's, any other the defaults.

        Raises:
            ValueError: an unknown key (the nearest known one is named), or a value out of range.
        """
        values = {key: number_from_scientific_notation(value) for key, value in config.items()}
        preset = preset_values(values.pop("preset") if "preset" in values else implied_preset(values))
        if "act_margin" in values:
            values["alpha"], values["beta"], values["gamma"] = _margins(values.pop("act_margin"))
        known = _names(cls)
        unknown = [key for key in values if key not in known]
        check_language_model(unknown)
        if unknown:
            raise ValueError(
                f"unknown WISE setting {unknown[0]!r}{nearest(str(unknown[0]), (*known, *COMPOUND))} "
                f"Known settings: {', '.join(sorted({*known, *COMPOUND}))}."
            )
        return cls(**{**preset, **values})

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> WISEHyperParams:
        """From a YAML file, or from the name of a packaged one such as ``"llama-7b"``.

        Raises:
            FileNotFoundError: neither a file nor a packaged name; the packaged names are listed.
            ValueError: the file is not a YAML mapping or holds a value that does not fit.
        """
        return cls.from_dict(read_settings(hparams_name_or_path))

    @classmethod
    def from_any(cls, hparams: Any) -> WISEHyperParams:
        """From our own, a mapping, or another host's WISE settings object (EasyEdit's dataclass).

        All that was set on the object and is a setting of ours holds, also where its class has no such field.

        Raises:
            ValueError: not a settings object, a value out of range, an attribute that is spelled nearly as a setting,
                or a ``preset`` beside values that contradict it.

        Warns:
            UserWarning: an attribute that means nothing here nor, as far as is known, to EasyEdit.
        """
        if isinstance(hparams, cls):
            hparams.validate()  # EasyEdit and users assign to fields after construction
            return hparams
        if isinstance(hparams, Mapping):
            return cls.from_dict(hparams)
        if not hasattr(hparams, "__dict__"):
            raise ValueError(
                f"hparams is {hparams!r}: give a WISEHyperParams, such as WISEHyperParams.from_hparams('llama-7b')."
            )
        return cls.from_dict(values_of(hparams, _names(cls)))

    def for_model(self, model: Any) -> WISEHyperParams:
        """The same settings with ``score_activation: model`` resolved; themselves where it is anything else.

        Raises:
            ValueError: the model's configuration names no activation function.
        """
        if self.score_activation != SCORE_ACTIVATION_OF_THE_MODEL:
            return self
        return dataclasses.replace(self, score_activation=activation_of(model))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for a JSON file beside results."""
        settings = dataclasses.asdict(self)
        if not isinstance(self.device, (int, str, type(None))):
            settings["device"] = str(self.device)  # EasyEdit may have put a torch.device there
        return settings

    def changes(self) -> dict[str, Any]:
        """The settings that differ from this package's defaults, as plain values."""
        defaults = type(self)(inner_params=self.inner_params).to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


def _names(hparams: WISEHyperParams | type[WISEHyperParams]) -> set[str]:
    return {field.name for field in dataclasses.fields(hparams)}


def _margins(margin: Any) -> list[float]:
    if not isinstance(margin, (list, tuple)) or len(margin) != 3 or not all(map(is_number, margin)):
        raise ValueError(
            f"act_margin is {margin!r}: it must be three numbers [alpha, beta, gamma], "
            "for instance [5.0, 20.0, 10.0] as in the paper."
        )
    return list(map(float, margin))


__all__ = ["WISEHyperParams", "packaged_hparams"]
