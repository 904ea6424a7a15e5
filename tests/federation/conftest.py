"""A base directory with the built-in corpus and a small tokenizer, made once for all tests here."""

from pathlib import Path

import pytest

from nanochat.tokenizer import ensure_builtin_tokenizer, tokenizer_dir

TOKENIZER, VOCAB_SIZE = "tokenizer_512", 512


@pytest.fixture(scope="session")
def prepared_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        ensure_builtin_tokenizer(tokenizer_dir(TOKENIZER), VOCAB_SIZE)
    return directory


@pytest.fixture
def builtin(prepared_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NANOCHAT_BASE_DIR with data; shared, so runs in it need names of their own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(prepared_base))
    return prepared_base
