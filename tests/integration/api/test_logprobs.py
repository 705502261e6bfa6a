"""The bytes of tokens, against the tokenizer's own decoder: byte-level BPE, SentencePiece's form, and a tokenizer of another library."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamafactory_kt.decoding.choosing import Chosen
from llamafactory_kt.integration.api.logprobs import TokensOfText, Vocabulary

TEXT = "Hello, wörld! 你好 🙂\n\t def f(x):  ~"


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Gemma has it: blanks are U+2581, and bytes without a token are <0x..>."""
    letters = sorted({*"Helo, wrd!()f:x\n".replace(" ", "▁"), "▁", "ö", "He", "ll", "▁w"})
    words = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("H", "e"), ("l", "l"), ("▁", "w")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def bytelevel() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Hello world, def f(x)"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("which", ["demo", "bytelevel", "sentencepiece"])
def test_the_bytes_of_tokens_are_the_text(demo, which):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model") if which == "demo" else globals()[which]()
    vocabulary = Vocabulary(tokenizer, frozenset(tokenizer.all_special_ids))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == TEXT, "the test's own tokenizer"
    assert b"".join(map(vocabulary.bytes_of, ids)) == TEXT.encode() and len(ids) > 20
    for token in range(len(tokenizer)):
        own = tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert vocabulary.bytes_of(token).decode(errors="replace") == own, token
    assert vocabulary.bytes_of(10**6) == b""


def test_a_tokenizer_of_another_library():
    texts = {1: "a", 2: "\ufffd"}
    other = SimpleNamespace(added_tokens_decoder={5: "<end>"}, decode=lambda ids: texts[ids[0]])
    vocabulary = Vocabulary(other, frozenset({5}))
    assert [vocabulary.bytes_of(token) for token in (1, 2, 5)] == [b"a", "\ufffd".encode(), b""]
    assert Vocabulary(other, frozenset()).bytes_of(5) == b"<end>"


def test_tokens_are_taken_where_their_text_begins(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    chosen = [Chosen(token, -1.0, ()) for token in tokenizer.encode("a 🙂b", add_special_tokens=False)]
    tokens, shown = TokensOfText(lambda: chosen, Vocabulary(tokenizer, frozenset())), []
    for characters in range(1, 5):
        taken = tokens.take(characters)
        assert all(begin == characters - 1 for begin, _, _ in taken)
        shown.append(b"".join(bytes(token["bytes"]) for _, _, token in taken))
    assert b"".join(shown).decode() == "a 🙂b" and shown[-1].endswith(b"b") and tokens.take() == []
