"""What EasyEdit's settings for vision-language models have beside WISE's own: how the model is loaded and scored."""

from __future__ import annotations

from collections.abc import Iterable

# Each is read by EasyEdit alone.
OF_THE_HOST = (
    "name",
    "tokenizer_class",
    "tokenizer_name",
    "dtype",
    "qformer_name_or_path",
    "qformer_checkpoint",
    "state_dict_file",
    "pretrained_ckpt",
    "hidden_act",
    "exact_match",
    "file_type",
    "coco_image",
    "rephrase_image",
    "sequential_edit",
)
# Users try this one in a file for a language model, too, where an editor's argument says it.
_OF_IMAGES = frozenset(OF_THE_HOST) - {"sequential_edit"}


def check_language_model(unknown: Iterable[object]) -> None:
    """Whether settings that WISE does not know are those of a vision-language model.

    Raises:
        ValueError: they are; the class that reads them is named.
    """
    keys = [str(key) for key in unknown]
    of_images = sorted(_OF_IMAGES & set(keys))
    if of_images:
        raise ValueError(
            f"these are settings of a vision-language model (they have {', '.join(of_images)}): read them with "
            "easyedit_wise.WISEMultimodalHyperParams, which keeps for EasyEdit's MultimodalEditor what only it reads. "
            "apply_wise_to_model takes that class, too."
        )
