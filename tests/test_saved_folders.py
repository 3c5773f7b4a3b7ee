"""Folders of somebody else, damaged ones, and those that were being written when something happened."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import flip, inside_of, optimised, tokens_of, truncate

import fxopt
from fxopt import ArtifactError
from fxopt.artifact import folder as on_disk
from fxopt.artifact.plain import to_json
from fxopt.artifact.signature import key_path
from fxopt.families import tiny

pytestmark = pytest.mark.usefixtures("home")


# --- whose folder it is --------------------------------------------------------------------------


def test_a_folder_of_somebody_else(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXOPT_HOME", str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r'you did not save this folder, .*code="trusted"; code="again"'):
        fxopt.load(saved, tiny("llama"))
    for code in ("trusted", "again"):
        assert torch.equal(tokens_of(fxopt.load(saved, tiny("llama"), code=code)), tokens_of(tiny("llama")))
    optimised(tiny("llama")).fxopt.save(tmp_path / "mine")  # makes a key
    with pytest.raises(ArtifactError, match="you did not save this folder"):
        fxopt.load(saved, tiny("llama"))


def test_the_key_is_for_its_owner_alone(saved: Path, home: Path) -> None:
    assert key_path() == home / "signing.key"
    assert key_path().stat().st_mode & 0o777 == 0o600
    key_path().chmod(0o644)
    with pytest.raises(ArtifactError, match="is open to other users, who could sign as you"):
        fxopt.load(saved, tiny("llama"))
    key_path().chmod(0o600)
    key_path().write_bytes(b"short")
    with pytest.raises(ArtifactError, match="holds 5 bytes and no key"):
        fxopt.load(saved, tiny("llama"))


# --- damage --------------------------------------------------------------------------------------


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES = (
    *("fxopt.json", "manifest.json", "signature", "graph.json", "weights.json", "report.json"),
    *("constants.safetensors", "decode-1/graph.json", "prefill-1/graph.json"),
)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, _link, _folder, _pipe])
@pytest.mark.parametrize("name", FILES)
def test_damage(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    model = tiny("llama")
    places = [parameter.data_ptr() for parameter in model.parameters()]
    damage((saved if name == "fxopt.json" else inside_of(saved)) / name)
    for code in ("signed", "trusted"):
        if (name, damage) in (("signature", flip), ("signature", truncate)) and code == "trusted":
            continue
        with pytest.raises(ArtifactError):
            fxopt.load(saved, model, code=code)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def _add_a_file(saved: Path, _: Path) -> None:
    (inside_of(saved) / "decode-1" / "extra.pt2").write_bytes(b"code")


def _swap_a_file(saved: Path, other: Path) -> None:
    shutil.copy(inside_of(other) / "decode-1" / "graph.json", inside_of(saved) / "decode-1" / "graph.json")


def _swap_the_manifest(saved: Path, other: Path) -> None:
    for name in ("manifest.json", "signature"):
        shutil.copy(inside_of(other) / name, inside_of(saved) / name)


def _link_a_folder(saved: Path, _: Path) -> None:
    inside = inside_of(saved)
    (inside / "decode-1").rename(saved.parent / "outside")
    (inside / "decode-1").symlink_to(saved.parent / "outside")


def _link_the_inside(saved: Path, _: Path) -> None:
    inside = inside_of(saved)
    inside.rename(saved.parent / "outside")
    inside.symlink_to(saved.parent / "outside")


def _point_outside(saved: Path, other: Path) -> None:
    (saved / "fxopt.json").write_bytes(to_json({"format": 1, "saved": f"../{other.name}/{inside_of(other).name}"}))


def _another_format(saved: Path, _: Path) -> None:
    (saved / "fxopt.json").write_bytes(to_json({"format": 2, "saved": inside_of(saved).name}))


def _huge_pointer(saved: Path, _: Path) -> None:
    (saved / "fxopt.json").write_bytes(b" " * 10_000_000)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_add_a_file, "decode-1/extra.pt2 is not in the manifest"),
        (_swap_a_file, "decode-1/graph.json"),
        (_swap_the_manifest, "bytes, and|SHA-256"),
        (_link_a_folder, "is missing|is not in the manifest"),
        (_link_the_inside, "is missing"),
        (_point_outside, "saved should be a folder beside it"),
        (_another_format, "format is 2, and this fxopt reads 1"),
        (_huge_pointer, "has 10,000,000 bytes"),
    ],
)
def test_foreign_files(saved: Path, tmp_path: Path, damage: Callable[[Path, Path], None], complaint: str) -> None:
    optimised(tiny("llama"), passes={"rotary": False}).fxopt.save(tmp_path / "other")
    damage(saved, tmp_path / "other")
    for code in ("signed", "trusted", "again"):
        with pytest.raises(ArtifactError, match=complaint):
            fxopt.load(saved, tiny("llama"), code=code)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, complaint in [("file", "is no folder"), ("none", "is no folder"), ("empty", "holds no fxopt.json")]:
        with pytest.raises(ArtifactError, match=complaint):
            fxopt.load(tmp_path / name, tiny("llama"))


def test_what_else_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    fast = optimised(tiny("llama"))
    with pytest.raises(ArtifactError, match=r"holds .* and no saved model"):
        fast.fxopt.save(tmp_path)
    with pytest.raises(ArtifactError, match="is a file"):
        fast.fxopt.save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --- killed in the middle, and several at once ---------------------------------------------------


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _in_a_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _files(number: int) -> dict[str, bytes]:
    return {"graph.json": to_json([number] * 1000), "decode-1/graph.json": to_json([number])}


@needs_fork
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each write, each flush and each rename: the old model or the new one, and the next save is whole."""
    folder = tmp_path / "saved"
    on_disk.write(folder, {"number": 0}, _files(0))
    survived, moment = False, 0
    while not survived:
        moment += 1

        def work(moment: int = moment) -> None:
            left = [moment]

            def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return inner(*args, **kwargs)

                return run

            for owner, name in [(os, "fsync"), (Path, "mkdir"), (Path, "replace"), (shutil, "rmtree")]:
                monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
            on_disk.write(folder, {"number": moment}, _files(moment))

        survived = os.WEXITSTATUS(status) == 0 if os.WIFEXITED(status := os.waitpid(_in_a_child(work), 0)[1]) else False
        archive = on_disk.read(folder)
        assert archive.mine
        assert archive.files == _files(archive.manifest["number"])
        assert archive.manifest["number"] in (0, moment)
        if archive.manifest["number"] == moment:
            on_disk.write(folder, {"number": 0}, _files(0))
            assert len(list(folder.iterdir())) == 2  # what was left behind is gone
    assert moment > 8


@needs_fork
def test_two_that_save_and_one_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    on_disk.write(folder, {"number": 0}, _files(0))

    def save(start: int) -> None:
        for number in range(start, start + 30):
            on_disk.write(folder, {"number": number}, _files(number))

    children = [_in_a_child(lambda start=start: save(start)) for start in (100, 200)]  # type: ignore[misc]
    reads = 0
    while children:
        archive = on_disk.read(folder)
        assert archive.files == _files(archive.manifest["number"])
        reads += 1
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    assert reads > 3
    assert on_disk.read(folder).manifest["number"] in (129, 229)
    assert len(list(folder.iterdir())) == 2


@needs_fork
def test_two_first_saves_share_one_key(tmp_path: Path) -> None:
    children = [_in_a_child(lambda n=n: on_disk.write(tmp_path / f"s{n}", {}, _files(n))) for n in range(4)]  # type: ignore[misc]
    for child in children:
        os.waitpid(child, 0)
    assert all(on_disk.read(tmp_path / f"s{number}").mine for number in range(4))
