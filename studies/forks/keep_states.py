"""Run a training script with the teacher's states kept on disk, so that later runs on the same text read them.

    python studies/forks/keep_states.py runs/states 12 18 24 train_fw.py --start 12 --end 24 ...
    python studies/forks/keep_states.py runs/states 12 18 24 train_fm.py --start 12 --end 18 ...

The numbers are the layers whose entering states are kept: of SmolLM2-135M, 4.7 MB for each layer and batch of 8 x 256
tokens. Each run computes the states of its first batch and compares them with those on disk, if there are any.
"""

import functools
import hashlib
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import lft
import loop

contexts = {}  # by layer and shape: without padding it is the same for all batches


def file_of(folder, ids, number):
    return folder / f"{hashlib.sha256(ids.cpu().numpy()).hexdigest()[:24]}-{number}.pt"


def save(state, file):
    """Whole or not at all."""
    temporary = file.with_suffix(".part")
    torch.save(state.clone(), temporary)
    temporary.rename(file)


def remember(states, number, layer, args):
    states[number] = args[0]


@torch.no_grad()
def hidden_pair(trunk, ids, start, folder, kept):
    """As lft.hidden_pair, which is called for the first batch, for its context, and for those that are not on disk.

    Raises InputError if the states on disk are not those of the trunk.
    """
    end = len(trunk.layers)
    key = (start, end, *ids.shape)
    x0_file = file_of(folder, ids, start)
    x1_file = file_of(folder, ids, end)
    if key in contexts and x0_file.exists() and x1_file.exists():
        return torch.load(x0_file).to(ids.device), torch.load(x1_file).to(ids.device), contexts[key]
    states = {}
    hooks = []
    for number in kept:
        if number < end:
            enter = functools.partial(remember, states, number)
            hooks.append(trunk.layers[number].register_forward_pre_hook(enter))
    x0, x1, contexts[key] = lft.hidden_pair(trunk, ids, start)
    for hook in hooks:
        hook.remove()
    states[end] = x1
    for number, state in states.items():
        file = file_of(folder, ids, number)
        if file.exists() and not torch.equal(torch.load(file), state.cpu()):
            raise lft.InputError(f"{folder} holds states of another teacher or another --compile: give a new folder")
        if number in kept and not file.exists():
            save(state, file)
    return x0, x1, contexts[key]


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    while sys.argv[2].isdigit():
        kept.append(int(sys.argv.pop(2)))
    sys.argv = sys.argv[2:]
    loop.hidden_pair = functools.partial(hidden_pair, folder=folder, kept=kept)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
