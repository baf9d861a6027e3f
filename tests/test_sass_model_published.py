"""`bench.sass_model.published` compares the fastest variant with published times, as an autotuner would choose it."""

import json
import sys

import pytest
from sass_listings import EXIT, listing

from bench.sass_model import constants, published
from bench.sass_model.control_words import Control


def variant(extra: int = 0, shared_memory: int = 0) -> dict:
    """Return a kernel of 64 x 64 blocks: per block of keys eight wgmma, and `extra` instructions."""
    group = [("HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], R24, gsb0", Control(1))] * 8
    wait = [("WARPGROUP.DEPBAR.LE gsb0, 0x0", Control(1))]
    softmax = [("MUFU.EX2 R1, R2", Control(1))] * extra
    code = listing([*group, *wait, *softmax, ("@P0 BRA 0x0", Control(1)), EXIT])
    shape = {"block_m": 64, "block_n": 64, "stages": 3, "warps": 4}
    return {**shape, "registers": 128, "shared_memory": shared_memory, "listing": code}


def compiled(*variants: dict) -> dict:
    return {"head_dimension": 64, "triton": "3.0.0", "commit": "0123456", "variants": list(variants)}


def test_the_fastest_variant_is_compared_and_one_that_does_not_fit_is_not():
    slow, fast, large = variant(extra=100), variant(extra=20), variant(shared_memory=300_000)
    (alone,) = published.compare(compiled(fast), [512])
    (chosen,) = published.compare(compiled(slow, large, fast), [512])
    assert chosen.predicted == alone.predicted
    assert chosen.variant == alone.variant
    assert chosen.published == 340
    assert chosen.error == pytest.approx(chosen.predicted / 340 - 1)


def test_matmuls_alone_reach_the_peak_and_special_functions_slow_them_down(monkeypatch):
    """A block of keys: 8 wgmma of 32 cycles; 100 MUFU of 8 cycles per warp, of four warps at a time."""
    monkeypatch.setattr(constants, "L2_BYTES", 1e6)  # blocks of 64 rows would be bound by L2
    (ideal,) = published.compare(compiled(variant()), [2048])
    assert 0.9 * 989 < ideal.predicted <= 989.6
    (bound,) = published.compare(compiled(variant(extra=100)), [2048])
    assert bound.predicted == pytest.approx(989 * 256 / 800, rel=0.05)
    assert bound.prediction.bound.startswith("MUFU")


def test_slow_variants_are_not_simulated_at_long_lengths(monkeypatch):
    calls = []
    predict = published.predict
    monkeypatch.setattr(
        published, "predict", lambda kernel, *rest: calls.append(kernel.listing) or predict(kernel, *rest)
    )
    slow, fast = variant(extra=100), variant(extra=20)
    published.compare(compiled(slow, fast), [2048, 4096])
    assert calls.count(fast["listing"]) == 2
    assert calls.count(slow["listing"]) == 1


def test_the_table_names_the_largest_error(monkeypatch, tmp_path):
    files = [tmp_path / "variants.json", tmp_path / "table.md"]
    files[0].write_text(json.dumps(compiled(variant(extra=100))))
    monkeypatch.setattr(
        sys, "argv", ["published", str(files[0]), "--lengths", "512", "2048", "--output", str(files[1])]
    )
    published.main()
    text = files[1].read_text()
    worst = min(one.error for one in published.compare(compiled(variant(extra=100)), [512, 2048]))
    assert f"Triton 3.0.0, tutorial of commit 0123456: largest error {worst:+.0%}" in text
    assert "| 512 | 340 |" in text
    assert "| 2,048 | 396 |" in text


def test_held_out_figures_are_marked():
    known = compiled(variant(extra=100))
    seen, held_out = published.compare(known, [512, 1024])
    assert not seen.held_out
    assert held_out.held_out
    heading, *_, line_of_seen, line_of_held_out = published.table(known, [seen, held_out])
    assert heading.endswith(f"held out {held_out.error:+.0%}")
    assert "| yes |" in line_of_held_out
    assert "| yes |" not in line_of_seen
