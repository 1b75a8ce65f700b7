"""Where does a flow pay? KL against forward time, for skipped layers, linear patches and flows.

    python studies/frontier.py --run runs/fw-6-18 runs/curves-6-18.json
    python studies/frontier.py runs/curves-*.json runs/*/table.json

The first scores the rivals of a run inside its span, on each of its texts: n layers skipped, n layers replaced by a linear map (a
patch), and two patches of n layers. Places are chosen on validation text and scored on test text. The second draws these curves
and the flows of the tables that eval_kl.py --json wrote, a panel for each span and text; runs named NAME-seedN are averaged.
"""
import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import held_out_rows, training_rows
from eval_kl import DEVICES, VALIDATION_TOKENS, evaluate, fit_linear, load_student, standard_error
from lft import load_teacher, replace_span, run_script
from studies.results import SHOWN, pyplot


def best_models(teacher, rows, fit_rows, start, end, longest):
    """{(kind, n): (layers, model)}: the best place of each kind of cut, by its KL on rows of validation text."""
    found = {}
    for n in range(1, longest + 1):
        linear = {i: fit_linear(teacher, fit_rows, i, i + n) for i in range(start, end - n + 1)}
        skips = {i: replace_span(teacher, i, i + n) for i in linear}
        patches = {i: replace_span(teacher, i, i + n, linear[i]) for i in linear}
        for kind, models in ("skip", skips), ("patch", patches):
            scores = evaluate(teacher, models, rows, start, end, f"{kind} {n}")
            kl = {i: score["kl"].mean().item() for i, score in scores.items()}
            best = min(kl, key=kl.get)
            found[kind, n] = f"{best}..{best + n - 1}", models[best]
        pairs = [(i, j) for i, j in itertools.combinations(linear, 2) if i + n <= j]
        if n > 1 and pairs:  # the two patches that do least harm alone
            i, j = min(pairs, key=lambda pair: kl[pair[0]] + kl[pair[1]])
            both = replace_span(patches[j], i, i + n, linear[i])
            found["two patches", n] = f"{i}..{i + n - 1} and {j}..{j + n - 1}", both
    return found


def curves(run, longest, tokens, device):
    """The rows of all curves: dicts of text, kind, n, layers, kl, kl_stderr and time."""
    student, lines = load_student(run, device), []
    config, training = student.config, student.config.training
    teacher, tokenizer = load_teacher(config.teacher, device)
    text = {"tokenizer": tokenizer, "seq_len": training["seq_len"]}
    fit_rows = itertools.islice(training_rows(training["data"], **text), 32_768 // training["seq_len"])
    fit_rows = torch.tensor([row["ids"] for row in fit_rows])
    for data in training["data"]:
        validation, _ = held_out_rows([data], tokens=VALIDATION_TOKENS, **text)
        rows, documents = held_out_rows([data], tokens=tokens, test=True, **text)
        found = best_models(teacher, validation, fit_rows, config.start, config.end, longest)
        scores = evaluate(teacher, {key: model for key, (_, model) in found.items()}, rows, config.start, config.end, "test text")
        for (kind, n), score in scores.items():
            lines.append({"start": config.start, "end": config.end, "text": data, "kind": kind, "n": n, "layers": found[kind, n][0],
                          "kl": score["kl"].mean().item(), "kl_stderr": standard_error(score["kl"], documents),
                          "time": score["time"].median().item()})  # fmt: skip
    return lines


def draw(axes, curves, tables):
    """One panel: curves are its rows; tables {name of a run, without its seed: the tables of its seeds}."""
    for kind, marker in ("skip", "s"), ("patch", "D"), ("two patches", "P"):
        points = sorted((line["time"], line["kl"]) for line in curves if line["kind"] == kind)
        axes.plot(*zip(*points), f"{marker}--", color="gray", ms=5, lw=1, label=kind)
    for name, seeds in tables.items():
        rows = [{row["name"]: row for row in table["rows"]} for table in seeds]
        shown = [row for row in SHOWN if "regression" not in name] or ["LFT euler x1"]
        points = [[statistics.mean(row[each][key] for row in rows) for key in ("prefill_time", "kl")] for each in shown]
        axes.plot(*zip(*sorted(points)), "o-", ms=5, lw=1, label=name)
    axes.set(xlabel="time of a forward pass, relative to the teacher", yscale="log")
    axes.legend(fontsize=8)


def picture(file, curves, tables):
    panels = sorted({(line["start"], line["end"]) for line in curves}), [*dict.fromkeys(line["text"] for line in curves)]
    shape = {"nrows": len(panels[0]), "ncols": len(panels[1])}
    figure, grid = pyplot.subplots(**shape, figsize=(6 * shape["ncols"], 4.5 * shape["nrows"]), layout="constrained", squeeze=False)
    for (start, end), text in itertools.product(*panels):
        axes, groups = grid[panels[0].index((start, end)), panels[1].index(text)], {}
        for name, table in tables:
            if (table["start"], table["end"], table["data"]) == (start, end, [text]):
                groups.setdefault(name, []).append(table)
        draw(axes, [line for line in curves if (line["start"], line["end"], line["text"]) == (start, end, text)], groups)
        name = Path(text).parent.name or text  # the folder of a glob
        axes.set(title=f"{name}, layers {start}..{end - 1}", ylabel="KL, nats per token: lower is better")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", help="with --run: the file to write its curves to; else files of curves and tables to draw")
    add("--run", help="folder of a trained student, whose span and texts are used")
    add("--longest", type=int, default=6, help="layers to skip or patch at most")
    add("--tokens", type=int, default=32_768, help="test tokens of each text")
    add("--picture", default="runs/pictures/frontier.png", help="file to draw")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run")
    args = parser.parse_args()
    if args.run:
        Path(args.files[0]).write_text(json.dumps(curves(args.run, args.longest, args.tokens, args.device), indent=1))
        return
    found = {file: json.loads(Path(file).read_text()) for file in args.files}
    tables = [(Path(file).parent.name.split("-seed")[0], table) for file, table in found.items() if "rows" in table]
    picture(args.picture, sum((lines for lines in found.values() if "rows" not in lines), []), tables)


if __name__ == "__main__":
    run_script(main)
