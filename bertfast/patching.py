"""`bertfast.patch(model)`: run a live `transformers` BERT packed and on our kernels, in place; `unpatch` undoes it.

Parameters, names and classes, as saving and `isinstance` see them, stay. Each call takes the fastest of three ways:

- tokens are packed before the embeddings and unpacked behind the last layer;
- `transformers`' own loop runs, and each layer that can be fused packs and unpacks for itself: where a layer must be
  left alone, as one that a hook watches, or where hidden states are recorded;
- `transformers`' own code runs: attention weights, caches, masks between pairs of tokens, cross-attention, export.
"""

from __future__ import annotations

import functools
import html
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as theirs

from bertfast import encoder
from bertfast.config import ACTIVATIONS
from bertfast.inputs import Layout, Packed, unpad
from bertfast.reference import IGNORED
from bertfast.sequences import Sequences

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_KNOWN = {*_INPUTS, *_PACKING, "return_dict", "use_cache", "output_hidden_states", "num_items_in_batch"}
# What a config says that their modules were made by; reading a live one, as often as layers do, takes its time.
_SETTINGS = ("hidden_size", "num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
_SETTINGS += ("is_decoder",)
# The heads whose loss is the mean over the labels that are there.
_ONE_MEAN = (
    theirs.BertForMaskedLM,
    theirs.BertForMultipleChoice,
    theirs.BertForNextSentencePrediction,
    theirs.BertForSequenceClassification,
    theirs.BertForTokenClassification,
)
_LAYERS_RETURN_TUPLES = int(transformers.__version__.split(".")[0]) < 5
# Of these, the ones that read nothing of the encoder but its pooled output.
_POOLED = (theirs.BertForMultipleChoice, theirs.BertForNextSentencePrediction, theirs.BertForSequenceClassification)
# Whether such a head is at work.
_POOLED_ALONE: ContextVar[bool] = ContextVar("bertfast_pooled_alone", default=False)
# The packed tokens of the call that runs `transformers`' own loop.
_CALL: ContextVar[tuple[Packed, Layout] | None] = ContextVar("bertfast_call", default=None)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Attributes:
        fused: names of modules, and what runs in their place.
        left: names of modules that were left alone, and why.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}", *(f"  {name}: {what}" for name, what in self.fused.items())]
        lines += [f"left alone: {len(self.left)}", *(f"  {name}: {why}" for name, why in self.left.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("fused", *item) for item in self.fused.items()] + [("left alone", *item) for item in self.left.items()]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def patch(model: nn.Module) -> PatchReport:
    """Fuse every BERT of `transformers` inside `model`, in place, and say what was fused and what was left alone.

    What is left alone is decided again at each call, as hooks and adapters come and go; the report is of now.

    Raises TypeError if `model` is no module; ValueError if it holds no BERT, if it is patched already, or if its config
    promises other sizes than the weights have. Nothing has been changed then.
    """
    _check(model)
    report = PatchReport()
    for name, module in [*model.named_modules()]:
        name = name or type(module).__name__
        if isinstance(module, theirs.BertModel):
            sizes = SimpleNamespace(**{name: getattr(module.config, name) for name in _SETTINGS})
            _become(module, _FusedModel, config=sizes)
            for index, layer in enumerate(module.encoder.layer):
                _become(layer, _FusedLayer, config=sizes, index=index)
            _tell(report, name, module)
        elif isinstance(module, theirs.BertPredictionHeadTransform):
            _become(module, _FusedTransform)
            _note(report, name, "bias, GELU and LayerNorm in one", _why_not_transform(module))
        elif isinstance(module, _ONE_MEAN):
            _become(module, _OneMean)
            report.fused[name] = "a step's loss is one mean over all its accumulated batches"
        elif isinstance(module, theirs.BertForPreTraining):
            _become(module, _TwoMeans)
            report.fused[name] = "a step's loss is the mean of its accumulated batches' losses"
    return report


def unpatch(model: nn.Module) -> None:
    """Make a patched model what it was. Raises ValueError if it is not patched."""
    fused = [module for module in model.modules() if isinstance(module, _Fused)]
    if not fused:
        raise ValueError(f"this {type(model).__name__} is not patched, so there is nothing to undo")
    for module in fused:
        module.__dict__.pop("_bertfast", None)
        module.__class__ = module.original


class _Fused:
    """What a patched module is besides its own class, `original`, which comes behind `mixin` in its bases."""

    mixin: type
    original: type
    arguments: tuple[str, ...]  # of forward

    def __reduce_ex__(self, protocol):  # a pickle finds classes by name, and by that name it would find the original
        kept = self.__dict__.get("_bertfast")
        state = self.__dict__ if kept is None else self.__dict__ | {"_bertfast": kept | {"seen": None}}
        return _remake, (self.mixin, self.original), state


class _FusedModel(_Fused):
    def forward(self, *args, **kwargs):
        arguments = dict(zip(self.arguments, args, strict=False)) | kwargs
        if _only_theirs_can(self, arguments):
            if arguments.get("cu_seq_lens_q") is not None:  # which theirs passes over, so that sequences would mix
                raise ValueError("packed input (cu_seq_lens_q) has no attention weights and no cache: give it padded")
            return super().forward(*args, **kwargs)
        outputs = self._run(arguments)
        return_dict = arguments.get("return_dict")
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    @torch.compiler.disable(reason="bertfast's encoder is compiled already, and takes all lengths as they come")
    def _run(self, arguments: dict) -> BaseModelOutputWithPoolingAndCrossAttentions:
        states = arguments.get("output_hidden_states")
        states = self.config.output_hidden_states if states is None else states
        whole = not states and _why_not_whole(self) is None
        layout = None  # of packed input that must be padded for their loop
        if not whole and arguments.get("cu_seq_lens_q") is not None:
            arguments, layout = _padded(arguments)
        packed, places = unpad(
            *(arguments.get(name) for name in _INPUTS),
            cu_seq_lens_q=arguments.get("cu_seq_lens_q"),
            max_length_q=arguments.get("max_length_q"),
            positions=self.config.max_position_embeddings,
            training=self.training,
            pooled=self.pooler is not None,
        )
        # Their pooler reads the first column alone, so it may be given a batch that has no other.
        of_first = type(self.pooler) is theirs.BertPooler and not encoder.is_watched(self.pooler)
        if whole and of_first and _POOLED_ALONE.get() and not encoder.is_watched(self):
            first = encoder.encode(self, packed, packed.first)
            unread = first.new_zeros(()).expand(*places.shape, first.shape[1])
            return BaseModelOutputWithPoolingAndCrossAttentions(unread, self.pooler(first[:, None]))
        if whole:
            hidden = encoder.encode(self, packed)
            pooled = None
            if of_first:
                pooled = self.pooler(hidden[packed.first][:, None])
            elif self.pooler is not None:
                by_row = places
                if places.indices is None:
                    by_row = Layout.of(packed.sequences, packed.sequences.max_seqlen_bound)
                pooled = self.pooler(by_row.pad(hidden))
            return BaseModelOutputWithPoolingAndCrossAttentions(places.pad(hidden), pooled)
        call = _CALL.set((packed, places))
        try:
            own = {name: value for name, value in arguments.items() if name not in _PACKING}
            outputs = super().forward(**own | {"return_dict": True})
        finally:
            _CALL.reset(call)
        if layout is not None:
            outputs.last_hidden_state = layout.unpad(outputs.last_hidden_state, "outputs")[None]
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(layout.unpad(x, "outputs")[None] for x in outputs.hidden_states)
        return outputs


class _FusedLayer(_Fused):
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        config, index = self._bertfast["config"], self._bertfast["index"]
        if args and isinstance(args[0], Packed):
            return encoder.layer(self, config, hidden_states, *args)
        # Under torch.compile their whole model is traced, and no call of ours is under way.
        call = None if torch.compiler.is_compiling() else _CALL.get()
        if call is None or _why_not_layer(self, config, call[0].identity is not None) is not None:
            return super().forward(hidden_states, *args, **kwargs)
        packed, places = call
        hidden = encoder.layer(self, config, places.unpad(hidden_states, "hidden_states"), packed, index)
        return (places.pad(hidden),) if _LAYERS_RETURN_TUPLES else places.pad(hidden)


class _FusedTransform(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _why_not_transform(self) is not None:
            return super().forward(hidden_states)
        return encoder.transform(self, hidden_states.flatten(0, -2), "gelu").view_as(hidden_states)


class _OneMean(_Fused):
    # Theirs take any keyword, so that Trainer believes that they divide by the items of a whole step; they do not.
    accepts_loss_kwargs = True

    def forward(self, *args, num_items_in_batch: Tensor | int | None = None, **kwargs):
        outputs = self._outputs(*args, **kwargs)
        labels = kwargs.get("labels")
        if num_items_in_batch is None or labels is None:
            return outputs
        counted = (labels != IGNORED).sum()
        loss = outputs[0] * counted / num_items_in_batch
        loss = torch.where(counted > 0, loss, torch.zeros_like(loss))  # the mean over no label is not a number
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs.loss = loss
        return outputs

    def _outputs(self, *args, **kwargs):
        if torch.compiler.is_compiling() or all(self.original.forward is not head.forward for head in _POOLED):
            return super().forward(*args, **kwargs)
        pooled_alone = _POOLED_ALONE.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _POOLED_ALONE.reset(pooled_alone)


class _TwoMeans(_Fused):
    accepts_loss_kwargs = False  # means of tokens and of pairs: one number of items cannot serve both


def _become(module: nn.Module, mixin: type, **kept) -> None:
    module.__class__ = _fused_class(mixin, type(module))
    if kept:
        module._bertfast = kept


@functools.cache
def _fused_class(mixin: type, original: type) -> type:
    """`original` with `mixin` before it, under the same name and with the same signature."""
    names = ("__module__", "__qualname__", "__doc__")
    own = {name: getattr(original, name) for name in names} | {"mixin": mixin, "original": original}
    if "forward" in vars(mixin):
        # A function of the class itself, since Trainer asks it which columns of a data set the model takes.
        @functools.wraps(original.forward)
        def forward(self, *args, **kwargs):
            return mixin.forward(self, *args, **kwargs)

        own |= {"forward": forward, "arguments": tuple(signature(forward).parameters)[1:]}
    return type(original.__name__, (mixin, original), own)


def _remake(mixin: type, original: type) -> nn.Module:
    made = _fused_class(mixin, original)
    return made.__new__(made)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        inside = " (its .model is one)" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"patch takes a torch module that holds a BERT, not a {type(model).__name__}{inside}")
    if any(isinstance(module, _Fused) for module in model.modules()):
        raise ValueError("this model is patched already; bertfast.unpatch(model) undoes it")
    berts = [module for module in model.modules() if isinstance(module, theirs.BertModel)]
    if not berts:
        raise ValueError(f"there is no BertModel of transformers in this {type(model).__name__}, so nothing to fuse")
    for bert in berts:
        if type(bert).forward is not theirs.BertModel.forward:
            raise ValueError(f"{type(bert).__name__} has a forward of its own, which packed tokens would pass by")
        config, words = bert.config, bert.get_input_embeddings()
        found = {
            "hidden_size": getattr(words, "embedding_dim", config.hidden_size),
            "max_position_embeddings": bert.embeddings.position_embeddings.num_embeddings,
            "type_vocab_size": bert.embeddings.token_type_embeddings.num_embeddings,
        }
        for name, size in found.items():
            if getattr(config, name) != size:
                promised = getattr(config, name)
                raise ValueError(
                    f"the config promises {name} {promised}, and the weights have {size}: mend one of them"
                )


def _tell(report: PatchReport, name: str, bert: nn.Module) -> None:
    """What happens in a BertModel as it is now."""
    reason = _why_not_embeddings(bert.embeddings, bert._bertfast["config"], bert.training)
    _note(report, f"{name}.embeddings", "on packed tokens", reason)
    if "forward" in vars(bert):
        report.left[name] = "a forward was set on it, which calls what it was before"
    if encoder.is_watched(bert.encoder):
        report.left[f"{name}.encoder"] = "a hook watches it, so its layers pack and unpack one by one"
    for index, layer in enumerate(bert.encoder.layer):
        own = f"{name}.encoder.layer.{index}"
        reason = _why_not_layer(layer, bert._bertfast["config"], bert.training)
        _note(report, own, "attention, LayerNorm and GELU on packed tokens", reason)
        if reason is None:
            for path, module in layer.named_modules():
                if path.rpartition(".")[2] in ("query", "key", "value", "dense") and not encoder.is_plain(module):
                    report.left[f"{own}.{path}"] = f"{type(module).__name__} is called as it is"


def _note(report: PatchReport, name: str, what: str, reason: str | None) -> None:
    if reason is None:
        report.fused[name] = what
    else:
        report.left[name] = reason


def _only_theirs_can(bert: nn.Module, arguments: dict) -> bool:
    """Whether a call asks for what our encoder has not."""
    config, mask = bert.config, arguments.get("attention_mask")
    words, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    use_cache = config.use_cache if arguments.get("use_cache") is None else arguments["use_cache"]
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or any(value is not None and value is not False for name, value in arguments.items() if name not in _KNOWN)
        or (words is None) == (embeds is None)
        or (mask is not None and mask.dim() != 2)
        or bool(config.is_decoder and use_cache)
        or config.output_attentions
        # Their loop, computed again for the backward pass, would know nothing of the call it was in.
        or (bert.training and _is_checkpointed(bert) and _why_not_whole(bert) is not None)
    )


