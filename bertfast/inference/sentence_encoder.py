"""An encoder, its tokenizer, and what its folder and flags say about embeddings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bertfast.data.text_files import unpaired_surrogate
from bertfast.inference.embed_settings import EmbedSettings
from bertfast.inference.frozen import require_own_precision
from bertfast.models.bert import BertModel
from bertfast.models.extensions import select_layers, warn_of_few_layers
from bertfast.models.files import model_files, resolve
from bertfast.models.quantised_config import is_quantised
from bertfast.models.sentence_folder import read_sentence_modules
from bertfast.models.sentence_modules import SentenceModules
from bertfast.tasks.columns import Text
from bertfast.tasks.features import Features, tokenize
from bertfast.tasks.pretrained import open_model, sequence_length

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model, and what makes embeddings of texts with it.

    Attributes:
        model: The encoder, in evaluation mode.
        tokenizer: Its tokenizer.
        saved_modules: The modules of its folder.
        modules: The same as --pooling and --normalization change them.
        prompt: Text to put before each text.
        num_skipped: Number of first tokens, those of the prompt, that are not pooled.
        max_length: Maximum tokens of a text.
        size: Elements of an embedding, D.
    """

    model: BertModel
    tokenizer: Tokenizer
    saved_modules: SentenceModules
    modules: SentenceModules
    prompt: str
    num_skipped: int
    max_length: int
    size: int

    @property
    def files(self) -> list[Path]:
        """Files of the model that determine embeddings."""
        return [*model_files(self.saved_modules.encoder), *self.saved_modules.files]

    @property
    def normalization(self) -> str:
        """How embeddings are normalised: l2, l2 before truncation, or none."""
        before = "l2 before truncation" if self.modules.normalizes_before_truncation else "none"
        return "l2" if self.modules.normalizes else before

    def with_prompt(self, prompt: str) -> Encoder:
        """Return the same with another prompt.

        Raises:
            ValueError: It leaves no room for texts.
        """
        num_skipped = 0
        if prompt and not self.saved_modules.pools_prompt and self.modules.pooling != ("none",):
            num_skipped = _prompt_length(self.tokenizer, prompt)
            if num_skipped > self.max_length - 2:
                raise ValueError(
                    f"the prompt has {num_skipped} tokens, and texts at most {self.max_length}: choose a shorter one"
                )
        return replace(self, prompt=prompt, num_skipped=num_skipped)

    def features(self, texts: list[Text]) -> Features:
        """Tokenize texts or pairs of texts, with the prompt."""
        if self.prompt:
            texts = [self.prompt + x if isinstance(x, str) else (self.prompt + x[0], x[1]) for x in texts]
        return tokenize(self.tokenizer, texts, self.max_length)

    def log(self, settings: EmbedSettings) -> None:
        """Log how embeddings are made, and which flags replace what the model's files say."""
        saved, name = self.saved_modules, settings.model_name_or_path
        pooling = "one embedding per token" if settings.pooling == "none" else f"pooling {joined(self.modules)}"
        after = "".join(f", {module.effect}" for module in self.modules.after)
        prompt = f", prompt {self.prompt!r}" if self.prompt else ""
        logger.info("%s: %s%s%s, at most %d tokens", name, pooling, after, prompt, self.max_length)
        if is_quantised(self.model.config) and not saved.files and settings.pooling == "auto":
            logger.warning(
                "%s is quantised and has no modules.json, which save_pretrained does not write: copy that of the model "
                "from which it was made, if there is one, and the files that it names; or pass --pooling and "
                "--normalization",
                name,
            )
        if saved.files and settings.pooling not in ("auto", joined(saved)):
            logger.info("--pooling %s replaces that of %s, %s", settings.pooling, name, joined(saved) or "none")
        if settings.normalization != "auto" and len(saved.after) != len(self.modules.after):
            kept = "has a" if settings.normalization == "none" else "has no"
            where = " after truncation" if settings.normalization == "l2" and saved.truncates else ""
            logger.info("--normalization %s: %s %s module Normalize%s", settings.normalization, name, kept, where)
        if self.prompt != saved.prompts.get(saved.default_prompt or "", ""):
            replaced = saved.prompts.get(saved.default_prompt or "", "")
            logger.info("the prompt of %s, %r, is replaced by %r", name, replaced, self.prompt)
        if settings.max_seq_length and saved.max_seq_length and settings.max_seq_length != saved.max_seq_length:
            logger.info("--max-seq-length replaces that of %s, %d", name, saved.max_seq_length)


def joined(modules: SentenceModules) -> str:
    return "+".join(modules.pooling)


def open_encoder(settings: EmbedSettings, device: torch.device) -> Encoder:
    """Open a model, with the pooling, prompt and maximum length of its folder where no flag is given.

    Raises:
        ValueError: Files of the folder are damaged or not supported, or contradict the settings.
    """
    name, precision = settings.model_name_or_path, settings.compute.precision
    folder = resolve(name)
    saved = read_sentence_modules(folder)
    inner = name if saved.encoder == folder else str(saved.encoder)
    model, tokenizer = open_model(BertModel, inner, False, device, precision)
    require_own_precision(model, precision)
    warn_of_few_layers("--layers", settings.layers, model.config)
    saved.prepare_tokenizer(tokenizer)
    modules = saved.changed(settings.pooling, settings.normalization, name)
    _, size = chosen_layers(settings, model)
    size = modules.size_of(size)
    prompt = _prompt(saved, settings)
    given_length = settings.max_seq_length
    max_length = saved.length_for(model.config) if given_length is None else sequence_length(given_length, model.config)
    return Encoder(model, tokenizer, saved, modules, "", 0, max_length, size).with_prompt(prompt)


def _prompt(saved: SentenceModules, settings: EmbedSettings) -> str:
    """Return the text to put before each text."""
    name = settings.prompt_name or saved.default_prompt or "none"
    if settings.prompt is not None:
        if (problem := unpaired_surrogate(settings.prompt)) is not None:
            raise ValueError(f"--prompt: {problem}: write the prompt in UTF-8")
        return settings.prompt
    if name not in saved.prompts and name != "none":
        known = ", ".join(saved.prompts) or "no prompts"
        raise ValueError(f"--prompt-name {name}: {settings.model_name_or_path} has {known}")
    return saved.prompts.get(name, "")


def _prompt_length(tokenizer: Tokenizer, prompt: str) -> int:
    """Return the number of tokens of a prompt, with special tokens before but not after it."""
    ids = tokenizer.encode(prompt).ids
    added = tokenizer.get_added_tokens_decoder()
    return len(ids) - (ids[-1] in added and added[ids[-1]].special)


def chosen_layers(settings: EmbedSettings, model: BertModel) -> tuple[list[int], int]:
    """Return the indices of the hidden states that are used, and the size of what they give for a token."""
    layers, concatenated = select_layers(settings.layers, model.config)
    return layers, model.config.hidden_size * (len(layers) if concatenated else 1)
