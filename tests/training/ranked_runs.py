"""Runs one after another in the processes that torchrun has started, which takes longer than a run.

    torchrun … ranked_runs.py NAME FLAG … -- NAME FLAG …

NAME "stopped …" gets Ctrl-C in the first process during its third step.
"""

import signal
import sys
from itertools import groupby

import torch.distributed as dist

from bertfast.cli.flags import parse
from bertfast.runtime.exit import end_process
from bertfast.runtime.signals import RunStopped
from bertfast.training.pretraining import PretrainSettings, pretrain

dist.init_process_group("gloo")
for is_run, words in groupby(sys.argv[1:], lambda word: word != "--"):
    if not is_run:
        continue
    name, *flags = words

    def interrupt(step: int, name=name) -> None:
        if name == "stopped" and step == 2 and dist.get_rank() == 0:
            signal.raise_signal(signal.SIGINT)

    try:
        pretrain(parse("pretrain", PretrainSettings, flags), interrupt)
    except RunStopped as stopped:
        print(f"{name}: {stopped}")
dist.destroy_process_group()
end_process()
