"""Configuration of the WISE tuner."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from transformers.activations import ACT2FN

from ..routing import POOLINGS
from .adapter_tensors import check_save_dtype
from .fingerprint import check_fingerprint

MEMORY_STAGES = ("live", "shard", "merged")


class WisePeftType(str, enum.Enum):
    """PEFT's type key for WISE. PEFT's own enum is not patched (see ``registration``)."""

    WISE = "WISE"


@dataclass
class WiseConfig(PeftConfig):
    """What an adapter of WISE is: where it sits and how it routes.

    Args:
        target_modules: the value matrix to attach to, by name, as in any PEFT config. In WISE one
            layer, e.g. ``["model.layers.27.mlp.down_proj"]``.
        exclude_modules: names to leave out.
        layers_to_transform: layer indices, if ``target_modules`` names a module of every layer.
        layers_pattern: name of the layer list for ``layers_to_transform``.
        modules_to_save: further modules to train and save whole.
        mask_ratio: rho, the share of the matrix that one shard may change.
        seed: seed of the live shard's mask.
        init_weights: True starts with dW = 0, the unedited model. False draws dW at random, a live shard's inside its
            mask, so that the memory answers every query: for tests, as in PEFT's other methods.
        pooling: how a sequence's score is pooled over its tokens ("mean", "max", "last", "loudest").
        score_activation: None for Eq. 3; a name such as "silu" for EasyEdit's variant.
        relative_scores: the score of a token is divided by its activation's norm, and of several memories that exceed
            their epsilon the newest answers that scores as on an edit of its own, on more than a few tokens
            (``routing.choose_memory``).
        memories: the stage of each side memory, in order ("live", "shard", "merged"). Kept
            up to date by the layer, so that a saved adapter can be rebuilt before its weights load.
        save_dtype: what dW is rounded to in files ("float32", "bfloat16", "float16"); in a model it is fp32.
        base_fingerprint: by what each layer's base weight is known again, by the layer's name (see ``fingerprint``).
            Filled when the adapter is created; an adapter that has it goes onto that base only. None: onto any.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the value matrix that the side memory is attached to."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names to leave out."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers, if target_modules names a module of each."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    mask_ratio: float = field(default=0.2, metadata={"help": "rho: share of the matrix a shard may change."})
    seed: int = field(default=42, metadata={"help": "Seed of the live shard's mask."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: dW starts at zero. False: it is random, for tests."}
    )
    pooling: str = field(default="mean", metadata={"help": "Pooling of the score over a sequence's tokens."})
    score_activation: str | None = field(
        default=None, metadata={"help": "None: Eq. 3. A name: EasyEdit's variant with that activation."}
    )
    relative_scores: bool = field(
        default=False, metadata={"help": "Divide the score by the activation's norm, and compare it with epsilon."}
    )
    memories: list[str] = field(
        default_factory=lambda: ["live"], metadata={"help": "Stage of each side memory, in order."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "What dW is rounded to in files: float32 (not at all), bfloat16, float16."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "By what the base weight is known again; None: the adapter goes onto any base."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = WisePeftType.WISE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]  # likewise
        self._check_kinds()
        if not 0.0 < self.mask_ratio <= 1.0:
            raise ValueError(
                f"mask_ratio (rho) is {self.mask_ratio}, outside (0, 1]: it is the share of the side memory that one "
                "shard may change; the paper uses 0.2."
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}: choose one of {', '.join(POOLINGS)}.")
        unknown = [stage for stage in self.memories if stage not in MEMORY_STAGES]
        if unknown:
            raise ValueError(
                f"memories holds the stage {unknown[0]!r}: a side memory is one of {', '.join(MEMORY_STAGES)}."
            )
        check_save_dtype(self.save_dtype)
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, dict):
            raise ValueError(
                f"base_fingerprint is {self.base_fingerprint!r}: it is a fingerprint for each layer's name, or None."
            )
        for known in (self.base_fingerprint or {}).values():
            check_fingerprint(known)

    def _check_kinds(self) -> None:
        """A configuration may come from any file, and what is of another kind would fail in the middle of something."""
        number = isinstance(self.mask_ratio, (int, float)) and not isinstance(self.mask_ratio, bool)
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool) and -(2**63) <= self.seed < 2**64
        wrong = {
            "mask_ratio": (not number, "a number"),
            "seed": (not whole, "a whole number of at most 64 bits"),
            "pooling": (not isinstance(self.pooling, str), "a text"),
            "save_dtype": (not isinstance(self.save_dtype, str), "a text"),
            "relative_scores": (not isinstance(self.relative_scores, bool), "true or false"),
            "memories": (not _are_texts(self.memories), "a list of texts"),
            "modules_to_save": (
                not (self.modules_to_save is None or _are_texts(self.modules_to_save)),
                "texts or None",
            ),
            "score_activation": (
                not (self.score_activation is None or _is_activation(self.score_activation)),
                "None or the name of an activation function of transformers",
            ),
        }
        for name, (is_wrong, kind) in wrong.items():
            if is_wrong:
                raise ValueError(f"{name} is {str(getattr(self, name))[:80]!r}: it must be {kind}.")


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple, set)) and all(isinstance(value, str) and value for value in values)


def _is_activation(name: Any) -> bool:
    return isinstance(name, str) and name in ACT2FN
