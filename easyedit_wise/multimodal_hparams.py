"""WISEMultimodalHyperParams: WISE's settings, and what EasyEdit's MultimodalEditor reads beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_switch
from .hparams import WISEHyperParams


@dataclass
class WISEMultimodalHyperParams(WISEHyperParams):
    """Settings of WISE on a vision-language model; EasyEdit's multimodal files load unmodified.

    Raises:
        ValueError: a value is outside its range; the message names the value, the limit and the cure.
    """

    any_image: bool = False
    """True: an edit that comes with an image holds whatever the image shows, so that its text alone is what is learned.
    False: such an edit is refused, since its fact may be what the image shows."""

    # Read by EasyEdit only
    name: str | None = None
    tokenizer_class: str | None = None
    tokenizer_name: str | None = None
    dtype: Any = torch.float32
    """Of the model and of the images; a name such as ``torch.bfloat16`` in a file."""
    qformer_name_or_path: str | None = None
    qformer_checkpoint: str | None = None
    state_dict_file: str | None = None
    pretrained_ckpt: str | None = None
    hidden_act: str | None = None
    exact_match: bool = False
    file_type: str | None = None
    coco_image: str | None = None
    rephrase_image: str | None = None
    sequential_edit: bool = False

    def validate(self) -> None:
        """Check every field, and take a dtype by its name.

        Raises:
            ValueError: naming the first value that does not fit, the limit and the cure.
        """
        super().validate()
        check_switch("any_image", self.any_image)
        if isinstance(self.dtype, str):
            self.dtype = getattr(torch, self.dtype.removeprefix("torch."), self.dtype)
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}: it must be one of PyTorch's, for instance torch.bfloat16.")

    def to_dict(self) -> dict[str, Any]:
        """WISE's settings as plain values; not what EasyEdit alone reads, which edits do not depend on."""
        own = {field.name for field in dataclasses.fields(WISEHyperParams)}
        return {name: value for name, value in super().to_dict().items() if name in own}
