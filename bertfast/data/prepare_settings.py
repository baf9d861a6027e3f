"""Settings of `bertfast prepare`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from bertfast.data.text_files import is_stream
from bertfast.data.tokenizer import MIN_BPE_SIZE, TokenizerType
from bertfast.runtime.settings import Count, Range, Settings, given, refuse_without_effect

VOCABULARY_FLAGS = {"--vocab-size", "--cased", "--tokenizer-type", "--bert-special-tokens"}
"""Flags for a vocabulary to train."""


@dataclass(frozen=True)
class CorpusSettings(Settings):
    """Which text to use, and how to tokenize it.

    Attributes:
        train_file: Text files and folders, or "-" for standard input, which is copied first, like a pipe. If not given:
            the docstrings of the installed packages. Hidden files in folders are left out.
        validation_file: Text files and folders for validation. If not given: hold out a part of the training documents.
        validation_split_percentage: Percentage of the training documents to hold out; if they are few, of the sentences
            of the longest one.
        text_column: Field of .jsonl files, or column of .parquet files, that holds the text.
        tokenizer_name: A vocab.txt, a tokenizer.json or a folder with either. If not given: train a vocabulary on the
            text.
        tokenizer_type: Kind of vocabulary to train: wordpiece (as in BERT, ELECTRA and DistilBERT), bpe (byte-level, as
            in RoBERTa and ModernBERT) or unigram (as in XLM-RoBERTa and CamemBERT). If not given: wordpiece; in
            `bertfast pretrain` that of --architecture.
        bert_special_tokens: Name the special tokens of a bpe or unigram vocabulary [CLS], [SEP], … as in BERT and
            ModernBERT, not <s>, </s>, … as in RoBERTa.
        vocab_size: Size of the vocabulary to train, rounded up to a multiple of 64.
        cased: Whether the wordpiece vocabulary to train distinguishes upper and lower case, as the others always do.
        processes: Number of files to process at the same time. If not given: one per CPU core.
    """

    train_file: list[str] = field(default_factory=list)
    validation_file: list[str] = field(default_factory=list)
    validation_split_percentage: Annotated[float, Range(0, below=100)] = 5
    text_column: str = "text"
    tokenizer_name: str | None = None
    tokenizer_type: TokenizerType | None = None
    bert_special_tokens: bool = False
    vocab_size: Annotated[int, Range(64, 2**20)] = 30_528
    cased: bool = False
    processes: Count | None = None

    def validate(self) -> None:
        flags = set(given(self))
        if self.tokenizer_name is not None:
            refuse_without_effect(sorted(flags & VOCABULARY_FLAGS), "--tokenizer-name gives the vocabulary")
        if self.tokenizer_type in (None, "wordpiece"):
            reason = "it is for --tokenizer-type bpe and unigram"
            refuse_without_effect(flags & {"--bert-special-tokens"}, reason)
        else:
            refuse_without_effect(flags & {"--cased"}, f"a {self.tokenizer_type} vocabulary always distinguishes case")
        if self.tokenizer_type == "bpe" and self.vocab_size < MIN_BPE_SIZE:
            raise ValueError(
                f"--vocab-size must be at least {MIN_BPE_SIZE} with --tokenizer-type bpe, whose vocabulary has each of "
                f"the 256 bytes, got {self.vocab_size}"
            )
        if self.validation_file:
            refuse_without_effect(flags & {"--validation-split-percentage"}, "--validation-file gives the text")


@dataclass(frozen=True)
class PrepareSettings(Settings):
    """What to prepare, and where to write it.

    Attributes:
        output_dir: Folder for the shards and the tokenizer. The same command again continues an interrupted run.
        overwrite_output_dir: Replace the shards of another corpus in --output-dir; parts of unchanged files are kept.
        corpus: Which text to use, and how to tokenize it.
        part: "i/n" processes every n-th file from the i-th on (1 ≤ i ≤ n), for several machines; then pass --merge.
        merge: Only combine the finished parts of all machines.
    """

    output_dir: str
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    part: str | None = None
    merge: bool = False
    overwrite_output_dir: bool = False

    def validate(self) -> None:
        if self.part is not None:
            if self.merge:
                raise ValueError("--part and --merge are mutually exclusive: pass --merge when all parts are finished")
            numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part)
            if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
                raise ValueError(f"--part must be i/n with 1 ≤ i ≤ n, such as 1/4, got {self.part!r:.60}")
            files = self.corpus.train_file
            if self.corpus.tokenizer_name is None or not files or any(map(is_stream, files)):
                raise ValueError("--part requires --tokenizer-name and files in --train-file, the same for every part")
