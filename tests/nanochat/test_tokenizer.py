"""The tokenizer: round trips, files, and what it refuses."""

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import builtin, builtin_corpus
from nanochat import tokenizer as module
from nanochat.builtin import ensure_builtin_tokenizer
from nanochat.errors import UserError
from nanochat.rows.encoder import BatchEncoder
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    tokenizer_dir,
    tokenizer_name,
    train_and_save,
)

from .data_kit import byte_tokenizer, texts

AWKWARD = [
    "",
    " ",
    "Hello, wörld!  12345 it's\r\n\r\n\tif x:\n        return 2**16  ",
    "漢字 и кириллица 🎉 \u200d\x00",
    "a document that says <|bos|> and <|user_start|>",
    "x" * 3000,
]


@pytest.fixture
def trained(base_dir) -> RustBPETokenizer:
    return train_and_save(texts(300, seed=1), 400, "tokenizer")


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"text {n} " + "that says what the others say too " * 8 for n in range(60)]
    monkeypatch.setattr(builtin_corpus, "_all_texts", lambda: iter(documents))


def test_decoding_gives_the_text_back(trained):
    for text in AWKWARD:
        assert trained.decode(trained.encode(text)) == text


def test_special_tokens_follow_the_mergeable_ranks_in_order(trained):
    ids = [trained.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(400 - 9, 400))
    assert trained.get_vocab_size() == 400
    assert trained.get_bos_token_id() == 391
    assert trained.get_special_tokens() == set(SPECIAL_TOKENS)
    assert trained.id_to_token(392) == "<|user_start|>"


def test_text_never_encodes_to_a_special_token(trained):
    assert max(trained.encode("<|bos|><|output_end|>")) < 391


def test_prepend_and_append_take_ids_and_names(trained):
    plain = trained.encode("some text")
    bos = trained.get_bos_token_id()
    assert trained.encode("some text", prepend="<|bos|>", append=5) == [bos, *plain, 5]
    assert trained(["some text", ""], prepend=bos) == [[bos, *plain], [bos]]


def test_several_texts_encode_as_each_alone_on_any_number_of_threads(trained):
    alone = [trained.encode(text) for text in AWKWARD]
    assert trained.encode(AWKWARD, num_threads=1) == alone
    assert trained.encode(AWKWARD, num_threads=3) == alone
    assert trained.encode([]) == []


def test_numbers_are_split_into_at_most_two_digits():
    tokenizer = RustBPETokenizer.train_from_iterator(["123456 " * 50, "12 34 56 " * 50], 268)
    longest = max(sum(c.isdigit() for c in tokenizer.decode([id])) for id in range(259))
    assert longest == 2


def test_a_long_run_of_spaces_does_not_bring_the_encoder_down(trained):
    text = "before" + " " * 1_000_000 + "after" + "\t " * 400_000
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode(["x", text], num_threads=2)[1] == trained.encode(text)


def test_a_saved_tokenizer_loads_as_the_same(trained, base_dir):
    loaded = get_tokenizer()
    assert loaded.directory == base_dir / "tokenizer"
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.get_vocab_size() == 400
    assert [loaded.encode(text) for text in AWKWARD] == [trained.encode(text) for text in AWKWARD]


def test_training_is_deterministic_and_the_fingerprint_tells_tokenizers_apart(trained):
    again = RustBPETokenizer.train_from_iterator(texts(300, seed=1), 400)
    other = RustBPETokenizer.train_from_iterator(texts(300, seed=2), 400)
    assert again.fingerprint() == trained.fingerprint() != other.fingerprint()


def test_upstream_can_read_the_pickle(trained, base_dir):
    encoding = pickle.loads((base_dir / "tokenizer" / "tokenizer.pkl").read_bytes())  # noqa: S301 # ours
    assert type(encoding).__name__ == "Encoding"
    assert encoding.n_vocab == 400
    assert encoding.encode_ordinary(AWKWARD[2]) == trained.encode(AWKWARD[2])
    assert encoding.encode_single_token("<|bos|>") == 391


def test_a_pickle_is_never_loaded(base_dir):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(base_dir / "exploded"),)

    (base_dir / "tokenizer").mkdir()
    (base_dir / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="never loaded"):
        get_tokenizer()
    assert not (base_dir / "exploded").exists()


def test_bytes_of_tokens_that_would_run_code_are_not_unpickled(trained, base_dir):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(base_dir / "exploded"),)

    torch.save(Bomb(), base_dir / "tokenizer" / "token_bytes.pt")
    with pytest.raises(UserError, match=r"token_bytes\.pt cannot be read"):
        get_token_bytes()
    assert not (base_dir / "exploded").exists()


