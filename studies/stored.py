"""What do stored hidden states save? Runs a training script on them, so that the layers before the span run once for many runs.

    python studies/stored.py states train_fw.py --teacher smollm2 --data stdlib --start 12 --end 24

States that are missing are computed and stored in float16, a file for each row of text and layer; the run comes out the same
except for rounding. One million tokens of width 576 take 1.2 GB per layer. Options after the script's name are the script's.
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import torch

import train_fm
import train_fw
from eval_kl import fingerprint
from lft import InputError, hidden_pair, run_script, trunk_of

SCRIPTS = {"train_fm.py": train_fm, "train_fw.py": train_fw}


class Stored:
    """Stands in for `trunk_of` and `hidden_pair` of a training script."""

    def __init__(self, folder):
        self.folder, self.contexts = Path(folder), {}

    def trunk_of(self, teacher, end):
        self.teacher = fingerprint(teacher)
        return trunk_of(teacher, end)

    def path(self, layer, row):  # of the states entering the layer, for one row of ids (seq,)
        key = hashlib.sha256(self.teacher.encode() + row.cpu().numpy().tobytes()).hexdigest()
        return self.folder / str(layer) / f"{key[:32]}.npy"

    def hidden_pair(self, trunk, ids, start):
        paths = [[self.path(layer, row) for row in ids] for layer in (start, len(trunk.layers))]
        if ids.shape not in self.contexts or not all(path.exists() for path in sum(paths, [])):
            *states, self.contexts[ids.shape] = hidden_pair(trunk, ids, start)  # the context depends on the shape only
            for path, state in zip(sum(paths, []), torch.cat(states).half().cpu()):
                if not state.isfinite().all():
                    raise InputError(f"the states entering layer {path.parent.name} are too large for float16: do not store them")
                path.parent.mkdir(parents=True, exist_ok=True)
                numpy.save(path.with_suffix(".part.npy"), state)
                os.replace(path.with_suffix(".part.npy"), path)  # whole or not at all
        x0, x1 = (torch.from_numpy(numpy.stack([*map(numpy.load, each)])).to(ids.device).float() for each in paths)
        return x0, x1, self.contexts[ids.shape]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the states are kept")
    parser.add_argument("script", choices=SCRIPTS, help="what to run")
    args, options = parser.parse_known_args()
    stored = Stored(args.folder)
    train_fm.trunk_of, train_fm.hidden_pair = stored.trunk_of, stored.hidden_pair
    sys.argv = [args.script, *options]
    SCRIPTS[args.script].main()


if __name__ == "__main__":
    run_script(main)
