"""Exported ONNX graphs of other families than BERT give the outputs of transformers' models."""

import pytest
import torch
from family_models import GRAPHS, PREFIXES, VOCABULARY, FamilyCase, has_class, plain

from bertfast.cli.main import main

pytest.importorskip("onnxruntime", reason="the extra `onnx`")
pytest.importorskip("onnxscript", reason="the extra `onnx`")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "task"), [(family, task) for family in PREFIXES for task in GRAPHS if has_class(family, task)]
)
def test_onnx_runtime_gives_the_outputs_of_transformers(family, task, tmp_path, capsys):
    import onnxruntime

    hf = plain(FamilyCase(family, task))
    hf.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "onnx"]) == 0
    assert "for any batch size and sequence length" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    ids = torch.randint(4, VOCABULARY, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = hf.config.pad_token_id or 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    feeds = {entry.name: values[entry.name] for entry in session.get_inputs()}
    with torch.no_grad():
        expected = hf(**feeds)
    assert session.get_outputs()
    for output in session.get_outputs():
        (result,) = session.run([output.name], {name: x.numpy() for name, x in feeds.items()})
        torch.testing.assert_close(torch.from_numpy(result), expected[output.name], rtol=1e-3, atol=1e-4)
