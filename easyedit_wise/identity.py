"""By what name this code is installed: as a package of its own, or as a method inside EasyEdit.

The tree that is proposed to EasyEdit (``easyedit-wise upstream-tree``) has a file of its own in this one's place.
"""

from __future__ import annotations

DISTRIBUTIONS: tuple[str, ...] = ("easyedit-wise",)
"""Installed distributions whose versions say which code made an edit."""

HOW_TO_GET_IT = "With `pip install easyedit-wise`"
"""The beginning of a sentence that says what has to be there before saved edits can be loaded."""