def _is_checkpointed(bert: nn.Module) -> bool:
    return any(layer.gradient_checkpointing for layer in bert.encoder.layer)


class _Seen:
    """What was found when a whole model could be fused, so that a call can tell at a glance that it still is so."""

    def __init__(self, bert: nn.Module):
        modules = [*bert.modules()]
        self.training = bert.training
        self.hooks = [hooks for module in modules for hooks in encoder.hooks(module)]
        self.own = [vars(module) for module in modules]
        self.children = [
            (module._modules, name, child) for module in modules for name, child in module._modules.items()
        ]
        self.modules = modules
        self.dropouts = [(module, module.p) for module in modules if isinstance(module, nn.Dropout)]

    def still_holds(self, bert: nn.Module) -> bool:
        training = bert.training
        return (
            self.training == training
            and not any(self.hooks)
            and not any("forward" in own for own in self.own)
            and all(children.get(name) is child for children, name, child in self.children)
            and all(module.training == training for module in self.modules)
            and all(dropout.p == p for dropout, p in self.dropouts)
        )


def _why_not_whole(bert: nn.Module) -> str | None:
    """Why tokens cannot stay packed from the embeddings to the last layer; None: they can."""
    seen = bert._bertfast.get("seen")
    if seen is not None and seen.still_holds(bert):
        return None
    reason = _look_through(bert)
    bert._bertfast["seen"] = _Seen(bert) if reason is None else None
    return reason


