"""The tokenizer of --kv-events-tokenizer, with the package that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_router.app.caches import caches_of, tokenizer
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer that knows three words, cuts texts after two, and begins each with a token."""
    words = {"<s>": 0, "the": 1, "sea": 2, "?": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_text_is_encoded_as_an_engine_does_it(folder: Path) -> None:
    for path in (folder, folder / "tokenizer.json"):
        assert list(tokenizer(str(path))("the sea the lake")) == [0, 1, 2, 1, 3]


def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    for path in (folder, folder / "none.json"):
        with pytest.raises(ConfigError, match=r"--kv-events-tokenizer cannot read .*\.json"):
            tokenizer(str(path))


def test_the_options_make_the_caches(folder: Path) -> None:
    assert caches_of(RouterArgs(kv_events_tokenizer=str(folder))) is None
    caches = caches_of(RouterArgs(kv_events=True, kv_events_max_blocks=7, kv_events_tokenizer=str(folder)))
    assert caches is not None
    assert caches.index is not None
    assert caches.index.most_blocks == 7
    assert caches.encode is not None
    assert list(caches.encode("sea")) == [0, 2]
