"""What do the cheapest rivals reach? The best n layers to skip, and the best n to replace by a linear map, a "patch".

    python studies/frontier.py runs/rivals.json --start 6 --end 12 18
    python studies/results.py runs/*/table.json --rivals runs/rivals.json       # draws them beside flows

For every span start..end and every text: n layers skipped, n layers patched, and two patches of n layers, all inside the span.
Places are chosen on validation text and scored on test text. The maps are fitted on the texts' training part, without training.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import held_out_rows, take, training_rows
from eval_kl import DEVICES, evaluate, least_squares, standard_error
from lft import load_teacher, replace_span, run_script, trunk_of

CHOICE_TOKENS, FIT_TOKENS = 2048, 32_768


@torch.no_grad()
def cuts(teacher, fit_rows, start, end, longest):
    """All cuts of up to `longest` layers: {("skip" or "patch", n): {first layer: model}}, and {(first, n): linear map}."""
    trunk, models, linear = trunk_of(teacher, end), {}, {}
    batches = fit_rows.to(teacher.device).split(8)
    states = [trunk(ids, use_cache=False, output_hidden_states=True).hidden_states for ids in batches]
    for n in range(1, longest + 1):
        places = range(start, end - n + 1)
        linear |= {(i, n): least_squares((each[i], each[i + n]) for each in states).to(teacher.device) for i in places}
        models["skip", n] = {i: replace_span(teacher, i, i + n) for i in places}
        models["patch", n] = {i: replace_span(teacher, i, i + n, linear[i, n]) for i in places}
    return models, linear


def rivals(teacher, models, linear, tokenizer, text, args):
    """The best of all cuts on one text: dicts of start, end, text, kind, n, layers, kl, kl_stderr, time and tokens."""
    reading, lines = {"data": [text], "tokenizer": tokenizer, "seq_len": args.seq_len}, []
    validation, _ = held_out_rows(tokens=CHOICE_TOKENS, **reading)
    rows, documents = held_out_rows(tokens=args.tokens, test=True, **reading)
    kl = {}
    for (kind, n), places in models.items():
        scores = evaluate(teacher, places, validation, args.start, max(args.end), f"{kind} {n}")
        kl |= {(kind, n, i): score["kl"].mean().item() for i, score in scores.items()}
    chosen = {}  # the model of each row; the best place inside one span may be the best inside another
    for end, n in itertools.product(args.end, range(1, args.longest + 1)):
        places, found = range(args.start, end - n + 1), {}
        for kind in ("skip", "patch") if places else ():
            i = min(places, key=lambda i: kl[kind, n, i])
            found[kind] = f"{i}..{i + n - 1}", models[kind, n][i]
        if pairs := [(i, j) for i, j in itertools.combinations(places, 2) if i + n <= j]:  # the two that do least harm alone
            i, j = min(pairs, key=lambda pair: sum(kl["patch", n, i] for i in pair))
            both = replace_span(models["patch", n][j], i, i + n, linear[i, n])
            found["two patches"] = f"{i}..{i + n - 1} and {j}..{j + n - 1}", both
        for kind, (layers, model) in found.items():
            chosen.setdefault((kind, layers), model)
            lines.append({"start": args.start, "end": end, "text": text, "kind": kind, "n": n, "layers": layers})
    scores = evaluate(teacher, chosen, rows, args.start, max(args.end), "test text")
    for line in lines:
        score = scores[line["kind"], line["layers"]]
        line |= {"kl": score["kl"].mean().item(), "kl_stderr": standard_error(score["kl"], documents)}
        line |= {"time": score["time"].median().item(), "tokens": rows.numel()}
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("json", help="file to write")
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
    fit_rows = take(training_rows(args.data, tokenizer, args.seq_len), FIT_TOKENS // args.seq_len)
    models, linear = cuts(teacher, fit_rows, args.start, max(args.end), args.longest)
    lines = [line for text in args.data for line in rivals(teacher, models, linear, tokenizer, text, args)]
    Path(args.json).write_text(json.dumps(lines, indent=1) + "\n")
    for line in lines:
        print("{text}: {kind} {layers} in {start}..{end}, KL {kl:.4f}, time {time:.2f}".format(**line | {"end": line["end"] - 1}))


if __name__ == "__main__":
    run_script(main)
