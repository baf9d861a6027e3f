"""Runs one after another in the processes that torchrun has started, which takes longer than a run.

    torchrun … ranked_runs.py COMMAND NAME FLAG … -- COMMAND NAME FLAG …

COMMAND is finetune or pretrain. The run named "stopped" gets Ctrl-C in the first process: a pre-training run during its
third step, a fine-tuning run after its second one. Errors are printed.
"""

import signal
import sys
from itertools import groupby

import torch.distributed as dist

from bertfast.cli.flags import parse
from bertfast.runtime.exit import end_process
from bertfast.runtime.signals import RunStopped
from bertfast.training import FinetuneSettings, PretrainSettings, finetune, pretrain

dist.init_process_group("gloo")
for is_run, words in groupby(sys.argv[1:], lambda word: word != "--"):
    if not is_run:
        continue
    command, name, *flags = words

    def interrupt(step: int, name=name) -> None:
        if name == "stopped" and step == 2 and dist.get_rank() == 0:
            signal.raise_signal(signal.SIGINT)

    try:
        if command == "pretrain":
            pretrain(parse(command, PretrainSettings, flags), interrupt)
        else:
            finetune(parse(command, FinetuneSettings, flags), interrupt)
    except (OSError, RunStopped, ValueError) as error:
        print(f"{name}: {error}")
dist.destroy_process_group()
end_process()
