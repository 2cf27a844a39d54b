"""Entry of WISE into PEFT's tables.

PEFT has no plug-in mechanism, and ``register_peft_method`` only takes names that
are members of its own enum. Its tables are dicts keyed by a str-enum, however, so
a str-enum of our own is as good a key, and PEFT's enum stays as it is.
"""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import WiseConfig, WisePeftType
from .model import WiseModel


def register_with_peft() -> None:
    """Make ``get_peft_model``, ``PeftModel.from_pretrained`` and transformers' adapters know WISE.

    Calling it again changes nothing.
    """
    for key in WisePeftType:
        PEFT_TYPE_TO_PREFIX_MAPPING[key] = WiseModel.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[key] = WiseConfig
        PEFT_TYPE_TO_TUNER_MAPPING[key] = WiseModel
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[key] = WiseModel
