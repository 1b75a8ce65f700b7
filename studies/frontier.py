"""What do the cheapest rivals reach? The best n layers to skip, and the best n to replace by a linear map, a "patch".

    python studies/frontier.py runs/rivals --start 6 --end 12 18
    python studies/results.py runs              # prints and draws them beside flows

For every text: n layers skipped, n layers patched, and two patches of n layers, between --start and the last --end.
Places are chosen on validation text, in bfloat16 where that is fast, and scored on test text. The maps are fitted on
the training text. For each span start..end, skips are averaged over all places: 2 layers, or 3 of 12 and more, as in
the paper. Writes a table for each text, like those of eval_kl.py.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import held_out_windows, take, training_windows
from eval_kl import evaluate, fit_linear, in_batches, make_row
from lft import hidden_pair, replace_span, trunk_of
from loop import autocast
from run import DEVICES, hashes, load_teacher, run_script

FIT_TOKENS = 32_768
LONGEST = 5  # layers skipped or patched in one place
CHOICE_TOKENS = 4_096  # of validation text: the best cut is chosen among a hundred


def layer_states(teacher, ids):
    """The states entering each layer, and the one leaving the last, before the norm; a list."""
    *states, _ = teacher(ids, use_cache=False, output_hidden_states=True).hidden_states
    _, last, _ = hidden_pair(trunk_of(teacher, len(states)), ids, 0)
    return [*states, last]


def fit_patches(teacher, windows, start, end):
    """The linear map for each place of up to LONGEST layers inside start..end-1: {(first, n): map}."""
    states = []
    for ids in in_batches(teacher, windows):
        states.append(layer_states(teacher, ids))
    patches = {}
    for n in range(1, LONGEST + 1):
        for first in range(start, end - n + 1):
            patches[first, n] = fit_linear([(each[first], each[first + n], None) for each in states])
    return patches


def candidates(teacher, patches):
    """All ways to skip or patch layers: {(kind, first, n): model}."""
    models = {}
    for first, n in patches:
        models["skip", first, n] = replace_span(teacher, first, first + n)
        models["patch", first, n] = replace_span(teacher, first, first + n, patches[first, n])
    return models


def choose(models, kl, patches, n):
    """The best models with n layers cut, by their KL on validation text: {name: model}."""
    places = [first for first, length in patches if length == n]
    skip = min(places, key=lambda first: kl["skip", first, n])
    patch = min(places, key=lambda first: kl["patch", first, n])
    chosen = {"skipped, best place": models["skip", skip, n], "a linear map, best place": models["patch", patch, n]}
    pairs = [(i, j) for i, j in itertools.combinations(places, 2) if i + n <= j]
    if pairs:  # the two that do least harm alone
        i, j = min(pairs, key=lambda pair: kl["patch", pair[0], n] + kl["patch", pair[1], n])
        chosen["two linear maps, best places"] = replace_span(models["patch", j, n], i, i + n, patches[i, n])
    return chosen


def best_rows(teacher, models, kl, patches, split, span):
    """The rows of the best cuts."""
    rows = []
    for n in range(1, LONGEST + 1):
        chosen = choose(models, kl, patches, n)
        scores = evaluate(teacher, chosen, split.test)
        for name, model in chosen.items():
            layers = 2 * n if name.startswith("two") else n
            rows.append(make_row(name, f"{layers} of {span}", model, scores[name], split))
    return rows


def mean_row(teacher, split, start, end):
    """The row of skips averaged over all places in start..end-1."""
    n = 3 if end - start >= 12 else 2
    models = {i: replace_span(teacher, i, i + n) for i in range(start, end - n + 1)}
    scores = evaluate(teacher, models, split.test)
    mean = {key: torch.stack([score[key] for score in scores.values()]).mean(dim=0) for key in scores[start]}
    return make_row("skipped, mean of places", f"{n} of {start}..{end - 1}", models[start], mean, split)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, help="folder for the tables")
    add("--start", type=int, default=6, help="first layer that may be cut (default: %(default)s)")
    add("--end", type=int, nargs="+", default=[12, 18], help="first layers to keep (default: 12 and 18)")
    add("--teacher", default="tiny_teacher", help="a folder or a model on the hub (default: %(default)s)")
    add("--data", nargs="+", default=["stdlib"], help="texts, as for train_fm.py (default: stdlib)")
    add("--seq-len", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    add("--tokens", type=int, default=16_384, help="test tokens of each text (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_teacher(args.teacher, DEVICES[0])
    reading = {"tokenizer": tokenizer, "seq_len": args.seq_len}
    windows = take(training_windows(args.data, **reading), FIT_TOKENS // args.seq_len)
    patches = fit_patches(teacher, windows, args.start, max(args.end))
    models = candidates(teacher, patches)
    for text in args.data:
        test, documents = held_out_windows([text], tokens=args.tokens, test=True, **reading)
        validation, _ = held_out_windows([text], tokens=CHOICE_TOKENS, **reading)
        split = SimpleNamespace(test=test, documents=documents)
        with autocast(teacher.device):
            scores = evaluate(teacher, models, validation, f"{text}: {len(models)} cuts")
        kl = {name: score["kl"].mean().item() for name, score in scores.items()}
        rows = best_rows(teacher, models, kl, patches, split, f"{args.start}..{max(args.end) - 1}")
        for end in args.end:
            rows.append(mean_row(teacher, split, args.start, end))
        training = {"method": "rivals", "teacher": args.teacher, "start": args.start, "end": max(args.end)}
        training.update(hashes(teacher, tokenizer), data=args.data, seq_len=args.seq_len)
        table = {"data": [text], "tokens": test.numel(), "training": training, "rows": rows}
        (args.out / f"table-{Path(text).name}.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