def _look_through(bert: nn.Module) -> str | None:
    if encoder.is_watched(bert.encoder):
        return "a hook watches the encoder"
    config = bert._bertfast["config"]
    reason = _why_not_embeddings(bert.embeddings, config, bert.training)
    for layer in bert.encoder.layer:
        if reason is not None:
            break
        reason = "a hook watches it" if _hooked(layer) else _why_not_layer(layer, config, bert.training)
    return reason


def _why_not_embeddings(module: nn.Module, config, training: bool) -> str | None:
    tables = (module.word_embeddings, module.position_embeddings, module.token_type_embeddings)
    if _hooked(module, *tables):
        return "a hook watches it"
    if not _is_theirs(module) or any(type(table) is not nn.Embedding for table in tables):
        return "its parts are of another kind"
    if any(table.sparse or table.max_norm is not None or table.scale_grad_by_freq for table in tables):
        return "an embedding has options that only PyTorch knows"
    if getattr(module, "position_embedding_type", "absolute") != "absolute":
        return f"positions are {module.position_embedding_type}"
    return _why_not_norm(module.LayerNorm) or _why_not_dropout(
        module.dropout, config.hidden_dropout_prob, module.dropout.training, training
    )


def _why_not_layer(layer: nn.Module, config, training: bool) -> str | None:
    """Why a layer's own code must run; None: ours does the same."""
    attention, middle, output = layer.attention, layer.intermediate, layer.output
    inner, close = attention.self, attention.output
    linears = (inner.query, inner.key, inner.value, close.dense, middle.dense, output.dense)
    if _hooked(attention, inner, close, middle, output, *linears):
        return "a hook watches it"
    if not all(map(_is_theirs, (attention, inner, close, middle, output))):
        return "its parts are of another kind"
    if getattr(inner, "position_embedding_type", "absolute") != "absolute":
        return f"positions are {inner.position_embedding_type}"
    if inner.num_attention_heads != config.num_attention_heads or inner.all_head_size != config.hidden_size:
        return "heads were pruned"
    activation = middle.intermediate_act_fn
    if config.hidden_act not in ACTIVATIONS or type(activation) is not type(ACT2FN[config.hidden_act]):
        return f"its activation is {type(activation).__name__}, not the {config.hidden_act} of the config"
    if _hooked(activation):
        return "a hook watches it"
    return (
        _why_not_norm(close.LayerNorm)
        or _why_not_norm(output.LayerNorm)
        or _why_not_dropout(inner.dropout, config.attention_probs_dropout_prob, inner.training, training)
        or _why_not_dropout(close.dropout, config.hidden_dropout_prob, close.dropout.training, training)
        or _why_not_dropout(output.dropout, config.hidden_dropout_prob, output.dropout.training, training)
    )


