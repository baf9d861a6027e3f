"""Embeddings of texts from Python, by an object that mteb takes as a model.

Shapes: S texts, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.inference.embed import embed_texts
from bertfast.inference.embed_settings import EmbedSettings
from bertfast.inference.sentence_encoder import open_encoder
from bertfast.models.files import resolve
from bertfast.runtime.precision import choose_device
from bertfast.tasks.columns import Text
from bertfast.tasks.features import CutTexts, require_characters

_TEXTS = 10_000  # whose tokens are in memory at a time
_ALIASES = {"passage": "document", "document": "passage"}  # names of the same type of prompt in versions of mteb

Vectors = np.ndarray | Tensor


class TextEncoder:
    """A model of embeddings, with the methods that mteb's `EncoderProtocol` names; mteb need not be installed.

    Args:
        model_name: Folder or hub id of a model, of sentence-transformers or not.
        revision: Its revision on the hub.
        device: Device such as "cpu" or "cuda:0"; None: a GPU if one is available.
        settings: Other settings of `bertfast embed` that change embeddings or their speed, such as `pooling` or
            `precision`.

    Attributes:
        mteb_model_meta: The `mteb.ModelMeta` to report, which may be set; None: mteb reports a model without a name.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: It is not supported, or its similarity_fn_name is neither cosine nor dot.
    """

    mteb_model_meta: Any = None

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **settings: Any):
        name = model_name if revision is None else str(resolve(model_name, revision=revision))
        self._settings = EmbedSettings.of(model_name_or_path=name, output_dir=".", device=device, **settings)
        self._encoder = open_encoder(self._settings, choose_device(device))
        similarity = self._encoder.saved_modules.similarity
        if similarity not in ("cosine", "dot"):
            raise ValueError(
                f"{model_name} has the similarity_fn_name {similarity!r:.40}; only cosine and dot are supported"
            )
        if self._settings.pooling == "none":
            raise ValueError("pooling must not be 'none': a text has one embedding here")

    def encode(
        self,
        inputs: Iterable[str | Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        prompt_name: str | None = None,
        task_name: str | None = None,
        **others: Any,
    ) -> np.ndarray:
        """Return the embeddings of texts, fp32 [S, D].

        Args:
            inputs: Texts, or batches with a list of texts under "text", such as those of mteb's DataLoader.
            task_metadata: Name and type of mteb's task. The first of these prompts that the model has is used: name of
                the task and type of prompt, as "NFCorpus-query"; name; type of task and type of prompt; type of task;
                type of prompt; else its default prompt.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: "query" or "document", or what has that as its `value`.
            prompt_name: Name of the prompt to use instead.
            task_name: The task's name, as mteb 1 passes it.
            others: Not used, as a batch is limited by its number of tokens.

        Raises:
            ValueError: There is no prompt of that name, a batch has no texts, or a text is not Unicode.
        """
        texts = _texts(inputs)
        require_characters(texts)
        saved = self._encoder.saved_modules
        names = [prompt_name] if prompt_name is not None else []
        names = names or _prompt_names(task_metadata, task_name, prompt_type, saved.prompts)
        if prompt_name is not None and prompt_name not in saved.prompts:
            known = ", ".join(saved.prompts) or "no prompts"
            raise ValueError(f"prompt_name {prompt_name!r}: {self._settings.model_name_or_path} has {known}")
        chosen = next((name for name in names if name in saved.prompts), None)
        encoder = self._encoder if chosen is None else self._encoder.with_prompt(saved.prompts[chosen])
        cut = CutTexts(self._settings.model_name_or_path, encoder.max_length)
        parts = [
            embed_texts(encoder, self._settings, texts[start : start + _TEXTS], cut)
            for start in range(0, len(texts), _TEXTS)
        ]
        cut.report()
        return np.concatenate(parts) if parts else np.empty((0, encoder.size), np.float32)

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return the similarities of all pairs of embeddings, fp32 [S1, S2] of [S1, D] and [S2, D]."""
        first, second = self._compared(embeddings1), self._compared(embeddings2)
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return the similarities of corresponding embeddings, fp32 [S] of [S, D] and [S, D]."""
        return (self._compared(embeddings1) * self._compared(embeddings2)).sum(1)

    def _compared(self, embeddings: Vectors) -> Tensor:
        """Return embeddings of which the dot product is the similarity, fp32 [S, D]."""
        vectors = torch.atleast_2d(torch.as_tensor(embeddings, dtype=torch.float32))
        return F.normalize(vectors, dim=1) if self._encoder.saved_modules.similarity == "cosine" else vectors


def _texts(inputs: Iterable[str | Mapping[str, Any]]) -> list[Text]:
    """Return the texts of batches."""
    if isinstance(inputs, str):
        raise ValueError("inputs must be a list of texts, got one text: put it in a list")
    texts: list[Text] = []
    for batch in inputs:
        if isinstance(batch, str):
            texts.append(batch)
        elif isinstance(batch, Mapping) and "text" in batch:
            texts += batch["text"]
        else:
            found = f"but is of type {type(batch).__name__}"
            if isinstance(batch, Mapping):
                found = f"and has {', '.join(map(str, batch)) or 'nothing'}"
            raise ValueError(f"each batch must have texts under 'text', {found}: other modalities are not supported")
    return texts


def _prompt_names(task_metadata: Any, task_name: str | None, prompt_type: Any, prompts: Mapping[str, str]) -> list[str]:
    """Return the names under which the prompt of a task may stand, the most specific first."""
    kind = getattr(prompt_type, "value", prompt_type)
    kinds = [] if kind is None else [str(kind), *([_ALIASES[kind]] if kind in _ALIASES else [])]
    kinds.sort(key=lambda name: not prompts.get(name))  # sentence-transformers adds an empty prompt "document"
    names: list[str] = []
    for name in (getattr(task_metadata, "name", task_name), getattr(task_metadata, "type", None)):
        if name is not None:
            names += [*(f"{name}-{kind}" for kind in kinds), str(name)]
    return [*names, *kinds]
