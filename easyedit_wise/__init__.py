"""WISE for EasyEdit: lifelong model editing with routed side memories, as a PEFT tuner.

``import easyedit_wise`` is the one line that an existing EasyEdit script adds, before or
after ``import easyeditor``. It imports neither easyeditor nor matplotlib.
"""

from .easyedit.apply import RestoreWeights, apply_wise_to_model
from .easyedit.hosts import install as _install_into_easyedit
from .easyedit.multimodal import apply_wise_to_multimodal_model
from .easyedit.registry import register, unregister
from .editing.requests import EditRequest
from .editing.stream import EditStream
from .editing.trainer import EditDivergedError
from .hparams import WISEHyperParams, packaged_hparams
from .merging import MERGE_METHODS, merge
from .model_card import write_model_card
from .multimodal_hparams import WISEMultimodalHyperParams
from .persistence import AdapterFileError, load_edits, save_edits
from .sharding import random_mask
from .tuner import Route, WiseConfig, WiseLayer, WiseModel, register_with_peft
from .tuner.attach import attach, detach
from .tuner.switch import edits_chosen, edits_disabled, last_route, use_edits

__version__ = "0.1.0"

__all__ = [
    # EasyEdit
    "WISEHyperParams",
    "apply_wise_to_model",
    "apply_wise_to_multimodal_model",
    "WISEMultimodalHyperParams",
    "RestoreWeights",
    "packaged_hparams",
    "register",
    "unregister",
    # editing
    "EditRequest",
    "EditStream",
    "EditDivergedError",
    # edits as files, on and off
    "save_edits",
    "load_edits",
    "AdapterFileError",
    "write_model_card",
    "edits_disabled",
    "edits_chosen",
    "use_edits",
    "last_route",
    # the PEFT tuner
    "WiseConfig",
    "WiseModel",
    "WiseLayer",
    "Route",
    "attach",
    "detach",
    "register_with_peft",
    # utilities for other methods
    "MERGE_METHODS",
    "merge",
    "random_mask",
]

register_with_peft()
_install_into_easyedit()
