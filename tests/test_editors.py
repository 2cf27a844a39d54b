"""What stands around the calls of EasyEdit's ``BaseEditor``, on a small editor that calls as the real ones do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from editing_helpers import FACTS, requests, settings, stream_on

from easyedit_wise import WISEHyperParams, apply_wise_to_model, detach
from easyedit_wise.easyedit import saving
from easyedit_wise.easyedit.editors import around_wise
from easyedit_wise.tuner.model import find_wise_layers

PROMPTS = [prompt for prompt, _ in FACTS]


class Host:
    """``edit`` calls ``edit_requests``; a sequence is saved at its end where the host does that."""

    saves = False

    def __init__(self, model: Any, tok: Any, hparams: Any, apply_algo: Any = apply_wise_to_model) -> None:
        self.model, self.tok, self.hparams, self.apply_algo = model, tok, hparams, apply_algo

    def edit(self, wanted: Sequence[Any], sequential_edit: bool = False) -> Any:
        return self.edit_requests(wanted, sequential_edit)

    def edit_requests(self, wanted: Sequence[Any], sequential_edit: bool = False) -> Any:
        for request in wanted:
            model, restore = self.apply_algo(self.model, self.tok, [request], self.hparams, train_ds=None)
            if not sequential_edit:
                restore()
        if sequential_edit and self.saves and self.hparams.save_path:
            model.save(self.hparams.save_path)
        return ["metrics"], model, restore

    def normal_edit(self, wanted: Sequence[Any]) -> Any:
        model, restore = self.apply_algo(self.model, self.tok, wanted, self.hparams)
        for _ in restore.items():
            pass
        return None, model, restore


class SavingHost(Host):
    saves = True


def wrapped(host: type[Host]) -> Any:
    names = ("edit", "edit_requests", "normal_edit")
    return type(host.__name__, (host,), {name: around_wise(getattr(host, name), apply_wise_to_model) for name in names})


HOSTS = pytest.mark.parametrize("host", [wrapped(Host), wrapped(SavingHost)], ids=["never saves", "saves sequences"])


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    save = saving.save_edits

    def counted(model: Any, path: Any, *rest: Any, **options: Any) -> Any:
        written.append(Path(path).name)
        return save(model, path, *rest, **options)

    monkeypatch.setattr(saving, "save_edits", counted)
    return written


def saved(folder: Path) -> list[str]:
    return [edit["prompt"] for edit in json.loads((folder / "wise_edits.json").read_text())["edits"]]


@HOSTS
@pytest.mark.parametrize("call", ["edit", "edit_requests"])
def test_a_sequence_is_saved_once(
    llama: Any, tok: Any, tmp_path: Path, writes: list[str], host: Any, call: str
) -> None:
    editor = host(llama, tok, settings(save_path=str(tmp_path / "edits")))
    getattr(editor, call)(requests(3), sequential_edit=True)
    assert writes == ["edits"]
    assert saved(tmp_path / "edits") == PROMPTS[:3]
    assert editor.apply_algo is apply_wise_to_model
    getattr(editor, call)(requests(4)[3:], sequential_edit=True)
    assert saved(tmp_path / "edits") == PROMPTS[:4]
    assert len(writes) == 2


@HOSTS
def test_single_edits_are_not_saved(
    llama: Any, tok: Any, tmp_path: Path, writes: list[str], host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    editor = host(llama, tok, settings(save_path=str(tmp_path / "edits")))
    editor.edit(requests(3))
    assert writes == []
    assert "nothing is saved there: the model carries no edits" in caplog.text


@HOSTS
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_stands_when_a_call_fails_is_saved(
    llama: Any, tok: Any, tmp_path: Path, writes: list[str], host: Any, error: type[BaseException]
) -> None:
    class Interrupting(host):  # type: ignore[misc]
        def edit_requests(self, wanted: Sequence[Any], sequential_edit: bool = False) -> Any:
            super().edit_requests(wanted[:2], sequential_edit)
            raise error("stop")

    editor = Interrupting(llama, tok, settings(save_path=str(tmp_path / "edits")))
    editor.saves = False  # the host's own save comes after the last edit
    with pytest.raises(error, match="stop"):
        editor.edit(requests(3), sequential_edit=True)
    assert saved(tmp_path / "edits") == PROMPTS[:2]
    assert editor.apply_algo is apply_wise_to_model


def test_settings_are_checked_before_the_call(llama: Any, tok: Any, tmp_path: Path) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("computed something")

    never.__name__ = "edit"
    call: Callable[..., Any] = around_wise(never, apply_wise_to_model)
    (tmp_path / "wise.pt").touch()
    with pytest.raises(ValueError, match="is a file"):
        call(Host(llama, tok, settings(save_path=str(tmp_path / "wise.pt"))))
    hparams = settings()
    hparams.edit_lr = -1.0
    with pytest.raises(ValueError, match="edit_lr"):
        call(Host(llama, tok, hparams))


def test_normal_edit_keeps_the_edits_until_they_are_restored(llama: Any, tok: Any) -> None:
    _, model, restore = wrapped(Host)(llama, tok, settings()).normal_edit(requests(2))
    assert [held.request.prompt for held in stream_on(model).held] == PROMPTS[:2]
    restore()
    assert not find_wise_layers(model)


def test_another_algorithm_is_called_as_it_was(llama: Any, tok: Any) -> None:
    def apply(model: Any, tok: Any, wanted: Any, hparams: Any, **options: Any) -> Any:
        return model, lambda: None

    editor = wrapped(Host)(llama, tok, None, apply)
    assert editor.edit(requests(1))[0] == ["metrics"]
    assert editor.apply_algo is apply


def test_settings_of_another_host(llama: Any, tok: Any, tmp_path: Path) -> None:
    class Settings:
        pass

    hparams = Settings()
    values = {key: value for key, value in settings().to_dict().items() if key != "save_path"}
    vars(hparams).update(values, evaluation_type=None)
    wrapped(Host)(llama, tok, hparams).edit(requests(1), sequential_edit=True)
    detach(llama)
    vars(hparams).update(save_path=str(tmp_path / "edits"))
    wrapped(Host)(llama, tok, hparams).edit(requests(1), sequential_edit=True)
    assert saved(tmp_path / "edits") == PROMPTS[:1]
    assert WISEHyperParams.from_any(hparams).save_path == str(tmp_path / "edits")
