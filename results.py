"""Put the tables of several runs together: means over seeds, and the pictures of the README.

    for run in runs/*-seed*; do python eval_kl.py $run --flow-steps 1 2 3 4 6 8 12 --json $run/table.json; done
    python results.py runs/*-seed*

Prints a Markdown table, mean ± standard deviation over the seeds, and draws KL against velocity evaluations and against
training tokens into the folder pictures/. Needs matplotlib.
"""
import argparse
import json
import statistics
from pathlib import Path

from lft import InputError, first_line, layer_range, read_info, run_script

try:
    from matplotlib import pyplot
except ImportError as error:
    raise SystemExit("error: results.py needs one package more: pip install matplotlib") from error

SHOWN = ("LFT euler x1", "LFT midpoint x1", "LFT midpoint x2", "LFT midpoint x3")
BASELINES = ("span dropped", "linear map", *(f"skip {n}, {where}" for n in (1, 2, 3, 4) for where in ("best inside span", "mean inside span", "best anywhere")))


def read_run(folder):
    """A run's flow.json, the rows of its table.json by name, and the (tokens, KL) that its log.jsonl holds."""
    info = read_info(folder)
    try:
        table = {row["name"]: row for row in json.loads((Path(folder) / "table.json").read_text())["rows"]}
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"run {folder} lacks a whole log.jsonl or table.json: python eval_kl.py {folder} --json {folder}/table.json ({first_line(error)})") from error
    return info, table, [(line["tokens"], line["held_out_kl"]) for line in log if "held_out_kl" in line]


def method_of(info):
    """How a run was trained, in words."""
    if info["method"] == "fm":
        return "flow matching"
    if info["solver"] == "euler" and info["steps"] == 1:
        return "regression"  # one step from t = 0 to 1 is a plain layer trained on x1
    return f"Flow Walking, {info['solver']} ×{info['steps']}"


def spread(values):
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def flow_points(tables):
    """(evaluations, mean KL) of both solvers, from the tables of a group's seeds."""
    points = {}
    for name, row in tables[0].items():
        if name.startswith("LFT"):
            kl = statistics.mean(table[name]["kl"] for table in tables)
            points.setdefault(name.split()[1], []).append((row["evaluations"], kl))
    return points


def new_axes(xlabel):
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.set(xlabel=xlabel, ylabel="KL from the teacher, nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a table.json of eval_kl.py")
    parser.add_argument("--pictures", default="pictures", help="folder for the pictures (default %(default)s)")
    args = parser.parse_args()
    groups = {}  # (start, end): {method: [(info, table, curve) of each seed]}
    for folder in args.runs:
        info, table, curve = read_run(folder)
        groups.setdefault((info["start"], info["end"]), {}).setdefault(method_of(info), []).append((info, table, curve))
    Path(args.pictures).mkdir(parents=True, exist_ok=True)

    print("| layers replaced | by | velocity evaluations | KL | seeds |\n|---|---|---|---|---|")
    for (start, end), methods in sorted(groups.items()):
        for method, seeds in methods.items():
            for name in SHOWN[:1] if method == "regression" else SHOWN:
                if name in seeds[0][1]:
                    kl = spread([table[name]["kl"] for _, table, _ in seeds])
                    solver = name.removeprefix("LFT ").replace(" x", " ×")
                    print(f"| {layer_range(start, end)} | {method}; {solver} | {seeds[0][1][name]['evaluations']} | {kl} | {len(seeds)} |")
        table = next(iter(methods.values()))[0][1]
        for name in BASELINES:
            if name in table:
                print(f"| {table[name]['layers_replaced']} | {name} | – | {table[name]['kl']:.3f} | – |")

        evaluations, by_evaluations = new_axes("velocity evaluations at inference")
        tokens, by_tokens = new_axes("training tokens, millions")
        for color, (method, seeds) in enumerate(methods.items()):
            for solver, points in flow_points([table for _, table, _ in seeds]).items():
                points = points[:1] if method == "regression" else points
                by_evaluations.plot(*zip(*points), "o-" if solver == "midpoint" else "s--", color=f"C{color}", ms=4, label=f"{method}; {solver}")
                if method == "regression":
                    break
            for number, (_, _, curve) in enumerate(seeds):
                by_tokens.plot([n / 1e6 for n, _ in curve], [kl for _, kl in curve], "o-", color=f"C{color}", ms=3, lw=1, label=None if number else method)
        for axes in (by_evaluations, by_tokens):
            for name, style in (("linear map", ":"), ("skip 2, best inside span", "-."), ("skip 3, best inside span", "--"), ("span dropped", "-")):
                axes.axhline(table[name]["kl"], color="gray", ls=style, lw=1, label=name)
            axes.set_title(f"layers {layer_range(start, end)} replaced by one")
            axes.legend(fontsize=7)
        evaluations.savefig(Path(args.pictures) / f"evaluations-{start}-{end}.png", dpi=90)
        tokens.savefig(Path(args.pictures) / f"tokens-{start}-{end}.png", dpi=90)


if __name__ == "__main__":
    run_script(main)