def _why_not_transform(module: nn.Module) -> str | None:
    if type(module.transform_act_fn) is not type(ACT2FN["gelu"]):
        return "its activation is not GELU"
    if not encoder.is_plain(module.dense) or _hooked(module.transform_act_fn):
        return "a part of it is not plain"
    return _why_not_norm(module.LayerNorm)


def _why_not_norm(norm: nn.Module) -> str | None:
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None and not _hooked(norm)
    return None if plain else "a LayerNorm is not plain"


def _why_not_dropout(dropout: nn.Module, p: float, drops: bool, training: bool) -> str | None:
    if type(dropout) is not nn.Dropout or _hooked(dropout):
        return "a dropout is not plain"
    if drops != training and dropout.p:
        return "a dropout is in another mode than the model"
    return f"a dropout was changed from {p} to {dropout.p}" if training and dropout.p != p else None


def _is_theirs(module: nn.Module) -> bool:
    return type(module).__module__ == theirs.__name__


def _hooked(*modules: nn.Module) -> bool:
    """Whether someone watches one of these, other than transformers itself."""
    return any(encoder.is_watched(module) and not _is_theirs_alone(module) for module in modules)


def _is_theirs_alone(module: nn.Module) -> bool:
    hooks = [hook for hooks in encoder.hooks(module) for hook in hooks.values()]
    return "forward" not in vars(module) and all(_changes_nothing(hook, module) for hook in hooks)


def _changes_nothing(hook, module: nn.Module) -> bool:
    if hook.__module__ == "transformers.utils.output_capturing":
        return True
    # Words whose layers are computed again are made to want a gradient, which those that learn do anyway.
    return hook.__name__ == "make_inputs_require_grads" and all(p.requires_grad for p in module.parameters())


def _padded(arguments: dict) -> tuple[dict, Layout]:
    """Packed input [1, T] as a padded batch, a sequence a row, and the layout that packs what comes of it."""
    given = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    cu_seqlens = arguments["cu_seq_lens_q"].to(given.device)
    sequences = Sequences.from_cu_seqlens(cu_seqlens, capacity=given.shape[1])
    layout = Layout.of(sequences, sequences.max_seqlen)  # their loop needs the lengths: a GPU is waited for
    own = {name: value for name, value in arguments.items() if name not in _PACKING}
    for name in _INPUTS:
        if own.get(name) is not None:
            own[name] = layout.pad(own[name][0])
    return own | {"attention_mask": layout.pad(sequences.is_token.long())}, layout
