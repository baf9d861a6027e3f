"""The tiny model that examples run on if no folder is given."""

from pathlib import Path

from bertfast import BertForPreTraining, BertPreTrainedModel, preset_config
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer


def save_tiny_model(folder: Path, model_class: type[BertPreTrainedModel] = BertForPreTraining) -> str:
    """Write a random BERT with a tokenizer of its own and return its path."""
    tokenizer = train_tokenizer(["A short text. The second reading of a sample agreed with the first."] * 20, 200)
    model_class(preset_config("tiny", vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)
