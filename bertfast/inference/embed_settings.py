"""Settings of `bertfast embed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bertfast.data.text_files import COMPRESSIONS, is_standard_input
from bertfast.inference.embedding_files import OutputFormat, OutputPrecision
from bertfast.models.extensions import LAYERS
from bertfast.models.sentence_modules import NormalizationName, PoolingName
from bertfast.runtime.settings import Count, Settings, given, refuse_without_effect
from bertfast.tasks.settings import ComputeSettings

Pooling = Literal["auto", PoolingName, "none"]
_TEXT_SUFFIXES = tuple(f".txt{compression}" for compression in COMPRESSIONS)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(Settings):
    """Texts to embed, the model, and the output.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        output_dir: Folder for part-00000 and so on. The same command again continues an interrupted run.
        overwrite_output_dir: Replace the parts of another run in --output-dir.
        input_file: A .txt file with one text per line, blank lines included, read as a stream, or a .tsv, .csv or
            .jsonl file, or a .json list. If not given, or "-": lines of standard input.
        text_column: Column of the text. If not given: sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair. If not given: sentence2 if there is one.
        pooling: How a text's embedding follows from those of its tokens, by the names of sentence-transformers; none:
            one embedding per token; auto: as the model's modules.json says, and mean if it has none.
        normalization: l2: embeddings of length 1; none: as they are; auto: as the model's modules.json says.
        prompt: Text to put before each text.
        prompt_name: Prompt of the model's config_sentence_transformers.json to put before each text, or none. If not
            given: its default_prompt_name.
        layers: Hidden states to use: embeddings, second-to-last, last, mean-last-four, concat-last-four or mean-all.
        output_format: safetensors, parquet (one row per text), or npy (one array per file).
        output_precision: float32; int8 or uint8: 256 steps between the smallest and the largest value of each element;
            binary or ubinary: a bit per element, eight to an int8 or uint8; as quantize_embeddings of
            sentence-transformers.
        ranges_file: The ranges.npy of another run, for int8 and uint8. If not given: ranges of the embeddings of the
            first part, which are written to ranges.npy.
        texts_per_part: Texts per output file.
        max_seq_length: Maximum sequence length in tokens, beyond which inputs are truncated. If not given: that of the
            model's sentence_bert_config.json or tokenizer, and at most the model's number of positions.
        compute: Device, precision and batch size of inference.
    """

    exclusive = ("prompt", "prompt_name")

    model_name_or_path: str
    output_dir: str
    overwrite_output_dir: bool = False
    input_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    pooling: Pooling = "auto"
    normalization: NormalizationName = "auto"
    prompt: str | None = None
    prompt_name: str | None = None
    layers: str = "last"
    output_format: OutputFormat = "safetensors"
    output_precision: OutputPrecision = "float32"
    ranges_file: str | None = None
    texts_per_part: Count = 10_000
    max_seq_length: Count | None = None
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def validate(self) -> None:
        if self.layers not in LAYERS:
            raise ValueError(f"--layers must be one of {', '.join(LAYERS)}, got {self.layers!r}")
        if self.output_format == "parquet" and self.pooling == "none":
            raise ValueError("parquet has one row per text: for --pooling none use --output-format safetensors")
        if self.reads_lines:
            columns = {"--text-column", "--text-pair-column"}
            refuse_without_effect(sorted(columns.intersection(given(self))), "the input is lines, not a table")
        if self.pooling == "none" and self.normalization != "auto":
            refuse_without_effect(["--normalization"], "--pooling none gives the hidden states as they are")
        if self.ranges_file is not None and not self.has_ranges:
            refuse_without_effect(["--ranges-file"], "only --output-precision int8 and uint8 have ranges")
        if self.has_ranges and self.ranges_file is None and self.texts_per_part < 2 and self.pooling != "none":
            raise ValueError(
                f"--texts-per-part must be 2 or more for --output-precision {self.output_precision}, whose ranges are "
                "those of the first part; or give the ranges of other texts with --ranges-file"
            )

    @property
    def reads_lines(self) -> bool:
        """Whether each line of the input is a text; else the input is a table."""
        name = self.input_file or "-"
        return is_standard_input(name) or name.endswith(_TEXT_SUFFIXES)

    @property
    def has_ranges(self) -> bool:
        """Whether embeddings are written as steps between the ends of a range."""
        return self.output_precision in ("int8", "uint8")
