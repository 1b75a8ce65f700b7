"""What do several runs show together? A Markdown table of means over seeds, KL against forward time, training curves.

    python eval_kl.py runs/fw-6-18 --json runs/fw-6-18/table.json      # for each run, or for each run and text
    python studies/results.py runs/*/table.json --rivals runs/rivals.json

Each table stands beside the log.jsonl of its run. Runs whose options differ in the seed only are seeds of one method.
Needs studies/requirements.txt. frontier.py writes the rivals.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from lft import InputError
from run import run_script

try:
    from matplotlib import pyplot
except ImportError as error:
    raise SystemExit("error: matplotlib is missing: pip install -r studies/requirements.txt") from error

SHOWN = ("times", "alpha", "logit_weight", "token_power", "lr", "init")  # options that name a method if they differ


def load_table(file):
    """A table with the run's options and curve: (training tokens, validation KL) of each checkpoint."""
    found = json.loads(file.read_text())
    options = found["training"]
    tokens_per_step = options["batch_size"] * options["seq_len"]
    curve = []
    for line in (file.parent / "log.jsonl").read_text().splitlines():
        line = json.loads(line)
        if "validation_kl" in line and line["step"] <= options["steps"]:
            curve.append((line["step"] * tokens_per_step, line["validation_kl"]))
    if curve[-1][0] != options["steps"] * tokens_per_step:
        raise InputError(f"{file} is not of the run that log.jsonl beside it belongs to: run eval_kl.py again")
    trained = f"LFT {options['solver']} x{options['k']}"
    return SimpleNamespace(
        file=file,
        options=options,
        same=(options["teacher_sha256"], options["seq_len"], found["tokens"]),
        panel=(options["start"], options["end"], " ".join(found["data"])),
        rows={row["name"]: row for row in found["rows"]},
        trained=trained,
        curve=curve,
    )


def name_method(table, tables):
    """Its loss, training tokens, and those options in which other tables differ."""
    names = {"fm": "flow matching", "fw": "Flow Walking"}
    name = names.get(table.options["method"], table.options["method"])
    if table.trained == "LFT euler x1" and table.options["method"] == "fw":
        name = "regression"
    name += f", {table.curve[-1][0] / 1e6:.2g}M tokens"
    for option in SHOWN:
        values = {
            str(other.options.get(option)) for other in tables if other.options["method"] == table.options["method"]
        }
        if len(values) > 1 and name[:4] != "regr":
            name += f", {option} {table.options.get(option)}"
    return name


def group(tables):
    """{(start, end, text): {method: its seeds}}. Raises InputError if the tables cannot be compared."""
    groups = defaultdict(lambda: defaultdict(list))
    for table in sorted(tables, key=lambda table: table.panel):
        if table.same != tables[0].same:
            raise InputError(f"{tables[0].file} and {table.file} differ in teacher, window length or test tokens")
        seeds = groups[table.panel][name_method(table, tables)]
        if table.options["seed"] in [other.options["seed"] for other in seeds]:
            raise InputError(f"{seeds[0].file} and {table.file} have the same options and seed: leave one out")
        seeds.append(table)
    return groups


def flow_rows(method, tables):
    """(label, name of the row) for each solver; for regression the one step that it was trained for."""
    names = [name for name in tables[0].rows if name.startswith("LFT")]
    if method.startswith("regression"):
        names = [tables[0].trained]
    return [(f"{method}; {name.removeprefix('LFT ').replace(' x', ' ×')}", name) for name in names]


def mean(tables, name, key):
    return statistics.mean(table.rows[name][key] for table in tables)


def print_table(groups):
    print("| text | layers replaced | by | evaluations | KL ± standard error over documents | KL of each seed | time |")
    print("|---|---|---|---|---|---|---|")
    for (_, _, text), methods in groups.items():
        baselines = {}
        for method, tables in methods.items():
            for label, name in flow_rows(method, tables):
                print_row(text, label, name, tables)
            for name in tables[0].rows:
                if not name.startswith(("LFT", "teacher")):
                    baselines[name] = tables[:1]  # the same for all runs
        for name, tables in baselines.items():
            print_row(text, name, name, tables)


def print_row(text, label, name, tables):
    row = tables[0].rows[name]
    seeds = ", ".join(f"{table.rows[name]['kl']:.4f}" for table in tables)
    kl = f"{mean(tables, name, 'kl'):.4f} ± {row['kl_stderr']:.4f}"
    cells = [text, row["layers_replaced"], label, row.get("evaluations", "-"), kl, seeds]
    print("|", " | ".join(map(str, cells)), f"| {mean(tables, name, 'time'):.2f} |")


def draw_time(axes, methods, rivals):
    """A line for each kind of rival and each method, a marker for each number of layers and each solver."""
    for kind in ("skip", "patch", "two patches"):
        points = sorted((line["time"], line["kl"]) for line in rivals if line["kind"] == kind)
        if points:
            axes.plot(*zip(*points), "s--", color="gray", ms=4, lw=1, label=kind)
    for method, tables in methods.items():
        points = [(mean(tables, name, "time"), mean(tables, name, "kl")) for _, name in flow_rows(method, tables)]
        axes.plot(*zip(*sorted(points)), "o-", ms=5, lw=1, label=method)
    axes.set(xlabel="time of a forward pass, relative to the teacher", ylabel="KL, nats per token: lower is better")


def draw_tokens(axes, methods, rivals):
    for number, (method, tables) in enumerate(methods.items()):
        for table in tables:
            label = f"{method}, seed {table.options['seed']}"
            axes.plot(*zip(*table.curve), "o-", color=f"C{number}", ms=3, lw=1, label=label)
    axes.set(xlabel="training tokens", ylabel="KL on validation text, nats per token")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "tables", nargs="+", type=Path, help="files that eval_kl.py --json wrote into the runs' folders"
    )
    parser.add_argument("--rivals", type=Path, help="file that frontier.py wrote")
    parser.add_argument("--pictures", type=Path, default="runs/pictures", help="folder for time.png and tokens.png")
    args = parser.parse_args()
    groups = group([load_table(file) for file in args.tables])
    rivals = []
    if args.rivals:
        rivals = json.loads(args.rivals.read_text())
        same = next(iter(next(iter(groups.values())).values()))[0].same
        for line in rivals:
            if (line["teacher_sha256"], line["seq_len"], line["tokens"]) != same:
                raise InputError(f"{args.rivals} differs from the tables in teacher, window length or test tokens")
    print_table(groups)
    args.pictures.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_time, "time.png"), (draw_tokens, "tokens.png")):
        figure, grid = pyplot.subplots(
            len(groups), 1, figsize=(7, 4.5 * len(groups)), layout="constrained", squeeze=False
        )
        for axes, (panel, methods) in zip(grid.flat, groups.items()):
            draw(axes, methods, [line for line in rivals if (line["start"], line["end"], line["text"]) == panel])
            axes.set_yscale("log")
            axes.set_title(f"{panel[2]}: layers {panel[0]}..{panel[1] - 1}")
            axes.legend(fontsize=7)
        figure.savefig(args.pictures / name, dpi=80)


if __name__ == "__main__":
    run_script(main)
