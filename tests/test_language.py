"""The repository uses the terms of its field: a pattern per phrase or name that was replaced, and what to write."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml", ".yaml", ".yml", ".cff", ""}
# Results name what was measured as it was called then.
EXCLUDED = ("bench/results/", "tests/test_language.py", "LICENSE")

FORBIDDEN = {
    # matrix products
    r"share_of_products|of_products|matrix[ _]rate": "gemm_efficiency",
    r"(?<!import )(?<!\.)(?<!vector )(?<!inner )(?<!outer )(?<!dot[ _])products?(?!\()": "GEMM, matmul",
    r"the floor": "lower bound, roofline",
    # tokens and sequences
    r"vocabulary_size": "vocab_size",
    r"(?<!in[ _-])(?<!take )(?<!takes )(?<!only )(?<!one )places?": "slots, indices, positions",
    r"token_numbers?|sequence_numbers?": "sequence_ids",
    r"length_limit": "max_seqlen_bound",
    r"guests?": "query-only tokens",
    r"inert": "padding slots, unused slots",
    r"words alone": "unigram baseline; only words",
    r"words(?=: int\b|=\d)": "vocab_size",
    # operators
    r"TokenIdentity": "RNG coordinates",
    r"[Dd]ropout\.word": "dropout.counter_word",
    r"why_not|refusals?": "unsupported reason",
    r"launchers?": "operator",
    r"keys_of|queries_of": "kv range, q range",
    r"soften|Sight": "online softmax, attention mask",
    r"share_work|(give|take)_registers": "tile scheduler, setmaxnreg",
    r"inert_\w+|guest_\w+|places_of|numbers_of": "unused_, query_only_, slots, sequence_ids",
    r"(?-i:IGNORED)": "IGNORE_INDEX",
    r"FINEST|BRAIN|CHANCE": "highest precision, BF16, tolerance, rng",
    # hardware
    r"(?<!tokenizers\.)(?<!import )processors|multiprocessors?": "SMs, cores, CPUs",
    r"second[- ]level cache": "L2",
    r"matrix units?": "tensor core",
    r"chips?": "GPU architecture, GPU",
    # training
    r"(?-i:Ranks)|Journals?|(?-i:Sink)": "distributed, metrics logger, writer",
    r"Footprint|(?-i:Replayed|Recorder|EAGER)": "memory estimate, CUDA-graph runner",
    r"usual_loss|(?-i:USUAL|SPIKE(?!_THRESHOLD))|starting_model": "loss EMA, EMA decay, spike threshold, initial model",
    r"--task[ =](answers|tags|choices)": "question-answering, token-classification, multiple-choice",
    r"blanks right|told right": "MLM accuracy, classified correctly",
    r"nats a blank": "nats per masked token",
    r"untaught|taught|teach(es|ing)?": "train; from scratch",
    r"sum-last-four|sum-all": "mean-last-four, mean-all",
    # benchmarks
    r"contests?|contenders?|providers?(?!\w)": "cases, implementation, factory",
    r"ours|theirs": "bertfast, transformers",
    # sentences
    r"is no number|are no numbers": "NaN",
    r"made (again|anew)|anew": "recomputed, again",
    r"(?<!you )wants?|wanted": "requires, needs_grad",
    r"(is|are) not to be had|to be had": "is not available",
    r"beside": "compared with, vs, next to",
    r"strangers?": "unexpected",
    r"to the last bit|bit for bit": "bitwise identical",
    r"(?-i:SOME)": "name what it is: SELECTED, PART, …",
    r"at a stretch": "uninterrupted",
    r"from left to right": "causal, left-to-right",
    r"(bytes?|numbers?|rows?|bits?|elements?) an? (thread|token|row|warp|element|step|second|operation)": "… per …",
    r"a page an": "one page per",
    r"where (nvcc|there is|there are) \w+ ?is\b": "if … is available",
    r"whatever|whoever": "any; name what it is",
    r"is known by": "is identified by",
    r"does without|do without": "does not need",
    r"of it\.(?=\s|$)": "name what it is",
    r"behind (an?|the|its?|their|those|them|these|each|every|all)": "after",
    r"hold no values": "are fake or on meta",
    # descriptions of arguments and settings
    r"(?<=: )(?-i:Of) (an?|the|each|x)(?=[^:\n]*\.)": "a noun first: Factor of the scores.",
    r"(?<=[;.] )(?-i:none): ": "If not given: …",
}
# A group per pattern, so that one search finds the next match of any. Parts of identifiers count, and so does the first
# word of a sentence: patterns match in any case, except those that say otherwise with (?-i:…).
SEARCH = re.compile(
    rf"(?<![^\W_])(?<!-)(?:{'|'.join(f'(?P<p{i}>{pattern})' for i, pattern in enumerate(FORBIDDEN))})(?![^\W_])(?!-)",
    re.IGNORECASE,
)
BETTER = list(FORBIDDEN.values())


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.splitlines() if Path(name).suffix in SUFFIXES and not name.startswith(EXCLUDED)]


def violations(text: str) -> list[str]:
    """Return a line for each forbidden phrase in a text."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write: {BETTER[int(match.lastgroup[1:])]}"
        for match in SEARCH.finditer(text)
    ]


@pytest.mark.parametrize(
    "line", ["# the matrix rate of a chip", "def why_not(x):", "Whatever is left.", "ours_32 = 1", "_SOME_ROWS = 2"]
)
def test_a_forbidden_phrase_is_found(line):
    assert violations(line)


@pytest.mark.parametrize(
    "line",
    [
        "The sum is computed in place.",
        "from itertools import product",
        "placeholder",
        "scaled_dot_product_attention",
        "SPIKE_THRESHOLD = 0.5",
        "ranks of processes",
        "from tokenizers import processors",
        "tokenizers.processors.TemplateProcessing()",
    ],
)
def test_a_term_of_the_field_is_allowed(line):
    assert violations(line) == []


def test_the_repository_has_no_forbidden_phrase():
    found = [f"{name}:{violation}" for name in tracked_files() for violation in violations((ROOT / name).read_text())]
    assert not found, "\n".join(found)
