"""Data of a pre-training run: tokenizer and shards, the batches of its steps and validations, the loader."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bertfast.architectures.presets import PUBLISHED
from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import SPLITS, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.special_tokens import special_tokens
from bertfast.data.text_files import is_stream
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, tokenizer_hash
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.output_folder import OriginError
from bertfast.training.curriculum import Curriculum
from bertfast.training.distributed import Distributed
from bertfast.training.loader import BatchIndex, Loader
from bertfast.training.pretrain_settings import PretrainSettings
from bertfast.training.validation import unigram_entropy

logger = logging.getLogger("bertfast")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared text of a run.

    Attributes:
        tokenizer: Tokenizer of the shards.
        train, validation: Shards of the two splits.
    """

    tokenizer: Tokenizer
    train: Shards
    validation: Shards

    @classmethod
    def open(
        cls,
        settings: PretrainSettings,
        distributed: Distributed,
        initial: Path | None,
        differences: Callable[[], list[str]] = list,
    ) -> Corpus:
        """Open the shards of a run; without `data_dir`, the main process prepares the text first.

        Args:
            settings: Settings of the run.
            distributed: Processes of the run.
            initial: Folder of the initial model, whose tokenizer must be that of the shards; None: random weights.
            differences: Returns what else differs from the run in the output folder, for messages.

        Raises:
            ValueError: The text was tokenised with another tokenizer or has changed since the run began, or there is
                no validation text.
        """
        folder = _prepare(settings, distributed, initial, differences)
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        corpus = cls.of(folder)
        if initial is not None and tokenizer_hash(load_tokenizer(initial)) != corpus.train.tokenizer_hash:
            raise ValueError(
                f"the text in {folder} was tokenised with another tokenizer than that of {initial}: "
                f"prepare it again with --tokenizer-name {initial}"
            )
        if not corpus.validation.documents:
            raise ValueError(
                f"{folder} contains no validation text: raise --validation-split-percentage, or pass --validation-file"
            )
        return corpus

    @classmethod
    def of(cls, folder: Path) -> Corpus:
        """Open the tokenizer and the shards in a folder that `prepare` wrote."""
        tokenizer = load_tokenizer(folder)
        key = tokenizer_hash(tokenizer)
        return cls(tokenizer, *(Shards.open(folder / split, key) for split in SPLITS))

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the tokenizer and of the shards of both splits; a resumed run must have the same."""
        return {
            "tokenizer": self.train.tokenizer_hash,
            "training text": self.train.content_hash,
            "validation text": self.validation.content_hash,
        }


class BatchPlan:
    """Batches of a run's steps and of its validations.

    Args:
        settings: Settings of the run.
        corpus: Its text.
        distributed: Processes of the run.
        bins_per_step: Batches per optimizer step, over all ranks.

    Attributes:
        batches: Training batches of the first phase.
        second_phase: Training batches of the second phase; None: there is none.
        steps: Steps of the run.
        curriculum: Which batches each step takes.
        held_out: Validation batches.
        unigram_entropy: Unigram baseline on the validation batches, in nats per masked token.
    """

    def __init__(self, settings: PretrainSettings, corpus: Corpus, distributed: Distributed, bins_per_step: int):
        self._settings, self._tokenizer, self._rank = settings, corpus.tokenizer, distributed.rank
        self.batches = self._batches(corpus.train, settings.sampling, bins_per_step)
        self.steps = settings.duration.max_steps or math.ceil(
            (settings.duration.num_train_epochs or 1) * self.batches.steps_per_epoch
        )
        self.second_phase: Batches | None = None
        first_step = None
        if settings.batch.second_phase_length:
            first_step = round((1 - settings.batch.second_phase_share) * self.steps)
            longer = settings.sampling.replace(max_seq_length=settings.batch.second_phase_length)
            self.second_phase = self._batches(corpus.train, longer, bins_per_step)
        ramp = round(settings.batch.batch_ramp * self.steps)
        empty = ["--batch-ramp"] * (settings.batch.batch_ramp > 0 and not ramp)
        empty += ["--second-phase-length"] * (first_step == self.steps)
        if empty and distributed.is_main:
            logger.warning("no effect in a run of %d steps: %s", self.steps, " and ".join(empty))
        self.curriculum = Curriculum(bins_per_step, distributed.world_size, ramp, first_step)
        held_out = self._batches(corpus.validation, settings.sampling, 1)
        self.held_out = list(held_out.first_epoch(settings.report.eval_batches))
        self.unigram_entropy = unigram_entropy(corpus.train, self.held_out)

    def loader(self, step: int, device: torch.device) -> Loader:
        """Return the loader of this rank's batches from `step` on, counted from 0."""
        on_gpu = device.type == "cuda"
        workers = self._settings.compute.dataloader_num_workers
        if workers is None:
            workers = 2 if on_gpu else 0
        indices = partial(_indices, self.curriculum, step, self._rank)
        return Loader(partial(_batch_at, self.batches, self.second_phase), indices, workers, on_gpu)

    def _batches(self, shards: Shards, sampling: Sampling, bins_per_step: int) -> Batches:
        return Batches(
            shards,
            special_tokens(self._tokenizer),
            continuation_tokens(self._tokenizer, whole_word=sampling.whole_word),
            sampling,
            tokens_per_bin=self._settings.batch.tokens_per_batch,
            bins_per_step=bins_per_step,
            seed=self._settings.seed,
        )


