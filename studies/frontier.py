"""What do the cheapest rivals reach? The best n layers to skip, and the best n to replace by a linear map, a "patch".

    python studies/frontier.py runs/rivals.json --start 6 --end 12 18
    python studies/results.py runs/*/table.json --rivals runs/rivals.json       # draws them beside flows

For every span start..end and every text: n layers skipped, n layers patched, and two patches of n layers, all inside
the span. Places are chosen on validation text and scored on test text. The maps are fitted on the training text.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import held_out_windows, take, training_windows
from eval_kl import evaluate, fit_linear, in_batches, standard_error
from lft import hidden_pair, replace_span, trunk_of
from run import DEVICES, hashes, load_teacher, run_script

FIT_TOKENS = 32_768


def layer_states(teacher, ids):
    """The states entering each layer, and the one leaving the last, before the norm; a list."""
    *states, _ = teacher(ids, use_cache=False, output_hidden_states=True).hidden_states
    _, last, _ = hidden_pair(trunk_of(teacher, len(states)), ids, 0)
    return [*states, last]


def fit_patches(teacher, windows, start, end, longest):
    """The linear map for each place of up to `longest` layers inside start..end-1: {(first, n): map}."""
    states = []
    for ids in in_batches(teacher, windows):
        states.append(layer_states(teacher, ids))
    patches = {}
    for n in range(1, longest + 1):
        for first in range(start, end - n + 1):
            patches[first, n] = fit_linear([(each[first], each[first + n], None) for each in states])
    return patches


def candidates(teacher, patches, start, end, n):
    """All ways to skip or patch n layers of start..end-1: {kind: {first layer: model}}."""
    places = range(start, end - n + 1)
    return {
        "skip": {i: replace_span(teacher, i, i + n) for i in places},
        "patch": {i: replace_span(teacher, i, i + n, patches[i, n]) for i in places},
    }


def choose(models, kl, patches, n):
    """The best models of candidates by their KL on validation text: {kind: (layers, model)}."""
    chosen = {}
    for kind, places in models.items():
        i = min(places, key=kl[kind].get)
        chosen[kind] = (f"{i}..{i + n - 1}", places[i])
    pairs = [(i, j) for i, j in itertools.combinations(models["patch"], 2) if i + n <= j]
    if pairs:  # the two that do least harm alone
        i, j = min(pairs, key=lambda pair: kl["patch"][pair[0]] + kl["patch"][pair[1]])
        both = replace_span(models["patch"][j], i, i + n, patches[i, n])
        chosen["two patches"] = (f"{i}..{i + n - 1} and {j}..{j + n - 1}", both)
    return chosen


def rivals(teacher, patches, split, start, end, longest):
    """The best cuts of start..end-1 on one text: dicts of kind, n, layers, kl, kl_stderr and time."""
    lines = []
    for n in range(1, min(longest, end - start) + 1):
        models = candidates(teacher, patches, start, end, n)
        kl = {}
        for kind, places in models.items():
            scores = evaluate(teacher, places, split.validation, f"{kind} {n}")
            kl[kind] = {i: score["kl"].mean().item() for i, score in scores.items()}
        chosen = choose(models, kl, patches, n)
        scores = evaluate(teacher, {kind: model for kind, (_, model) in chosen.items()}, split.test)
        for kind, (layers, _) in chosen.items():
            line = {"kind": kind, "n": n, "layers": layers, "kl": scores[kind]["kl"].mean().item()}
            line["kl_stderr"] = standard_error(scores[kind]["kl"], split.documents)
            line["time"] = scores[kind]["time"].median().item()
            lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("json", type=Path, help="file to write")
    add("--start", type=int, default=6, help="first layer of the spans (default: %(default)s)")
    add("--end", type=int, nargs="+", default=[12, 18], help="first layers to keep after them (default: 12 and 18)")
    add("--teacher", default="tiny_teacher", help="a folder or a model on the hub (default: %(default)s)")
    add("--data", nargs="+", default=["stdlib"], help="texts, as for train_fm.py (default: stdlib)")
    add("--seq-len", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    add("--longest", type=int, default=6, help="most layers to skip or patch in one place (default: %(default)s)")
    add("--tokens", type=int, default=16_384, help="test tokens of each text (default: %(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run (default: %(default)s)")
    args = parser.parse_args()
    teacher, tokenizer = load_teacher(args.teacher, args.device)
    reading = {"tokenizer": tokenizer, "seq_len": args.seq_len}
    windows = take(training_windows(args.data, **reading), FIT_TOKENS // args.seq_len)
    patches = fit_patches(teacher, windows, args.start, max(args.end), args.longest)
    lines = []
    for text in args.data:
        test, documents = held_out_windows([text], tokens=args.tokens, test=True, **reading)
        validation, _ = held_out_windows([text], tokens=args.tokens, **reading)
        split = SimpleNamespace(test=test, documents=documents, validation=validation)
        for end in args.end:
            for line in rivals(teacher, patches, split, args.start, end, args.longest):
                line.update(start=args.start, end=end, text=text, tokens=test.numel(), seq_len=args.seq_len)
                line.update(hashes(teacher, tokenizer))
                lines.append(line)
                print(f"{text}: {line['kind']} {line['layers']} in {args.start}..{end - 1}, KL {line['kl']:.4f}")
    args.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
