"""Small ``tokenizer.json`` of each kind, trained on the spot."""

import json
import pathlib

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# No white space before a line's end, so that joined lines are as natural as one.
TRAINED_ON = [*pathlib.Path(json.__file__).parent.joinpath("decoder.py").read_text().splitlines()]
QUIET = {"show_progress": False}


def byte_level() -> Tokenizer:
    """Like GPT-2's; its character spans are trimmed, as in most tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **QUIET,
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama's: a space before every text, whole texts as one word, bytes for unknown ones."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
        **QUIET,
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [word for word in record["added_tokens"] if word["content"] in special]
    return Tokenizer.from_str(json.dumps(record))


def unigram() -> Tokenizer:
    """Like T5's: ``</s>`` is a word of the vocabulary that text can spell."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", **QUIET
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """Like BERT's: texts lose their case and their spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]", "[CLS]"], **QUIET
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """Without a decoder and without anything that could end a text."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TRAINED_ON, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["[UNK]"], **QUIET)
    )
    return tokenizer


KINDS = {
    each.__name__: each for each in (byte_level, byte_fallback, unigram, word_piece, word_level)
}
EXACT = ("byte_level", "byte_fallback")  # these restore every text