def test_token_bytes_count_raw_bytes_and_none_for_special_tokens(trained):
    token_bytes = get_token_bytes()
    assert token_bytes.dtype == torch.int32 and token_bytes.shape == (400,)
    assert token_bytes[:256].tolist() == [1] * 256
    assert token_bytes[-9:].tolist() == [0] * 9
    for text in AWKWARD:
        ids = np.array(trained.encode(text), dtype=np.int64)
        assert token_bytes.numpy()[ids].sum() == len(text.encode())


def test_without_a_tokenizer_the_sentence_names_the_command(base_dir):
    with pytest.raises(UserError, match=r"no tokenizer in .*python -m scripts\.tok_train"):
        get_tokenizer()
    with pytest.raises(UserError, match="no tokenizer in"):
        get_token_bytes()
    with pytest.raises(UserError, match="--tokenizer="):
        get_tokenizer("another")


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "v9"}', "twice", "no specials"])
def test_a_damaged_file_is_a_sentence(trained, base_dir, damage):
    path = base_dir / "tokenizer" / "tokenizer.json"
    entry = json.loads(path.read_text())
    if damage == "twice":
        entry["mergeable"][5] = entry["mergeable"][6]
        damage = json.dumps(entry)
    elif damage == "no specials":
        entry["special"] = []
        damage = json.dumps(entry)
    path.write_text(damage)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        get_tokenizer()


@pytest.mark.parametrize(
    "changes",
    [
        "[" * 200_000,
        {"pattern": ""},  # tiktoken's Rust panics
        {"pattern": "x*"},
        {"pattern": "(a+)+$"},  # finds next to nothing, slowly
        {"pattern": "("},
        {"special": SPECIAL_TOKENS * 2},
        {"special": SPECIAL_TOKENS + [f"<{i}>" for i in range(5000)]},
        {"special": [*SPECIAL_TOKENS, {"__reduce__": "os.system"}]},
        {"mergeable": ["YQ=="]},  # most bytes are missing
        {"mergeable": None},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_a_poisoned_file_is_a_sentence_and_no_traceback(trained, base_dir, changes):
    path = base_dir / "tokenizer" / "tokenizer.json"
    entry = json.loads(path.read_text())
    path.write_text(changes if isinstance(changes, str) else json.dumps(entry | changes))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged") as raised:
        get_tokenizer()
    assert "\n" not in str(raised.value)


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="at least 265"):
        RustBPETokenizer.train_from_iterator(["text"], 264)
    with pytest.raises(UserError, match=r"fills a vocabulary of \d+ only"):
        RustBPETokenizer.train_from_iterator(["too little text"], 5000)


def test_the_smallest_vocabulary_is_bytes_and_special_tokens():
    tokenizer = RustBPETokenizer.train_from_iterator(["any text"], 265)
    assert tokenizer.encode("any") == list(b"any")


@pytest.mark.parametrize("content", [{}, {"Tokenizer": type("OfAnOlderCheckout", (), {})}])
def test_an_unbuilt_or_old_rustbpe_is_a_sentence(trained, monkeypatch, content):
    module = types.ModuleType("rustbpe")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, "rustbpe", module)
    with pytest.raises(UserError, match=r"rustbpe is not built, or older .*: run `uv sync`"):
        RustBPETokenizer.train_from_iterator(["text"], 300)
    with pytest.raises(UserError, match=r"rustbpe is not built, or older .*: run `uv sync`"):
        BatchEncoder(trained, dtype=np.dtype("<u2"))


