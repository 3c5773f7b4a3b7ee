"""Files that layers are read from: what is in them, private folders, and everything that can go wrong."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fxopt.offload import folders
from fxopt.offload.errors import StoreError
from fxopt.offload.folders import PREFIX, PrivateFolder, default_parent, remove_strays
from fxopt.offload.store import Extent, FileStore
from fxopt.offload.watched_file import WatchedFile
from fxopt.offload.writing import ALIGN, Weight, Written, write

LAYERS: list[list[list[tuple[str, tuple[int, ...]]]]] = [
    [[("a.q", (3, 4)), ("a.k", (1, 4))], [("a.norm", (5,))]],
    [[("b.q", (3, 4)), ("b.k", (1, 4))], [("b.norm", (5,))]],
]


def weights() -> tuple[dict[str, torch.Tensor], list[list[list[Weight]]]]:
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        tensors[name] = torch.randn(shape)
        data: Any = tensors[name].view(torch.uint8).numpy()
        return Weight(name, "F32", shape, tensors[name].nbytes, lambda: memoryview(data).cast("B"))

    layers = [[[weight(*each) for each in group] for group in groups] for groups in LAYERS]
    return tensors, layers


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Written, dict[str, torch.Tensor]]:
    tensors, layers = weights()
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        return path, write(file.fileno(), tmp_path, layers), tensors


def store_of(path: Path, made: Written) -> FileStore:
    file = WatchedFile(path)
    return FileStore([[Extent(file, start, length, 0)] for start, length in made.blocks])


def test_the_file_is_one_of_safetensors(written: tuple[Path, Written, dict[str, torch.Tensor]]) -> None:
    path, made, tensors = written
    assert path.stat().st_size == made.nbytes
    with safe_open(path, "pt") as file:
        assert {name for name in file.keys() if not name.startswith("gap.")} == set(tensors)  # noqa: SIM118 - no dict
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert all(start % ALIGN == 0 for start, _ in made.blocks)
    assert made.weights["a.k"] == made.weights["a.q"] + 3 * 4 * 4  # a group has no gap


def test_layers_come_back(written: tuple[Path, Written, dict[str, torch.Tensor]]) -> None:
    path, made, tensors = written
    store = store_of(path, made)
    slot = bytearray(max(length for _, length in made.blocks) + 7)
    for layer, name in enumerate(("a.norm", "b.norm")):
        nbytes = store.fill(layer, memoryview(slot))
        at = made.weights[name] - made.blocks[layer][0]
        assert torch.equal(torch.frombuffer(slot, dtype=torch.float32, count=5, offset=at), tensors[name])
        assert nbytes == made.blocks[layer][1]
    assert store.bytes_read == sum(length for _, length in made.blocks)
    store.close()


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: os.truncate(path, 100), "had .* bytes and has 100 now|ends at byte .*in the middle of a layer"),
        (lambda path: path.open("r+b").write(b"x"), "was written to while weights were read"),
        (lambda path: path.open("ab").write(b"x"), "had .* bytes and has .* now"),
    ],
    ids=["cut short", "written to", "longer"],
)
def test_a_file_that_changes(harm, sentence, written: tuple[Path, Written, dict[str, torch.Tensor]]) -> None:  # type: ignore[no-untyped-def]
    path, made, _ = written
    store, slot = store_of(path, made), memoryview(bytearray(4096))
    store.fill(0, slot)
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    harm(path)
    with pytest.raises(StoreError, match=sentence) as caught:
        store.fill(1, slot)
    assert "call fxopt.optimize again" in str(caught.value)
    if path.stat().st_size == made.nbytes:
        store.files[0].renew()
        store.fill(1, slot)


def test_a_file_that_is_replaced_or_removed_is_still_read(
    written: tuple[Path, Written, dict[str, torch.Tensor]],
) -> None:
    path, made, _ = written
    store, slot = store_of(path, made), memoryview(bytearray(4096))
    path.unlink()
    path.write_bytes(b"another")
    assert store.fill(0, slot) == made.blocks[0][1]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none cannot be opened: No such file"):
        WatchedFile(tmp_path / "none")


def test_reads_that_are_cut_up(
    written: tuple[Path, Written, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made, tensors = written
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:3]], offset))
    slot = bytearray(4096)
    store_of(path, made).fill(0, memoryview(slot))
    assert torch.equal(torch.frombuffer(slot, dtype=torch.float32, count=12).view(3, 4), tensors["a.q"])


# No room


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_half_way(tmp_path: Path) -> None:
    _, layers = weights()
    with (
        (tmp_path / "file").open("wb", buffering=0) as file,
        largest_file(300),
        pytest.raises(StoreError, match=r"after 300 B the system said: File too large\. Make room, or give another"),
    ):
        write(file.fileno(), tmp_path, layers)


def test_a_disk_that_has_no_room_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    _, layers = weights()
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(StoreError, match=r"weights could not be written to .*: 10 B are free"):
            write(file.fileno(), tmp_path, layers)
        assert file.tell() == 0


# Private folders


def test_a_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.path / folders.LOCK).stat().st_mode) == 0o600
    assert remove_strays(tmp_path) == []  # in use
    path = folder.path
    del folder
    assert not path.exists()


HOLD = """
import sys, time, types
from pathlib import Path
fxopt = sys.modules["fxopt"] = types.ModuleType("fxopt")  # without PyTorch, which takes seconds
fxopt.__path__ = [sys.argv[2]]
from fxopt.offload.folders import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]))
(folder.path / "weights.safetensors").write_bytes(b"x" * 1000)
print(folder.path, flush=True)
{end}
"""


def holder(parent: Path, end: str) -> subprocess.Popen[str]:
    package = Path(folders.__file__).parent.parent
    command = [sys.executable, "-c", HOLD.format(end=end), str(parent), str(package)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_folder_of_a_killed_process_goes_with_the_next(tmp_path: Path) -> None:
    process = holder(tmp_path, "time.sleep(60)")
    assert process.stdout is not None
    stray = Path(process.stdout.readline().strip())
    assert remove_strays(tmp_path) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stray.exists()
    folder = PrivateFolder(tmp_path)
    assert not stray.exists()
    assert folder.path.exists()


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise KeyboardInterrupt", "1 / 0"])
def test_the_folder_of_a_process_that_ends_goes_with_it(end: str, tmp_path: Path) -> None:
    process = holder(tmp_path, end)
    assert process.stdout is not None
    assert Path(process.stdout.readline().strip()).parent == tmp_path
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_leaves_the_folder_of_its_parent(tmp_path: Path) -> None:
    end = "import os\nif os.fork() == 0:\n    sys.exit()\nos.wait()\nprint(folder.path.exists())"
    process = holder(tmp_path, end)
    assert process.stdout is not None
    assert process.stdout.read().split()[-1] == "True"
    process.wait()


def test_what_is_not_a_stray_is_left_alone(tmp_path: Path) -> None:
    for name in ("something-else", f"{PREFIX}young"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "something-else")
    (tmp_path / f"{PREFIX}file").write_text("no folder")
    old = tmp_path / f"{PREFIX}old"
    old.mkdir()
    os.utime(old, (0, 0))
    assert remove_strays(tmp_path) == [old]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(StoreError, match=r"weights cannot be put into .*; give a folder that can be written to"):
            PrivateFolder(parent)


def test_weights_on_disk_do_not_go_to_a_disk_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {default_parent(): "tmpfs", Path("/var/tmp"): "ext4"}
    monkeypatch.setattr(folders, "_kind_of", lambda path: kinds.get(path, ""))
    assert default_parent() == Path("/var/tmp")
    kinds[Path("/var/tmp")] = "tmpfs"
    assert str(default_parent()) != "/var/tmp"
