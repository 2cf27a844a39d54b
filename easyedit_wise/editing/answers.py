"""What a call of a module gave: what it returned, and what it left in a mapping that it was handed.

A decoder whose later layers use the keys and values of earlier ones (Gemma 3n, Gemma 4) hands a mapping through its
layers. A layer that answers from a recording has to leave there what it left before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

# Of each mapping among a call's arguments, by position or name: its entries.
Entries = dict[int | str, dict[Any, Any]]


@dataclass(frozen=True)
class Answer:
    """What one call gave.

    Attributes:
        output: what it returned.
        written: of each mapping among its arguments, by position or name: the entries that it set.
    """

    output: Any
    written: Entries

    @classmethod
    def of(cls, output: Any, before: Entries, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
        """A copy of what a call gave that was handed ``before``, see :func:`entries`."""
        written = {
            key: {name: copied(value) for name, value in now.items() if before[key].get(name) is not value}
            for key, now in entries(args, kwargs).items()
        }
        return cls(copied(output), {key: values for key, values in written.items() if values})

    def unread(self) -> Answer:
        """The same with nothing in its output, see :func:`stood_in`."""
        return replace(self, output=stood_in(self.output))

    def again(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Give it to a call with these arguments: a copy, because the model's own code may go on in place."""
        for key, values in self.written.items():
            mapping = args[key] if isinstance(key, int) else kwargs[key]
            mapping.update(copied(values))
        return copied(self.output)


def entries(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Entries:
    """What the mappings among a call's arguments hold."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: dict(value) for key, value in given if isinstance(value, MutableMapping)}


def copied(output: Any) -> Any:
    """The same output with tensors of its own: a tensor, a tuple, a list, or a mapping such as a ModelOutput."""
    return _mapped(output, lambda value: value if _is_stand_in(value) else value.detach().clone())


def stood_in(output: Any) -> Any:
    """The same output with nothing in it: floating tensors become one NaN in the tensor's shape.

    If later code reads it after all, its results are NaN, and if it writes to it, torch raises.
    """
    return _mapped(
        output,
        lambda value: (
            value.new_full((), float("nan")).expand(value.shape) if value.is_floating_point() else value.clone()
        ),
    )


def _is_stand_in(value: Tensor) -> bool:
    return value.dim() > 0 and not any(value.stride()) and value.numel() > 1


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(value, change) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(value, change) for value in output)
    if isinstance(output, dict):
        copies = {key: _mapped(value, change) for key, value in output.items()}
        return copies if type(output) is dict else type(output)(**copies)
    return output
