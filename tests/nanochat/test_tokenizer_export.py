"""The export against the real library: HF tokenizers gives the ids that we give."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, get_tokenizer, train_and_save
from nanochat.tokenizer_export import export_hf, merges

from .data_kit import byte_tokenizer, texts

PROSE = (
    "It's the naïve baker's 4th café: they'll've sold 1234567 crêpes!!\n\n  привет 你好 😀\t \r\n"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[RustBPETokenizer, tokenizers.Tokenizer]:
    documents = [PROSE * 3, "aaaa abab aaaaaaa abba\n" * 20, *texts(200, seed=5)]
    ours = RustBPETokenizer.train_from_iterator(documents, 700)
    directory = export_hf(ours, tmp_path_factory.mktemp("hf"))
    return ours, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


# Without unassigned characters: their class depends on the year of a library's Unicode tables.
characters = st.characters(exclude_categories=["Cs", "Cn"])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab' \n1sté", max_size=200) | st.text(alphabet=characters, max_size=60))
def test_ids_are_ours(pair, text):
    ours, theirs = pair
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def test_ids_of_long_texts_are_ours(pair):
    ours, theirs = pair
    for text in [PROSE * 200, "a" * 20_000, "ab" * 9_000, *texts(50, seed=6)]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_the_library_puts_bos_in_front(pair):
    ours, theirs = pair
    assert theirs.encode("some text").ids == ours.encode("some text", prepend="<|bos|>")


def test_special_tokens_keep_their_ids_and_are_text_on_demand(pair):
    ours, theirs = pair
    for name in SPECIAL_TOKENS:
        assert theirs.token_to_id(name) == ours.encode_special(name)
        assert theirs.encode(name, add_special_tokens=False).ids == [ours.encode_special(name)]
    text = "".join(SPECIAL_TOKENS)
    assert theirs.decode(theirs.encode(text).ids) == ""  # skipped, as special
    theirs.encode_special_tokens = True  # transformers: split_special_tokens
    try:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
    finally:
        theirs.encode_special_tokens = False


def test_the_vocabulary_is_whole(pair):
    ours, theirs = pair
    assert theirs.get_vocab_size() == ours.get_vocab_size() == 700
    assert sorted(theirs.get_vocab().values()) == list(range(700))


def test_merges_are_those_that_were_trained():
    tokenizer = RustBPETokenizer.train_from_iterator(["abab ab a " * 9], 269)
    ranks = tokenizer.enc._mergeable_ranks
    assert merges(ranks)[0] == (b"a", b"b")
    for rank, (left, right) in enumerate(merges(ranks), 256):
        assert ranks[left + right] == rank and max(ranks[left], ranks[right]) < rank


def test_ranks_that_no_training_gives_are_refused():
    with pytest.raises(ValueError, match="token 256 is not made of two earlier ones"):
        merges({bytes([byte]): byte for byte in range(256)} | {b"abc": 256})


def test_a_directory_of_ours_is_not_overwritten(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "tok")
    before = (tmp_path / "tok" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="name another directory"):
        export_hf(tokenizer, tmp_path / "tok")
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_model_is_not_overwritten_and_our_own_may_be_written_again(
    pair, tmp_path, name
):
    ours, _ = pair
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir()
    theirs.write_text("{}")
    with pytest.raises(UserError, match=rf"{name} is of another tokenizer: name another directory"):
        export_hf(ours, theirs.parent)
    assert [path.name for path in theirs.parent.iterdir()] == [name]
    assert theirs.read_text() == "{}"
    assert export_hf(ours, tmp_path / "hf") == export_hf(ours, tmp_path / "hf") == tmp_path / "hf"


def test_a_sequence_length_below_one_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="sequence length of 0"):
        export_hf(pair[0], tmp_path / "hf", sequence_len=0)
    assert not (tmp_path / "hf").exists()


def test_the_command_writes_what_transformers_reads(tmp_path, base_dir):
    train_and_save(texts(100, seed=1), 300, "tokenizer")
    out = tmp_path / "hf"
    command = ["nanochat.tokenizer_export", f"--out={out}", "--sequence-len=2048"]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["bos_token"] == "<|bos|>" and config["model_max_length"] == 2048
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("text").ids[1:] == get_tokenizer().encode("text")
