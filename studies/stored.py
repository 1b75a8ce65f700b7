"""Run a training script on hidden states that are stored on disk, so that the layers before a span run once for many runs.

    python studies/stored.py states train_fw.py --teacher smollm2 --start 12 --end 24
    python studies/stored.py states --teacher smollm2 --layers 12 18 24             # only stores

What a run finds missing it computes and stores. States are in float16: a run comes out as without this script, but for the
rounding. States of 1 million tokens at width 576 take 1.2 GB a layer. A folder holds the states of one teacher, text and seq_len.
"""
import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import torch
from tqdm import tqdm

import train_fm
import train_fw
from data import token_rows, training_rows
from lft import InputError, backbone, final_norm, fingerprint, hidden_pair, load_teacher, record_inputs, run_script, trunk_of, write_whole

SCRIPTS = {"train_fm.py": train_fm, "train_fw.py": train_fw}


def key_of(ids):
    """A short key of one row of token ids."""
    return hashlib.sha256(numpy.asarray(ids, numpy.int64).tobytes()).digest()[:16]


class Stored:
    """States entering a teacher's layers, (rows, seq, hidden) each, in a folder; missing ones are computed.

    Raises InputError if the folder holds those of something else.
    """

    def __init__(self, folder, teacher, data, seq_len):
        self.folder, self.data, self.seq_len = Path(folder), data, seq_len
        self.teacher, self.tokenizer = load_teacher(teacher)
        keys = dict.fromkeys(key_of(row["ids"]) for row in token_rows(data, self.tokenizer, seq_len))  # equal rows once
        self.rows = {key: number for number, key in enumerate(keys)}
        text = hashlib.sha256(b"".join(self.rows)).hexdigest()
        made, path = {"teacher": fingerprint(self.teacher), "text": text}, self.folder / "made.json"
        if not path.exists():
            write_whole(path, json.dumps(made).encode())
        elif json.loads(path.read_text()) != made:
            raise InputError(f"{folder} holds the states of another teacher, text or --seq-len: give another folder")
        self.files, self.context = {}, None

    def numbers_of(self, ids):
        """The places of rows of ids (batch, seq) in the files."""
        return [self.rows[key_of(row)] for row in ids.cpu()]

    def file(self, layer):
        """The states of a layer, and which rows of them are there."""
        if layer not in self.files:
            arrays = []
            for suffix, dtype, shape in (("f16", "float16", (len(self.rows), self.seq_len, self.teacher.config.hidden_size)), ("done", "bool", (len(self.rows),))):
                path = self.folder / f"{layer}.{suffix}"
                arrays.append(numpy.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape))
            self.files[layer] = arrays
        return self.files[layer]

    def write(self, layer, numbers, states):
        """Keep the states of these rows."""
        values, done = self.file(layer)
        states = states.half()
        if not states.isfinite().all():
            raise InputError(f"states entering layer {layer} are too large for float16: run the training script without stored states")
        values[numbers] = states.cpu().numpy()
        done[numbers] = True

    def pair(self, trunk, ids, start):
        """As `hidden_pair`, from the disk where all of these rows are there."""
        end = len(backbone(trunk).layers)
        if key_of(ids[0].cpu()) not in self.rows:  # held-out text
            return hidden_pair(trunk, ids, start)
        numbers = self.numbers_of(ids)
        if self.context is None or not all(self.file(layer)[1][numbers].all() for layer in (start, end)):
            x0, x1, self.context = hidden_pair(trunk, ids, start)
            self.write(start, numbers, x0)
            self.write(end, numbers, x1)
        x0, x1 = (torch.from_numpy(self.file(layer)[0][numbers]).to(ids.device).float() for layer in (start, end))
        return x0, x1, self.context

    def store(self, layers, number, compiled):
        """Compute the states of these layers for the first rows that a run of seed 0 takes, so many of them."""
        if compiled:
            self.teacher.set_attn_implementation("eager")
        trunk = train_fm.prepare(trunk_of(self.teacher, max(layers)), self.teacher.device, compiled)
        modules = [*backbone(trunk).layers, final_norm(trunk)]
        rows = iter(training_rows(self.data, self.tokenizer, self.seq_len))
        for _ in tqdm(range(0, min(number, len(self.rows)), 8), mininterval=10):
            ids = torch.tensor([row["ids"] for row in itertools.islice(rows, 8)])
            numbers = self.numbers_of(ids)
            if not all(self.file(layer)[1][numbers].all() for layer in layers):
                with torch.no_grad(), train_fm.autocast(ids.device), record_inputs(*(modules[layer] for layer in layers)) as calls:
                    backbone(trunk)(ids, use_cache=False)
                for layer, (states, _) in zip(layers, calls):
                    self.write(layer, numbers, states)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="where the states are kept")
    add("script", nargs="?", choices=SCRIPTS, help="what to run, with its options after it (default: only store)")
    add("--teacher", required=True, help="as for the script")
    add("--data", default="stdlib", help="as for the script (default %(default)s)")
    add("--seq-len", type=int, default=256, help="as for the script (default %(default)s)")
    add("--layers", type=int, nargs="+", default=[], help="layers whose entering states are stored (default: those that the script wants)")
    add("--rows", type=int, default=10**9, help="of the text to store, in the order of seed 0 (default: all)")
    add("--compile", action="store_true", help="as for the script")
    args, rest = parser.parse_known_args()
    if not args.layers and not args.script:
        parser.error("give --layers, or a script to run")
    stored = Stored(args.folder, args.teacher, args.data, args.seq_len)
    if args.layers:
        stored.store(args.layers, args.rows, args.compile)
    if args.script:
        train_fm.hidden_pair = stored.pair
        options = ["--teacher", args.teacher, "--data", args.data, "--seq-len", str(args.seq_len)]
        sys.argv = [args.script, *options, *(["--compile"] if args.compile else []), *rest]
        SCRIPTS[args.script].main()


if __name__ == "__main__":
    run_script(main)
