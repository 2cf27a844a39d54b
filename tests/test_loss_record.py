"""Losses that are read late decide the same as losses that are read at once."""

from __future__ import annotations

import pytest
import torch

from easyedit_wise.editing.loss_record import LossRecord

CPU = torch.device("cpu")


def record(n_groups: int = 1, lag: int = 0, **changes: float) -> LossRecord:
    options = {"limit": 0.5, "change": 0.1, **changes}
    return LossRecord(20, n_groups, options["limit"], options["change"], CPU, lag=lag)


def feed(losses: LossRecord, values: list[float]) -> int:
    """How many iterations were begun before the host stopped."""
    for count, value in enumerate(values, 1):
        losses.add(torch.tensor(value), torch.tensor(value / 2))
        if losses.stopped():
            return count
    losses.finish()
    return len(values)


@pytest.mark.parametrize(
    ("values", "n_groups", "stops_at"),
    [
        ([3.0, 0.4, 0.35, 0.3], 1, 3),  # 3.0 to 0.4 is a change, 0.4 to 0.35 is none
        ([3.0, 0.6, 0.55, 0.52], 1, None),  # steady, but not small
        ([0.4, 0.4], 1, 2),
        ([0.4], 1, None),  # one loss has no change to look at
        ([0.4, 0.9, 0.4, 0.4, 0.4], 2, 5),  # a turn is small when all of it is: (0.4, 0.4) after (0.9, 0.4)
        ([0.4, 0.4, 0.4], 2, 3),
    ],
)
@pytest.mark.parametrize("lag", [0, 1, 4])
def test_when_it_has_settled(values: list[float], n_groups: int, stops_at: int | None, lag: int) -> None:
    losses = record(n_groups, lag)
    padded = values + [9.0] * lag if stops_at is None else values + [0.0] * lag
    begun = feed(losses, padded)
    if stops_at is None:
        assert not losses.settled
        assert losses.losses == pytest.approx(padded)
    else:
        assert bool(losses.settled)
        assert begun == stops_at + lag
        # What came after it settled is not part of the record, however late that was noticed.
        assert losses.losses == pytest.approx(values[:stops_at])
        assert losses.edit_losses == pytest.approx([value / 2 for value in values[:stops_at]])


def test_settled_is_known_on_the_device_before_the_host_looks() -> None:
    losses = record(lag=4)
    for value in (0.4, 0.4, 5.0):
        losses.add(torch.tensor(value), torch.tensor(value))
        assert not losses.stopped()
    assert bool(losses.settled)  # and it stays so, whatever the later losses are
    assert losses.reads_late
    losses.finish()
    assert losses.losses == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("lag", [0, 2])
def test_a_loss_that_is_no_number_is_found(lag: int) -> None:
    losses = record(lag=lag)
    with pytest.raises(FloatingPointError) as caught:
        feed(losses, [1.0, float("inf"), 1.0, 1.0, 1.0])
    assert caught.value.args == (float("inf"),)
    assert len(losses.losses) == 2


def test_one_in_the_last_iterations_too() -> None:
    losses = record(lag=4)
    with pytest.raises(FloatingPointError):
        feed(losses, [1.0, float("nan")])


def test_the_callback_hears_of_all_in_order() -> None:
    seen: list[tuple[int, float]] = []
    losses = LossRecord(9, 1, 0.0, 0.0, CPU, lambda *step: seen.append(step), lag=3)
    feed(losses, [5.0, 4.0, 3.0, 2.0, 1.0])
    assert seen == [(0, 5.0), (1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