def test_a_name_is_under_the_base_directory_and_a_path_is_a_path(base_dir, tmp_path):
    assert tokenizer_dir() == base_dir / "tokenizer"
    assert tokenizer_dir("tiny") == base_dir / "tiny"
    assert tokenizer_dir(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(UserError, match="empty"):
        tokenizer_dir("")
    with pytest.raises(UserError, match="home directory of nobody"):
        tokenizer_dir("~nobody-has-this-name/x")


@pytest.mark.parametrize("spelling", ["./x", "../here/x", "x/", Path("x"), Path("./x")])
def test_a_path_is_resolved_once_and_stays_what_it_was_from_anywhere(
    base_dir, tmp_path, monkeypatch, spelling
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    directory = tokenizer_dir(spelling)
    name = tokenizer_name(spelling)
    expected = here / "x"
    assert directory == expected and tokenizer_dir(directory) == expected
    monkeypatch.chdir(base_dir)
    assert tokenizer_dir(str(directory)) == tokenizer_dir(name) == expected


def test_dot_is_the_working_directory_and_a_name_stays_a_name(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tokenizer_dir(".") == tmp_path and tokenizer_dir("..") == tmp_path.parent
    assert tokenizer_name("tiny") == "tiny"  # a base directory that moves takes it along


def test_a_relative_base_directory_is_absolute_for_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "base")
    assert tokenizer_dir("tiny") == tmp_path / "base" / "tiny"


def test_a_tokenizer_at_a_relative_path_leaves_the_base_directory_alone(
    base_dir, tmp_path, monkeypatch
):
    theirs = base_dir / "tokenizer" / "tokenizer.pkl"
    theirs.parent.mkdir()
    theirs.write_bytes(b"upstream's")
    monkeypatch.chdir(tmp_path)
    tokenizer = train_and_save(texts(300, seed=1), 300, tokenizer_dir("./tokenizer"))
    assert tokenizer.directory == tmp_path / "tokenizer"
    assert get_tokenizer("./tokenizer").fingerprint() == tokenizer.fingerprint()
    assert [path.name for path in theirs.parent.iterdir()] == ["tokenizer.pkl"]


OTHERS_FILES = {
    "tokenizer.pkl": b"upstream's",
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE"}}',  # of HF tokenizers
}


@pytest.mark.parametrize("name", OTHERS_FILES)
@pytest.mark.parametrize("how", ["train", "builtin", "save"])
def test_a_tokenizer_of_another_program_is_not_overwritten(
    small_corpus, base_dir, trained, name, how
):
    theirs = base_dir / "theirs" / name
    theirs.parent.mkdir()
    theirs.write_bytes(OTHERS_FILES[name])
    write = {
        "train": lambda: train_and_save((pytest.fail("it was read") for _ in "x"), 300, "theirs"),
        "builtin": lambda: ensure_builtin_tokenizer("theirs", 300),
        "save": lambda: trained.save(theirs.parent),
    }[how]
    with pytest.raises(UserError, match=rf"{name} was not made by this program.*move it away"):
        write()
    assert [path.name for path in theirs.parent.iterdir()] == [name]
    assert theirs.read_bytes() == OTHERS_FILES[name]


def test_a_crash_while_saving_leaves_nothing_that_looks_like_another_programs(
    trained, base_dir, monkeypatch
):
    written: list[str] = []

    def crash(path: Path, data: bytes) -> None:
        written.append(path.name)
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "atomic_write_bytes", crash)
        with pytest.raises(OSError, match="No space"):
            trained.save(base_dir / "tokenizer")
    assert written == ["tokenizer.json"]
    assert {path.name for path in (base_dir / "tokenizer").iterdir()} == {"token_bytes.pt"}
    trained.save(base_dir / "tokenizer")
    assert get_tokenizer().fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("damage", ["directory", "content"])
def test_files_that_cannot_be_read_are_a_sentence(trained, base_dir, damage):
    for name, read in (("tokenizer.json", get_tokenizer), ("token_bytes.pt", get_token_bytes)):
        path = base_dir / "tokenizer" / name
        path.unlink()
        if damage == "directory":
            path.mkdir()
        else:
            path.write_bytes(b"\xff\x00not it")
        with pytest.raises(UserError, match=f"{name} (.*Is a directory|is damaged|cannot be read)"):
            read()


def test_the_builtin_tokenizer_is_trained_once(small_corpus, base_dir, monkeypatch):
    first = ensure_builtin_tokenizer("tiny", 300)
    assert first.directory == base_dir / "tiny" and first.get_vocab_size() == 300
    monkeypatch.setattr(module, "train_and_save", lambda *_: pytest.fail("trained again"))
    assert ensure_builtin_tokenizer("tiny", 300).fingerprint() == first.fingerprint()
    with pytest.raises(UserError, match="has 300 tokens, not 301"):
        ensure_builtin_tokenizer("tiny", 301)


def test_the_builtin_tokenizer_never_sees_the_validation_shard(small_corpus, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(
        builtin,
        "train_and_save",
        lambda iterator, size, path: seen.extend(iterator) or byte_tokenizer(path),
    )
    ensure_builtin_tokenizer("tiny", 265)
    held_out = builtin_corpus.texts()[builtin_corpus.VAL_SHARD :: 9]
    assert len(seen) == 60 - len(held_out)
    assert not set(seen) & set(held_out)


def test_the_readmes_command_prints_the_vocabulary_size(base_dir):
    byte_tokenizer(base_dir / "tokenizer")
    program = (
        "from nanochat.tokenizer import get_tokenizer; print(get_tokenizer().get_vocab_size())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"265\n"