def _prepare(
    settings: PretrainSettings, distributed: Distributed, initial: Path | None, differences: Callable[[], list[str]]
) -> Path:
    """Return the folder of the shards; without `data_dir`, the main process prepares the corpus first."""
    if settings.data_dir is not None:
        folder = Path(settings.data_dir)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--data-dir {folder}: no such folder; `bertfast prepare --output-dir {folder}` writes it"
            )
        return folder
    corpus, folder, replacement = settings.corpus, *_data_folders(settings)
    if initial is not None and corpus.tokenizer_name is None:
        corpus = corpus.replace(tokenizer_name=str(initial))
    published = PUBLISHED[settings.model.architecture]
    if corpus.tokenizer_name is None and corpus.tokenizer_type is None and published.tokenizer_type != "wordpiece":
        corpus = corpus.replace(
            tokenizer_type=published.tokenizer_type, bert_special_tokens=published.bert_special_tokens
        )

    def prepare_text() -> Path:
        try:
            if not (
                settings.overwrite_output_dir and any(map(is_stream, corpus.train_file))
            ):  # which can be read only once
                prepare(PrepareSettings(str(folder), corpus))
                remove(replacement)  # of a run that was to replace this one, and was refused
                return folder
        except OriginError as error:
            if not settings.overwrite_output_dir:
                raise ValueError(
                    f"{'; '.join([error.problem, *differences()])}: choose another --output-dir, keep the earlier text "
                    f"with --data-dir {folder}, or pass --overwrite-output-dir to start again"
                ) from None
        return prepare(PrepareSettings(str(replacement), corpus, overwrite_output_dir=True))

    return distributed.broadcast(distributed.run_on_main(prepare_text) or folder)


def replace_data(settings: PretrainSettings) -> None:
    """Replace the shards of an earlier run by those of a run that begins, if they are others."""
    folder, replacement = _data_folders(settings)
    if settings.overwrite_output_dir and settings.data_dir is None and replacement.is_dir():
        remove(folder)
        replacement.rename(folder)


def _data_folders(settings: PretrainSettings) -> tuple[Path, Path]:
    """Return the folder of a run's shards, and that of shards which replace those of an earlier run when it begins."""
    output = Path(settings.output_dir)
    return output / "data", output / "data-new"


def _indices(curriculum: Curriculum, step: int, rank: int) -> Iterator[BatchIndex]:
    """Yield (phase, bin) of a rank's batches from `step` on, without end."""
    return itertools.chain.from_iterable(curriculum.bins_of_rank(later, rank) for later in itertools.count(step))


def _batch_at(first: Batches, second: Batches | None, index: BatchIndex) -> Batch:
    """Return the batch of an index from the batches of both phases."""
    phase, number = index
    return (first if second is None or not phase else second).nth_bin(number)
