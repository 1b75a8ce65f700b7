"""Put the tables of several runs together: a Markdown table of means over seeds, and the pictures of the README.

    python eval_kl.py runs/fw-6-18-seed0 --flow-steps 1 2 3 6 12 --json runs/fw-6-18-seed0/table.json    # for each run
    python results.py runs/fw-6-18-seed* runs/fm-6-12-seed*

Draws KL against layers replaced, velocity evaluations and training tokens into the folder pictures/. Needs matplotlib.
"""
import argparse
import json
import statistics
from pathlib import Path

from eval_kl import SKIPS
from lft import InputError, first_line, layer_range, read_curve, read_info, run_script

try:
    from matplotlib import pyplot, ticker
except ImportError as error:
    raise SystemExit("error: results.py needs one package more: pip install matplotlib") from error

SHOWN = ("LFT euler x1", "LFT euler x3", "LFT midpoint x1", "LFT midpoint x2", "LFT midpoint x3")
BASELINES = (
    "span dropped", "linear map",
    *(f"skip {n}, {where}" for n in SKIPS for where in ("best inside span", "mean inside span", "best anywhere")),
)  # fmt: skip
DRAWN = {"span dropped": "-", "linear map": ":", "skip 3, best inside span": "--", "skip 2, best inside span": "-."}


def as_trained(info):
    """The row of the table in which a run's flow is integrated as it was in training."""
    return f"LFT {info['solver']} x{info['steps']}"


def read_run(folder):
    """A run's flow.json, the rows of its table.json by name, and the (tokens, KL) of its training."""
    info = read_info(folder)
    try:
        table = {row["name"]: row for row in json.loads((Path(folder) / "table.json").read_text())["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"run {folder} lacks a whole table.json ({first_line(error)}): python eval_kl.py {folder} --json {folder}/table.json"
        ) from error
    if as_trained(info) not in table:
        raise InputError(f"the table.json of run {folder} lacks {as_trained(info)}, as it was trained: make it with --flow-steps {info['steps']} too")
    return info, table, read_curve(folder)


def loss_of(info):
    """The loss of a run, in words."""
    if info["method"] == "fm":
        power = info.get("time_power", 1)
        return "flow matching" + (f", t = τ^{power:g}" if power != 1 else "")
    if (info["solver"], info["steps"]) == ("euler", 1):
        name = "regression"  # one step from t = 0 to 1: a plain layer, trained on x1
    else:
        name = f"Flow Walking, {info['solver']} ×{info['steps']}"
    for term, weight in (("flow matching", info.get("alpha")), ("logits' KL", info.get("logit_weight"))):
        if weight:
            name += f" + {term}" if weight == 1 else f" + {weight:g} {term}"
    return name


def method_of(info):
    """How a run was trained, and on how much, in words."""
    return f"{loss_of(info)}, {info['trained_tokens'] / 1e6:.4g} M tokens"


def shared_rows(methods):
    """The rows by name of all runs for a span, whose tables share the baselines: those of at least one."""
    return {name: row for seeds in methods.values() for _, table, _ in seeds for name, row in table.items()}


def mean_kl(tables, name):
    """The KL of a row, mean over the tables of several seeds ± their standard deviation, as text; the mean alone as a number."""
    values = [table[name]["kl"] for table in tables]
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""), mean


def print_results(groups):
    """groups: {(start, end): {method: [(info, table, curve) of each seed]}}."""
    print("| layers replaced | by | velocity evaluations | KL | seeds |\n|---|---|---|---|---|")
    for (start, end), methods in groups.items():
        for method, seeds in methods.items():
            tables = [table for _, table, _ in seeds]
            for name in SHOWN[:1] if "regression" in method else SHOWN:
                if all(name in table for table in tables):
                    solver = name.removeprefix("LFT ").replace(" x", " ×")
                    text, _ = mean_kl(tables, name)
                    print(f"| {layer_range(start, end)} | {method}; {solver} | {tables[0][name]['evaluations']} | {text} | {len(seeds)} |")
        table = shared_rows(methods)
        for name in BASELINES:
            if name in table:
                print(f"| {table[name]['layers_replaced']} | {name} | – | {table[name]['kl']:.4f} | – |")


def save_picture(figure, path):
    """Write a figure as a PNG; raises InputError if it cannot be written."""
    try:
        figure.savefig(path, dpi=80)
    except OSError as error:
        raise InputError(f"{path} could not be written ({first_line(error)}): give another --pictures") from error


def plain_logarithmic(axes, *names):
    """Make these axes logarithmic, and number them 0.1, 0.2, 0.5 rather than by powers of ten."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def draw_ladder(groups, colors, path):
    """KL against layers replaced: what skipping costs, and what each way to put one layer in their place leaves."""
    figure, axes = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
    widest = max(groups, key=lambda span: span[1] - span[0])  # the span whose skips are drawn
    table = shared_rows(groups[widest])
    for where, style in (("best inside span", "v--"), ("mean inside span", "v:"), ("best anywhere", "v-.")):
        ladder = [(n, table[f"skip {n}, {where}"]["kl"]) for n in SKIPS if f"skip {n}, {where}" in table]
        axes.plot([n for n, _ in ladder], [kl for _, kl in ladder], style, color="gray", ms=4, lw=1, label=f"skipped, {where.replace('span', layer_range(*widest))}")
    marked = {}  # (name, color, marker): points
    for (start, end), methods in groups.items():
        table = shared_rows(methods)
        for name, marker in (("span dropped", "x"), ("linear map", "+")):
            if name in table:
                marked.setdefault((name, "gray", marker), []).append((end - start, table[name]["kl"]))
        for method, seeds in methods.items():
            point = (end - start, mean_kl([table for _, table, _ in seeds], as_trained(seeds[0][0]))[1])
            marked.setdefault((method, colors[method], "o"), []).append(point)
    for (name, color, marker), points in marked.items():
        axes.plot(*zip(*points), marker, color=color, ms=7, fillstyle="none", mew=1.5, label=name)
    axes.set(xlabel="layers replaced by one, or skipped", ylabel="KL from the teacher, nats per token")
    plain_logarithmic(axes, "y")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize=8)
    save_picture(figure, path)


def draw_panels(groups, colors, path, xlabel, draw_method, log_x=False):
    """A panel for each span: what draw_method(axes, method, seeds, color) draws of each method, over the baselines."""
    figure, panels = pyplot.subplots(1, len(groups), figsize=(5 * len(groups), 4.6), layout="constrained", squeeze=False)
    labelled = {}  # a line for each label, for one legend
    for axes, ((start, end), methods) in zip(panels[0], groups.items()):
        table = shared_rows(methods)
        for name, style in DRAWN.items():
            if name in table:
                axes.axhline(table[name]["kl"], color="gray", ls=style, lw=1, label=name)
        for method, seeds in methods.items():
            draw_method(axes, method, seeds, colors[method])
        axes.set(title=f"layers {layer_range(start, end)} replaced by one", xlabel=xlabel, ylabel="KL from the teacher, nats per token")
        plain_logarithmic(axes, *("xy" if log_x else "y"))
        labelled |= {label: line for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, path)


def draw_evaluations(axes, method, seeds, color):
    """KL against velocity evaluations, mean over seeds, a line for each solver; of regression only the one step it is made for."""
    tables = [table for _, table, _ in seeds]
    for solver, style in (("euler", "s--"), ("midpoint", "o-")):
        names = [name for name in tables[0] if name.startswith(f"LFT {solver}") and all(name in table for table in tables)]
        if "regression" in method:
            names = [name for name in names if name == "LFT euler x1"]
        points = [(tables[0][name]["evaluations"], mean_kl(tables, name)[1]) for name in names]
        if points:
            axes.plot(*zip(*points), style, color=color, ms=4, lw=1, label=f"{method}; {solver}")


def draw_tokens(axes, method, seeds, color):
    """KL against training tokens, a line for each seed, integrated as in training."""
    for number, (_, _, curve) in enumerate(seeds):
        axes.plot([tokens / 1e6 for tokens, _ in curve], [kl for _, kl in curve], "o-", color=color, ms=3, lw=1, label=None if number else method)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a table.json of eval_kl.py")
    parser.add_argument("--pictures", default="pictures", help="folder for the pictures (default %(default)s)")
    args = parser.parse_args()
    groups = {}
    for folder in args.runs:
        info, table, curve = read_run(folder)
        seeds = groups.setdefault((info["start"], info["end"]), {}).setdefault(method_of(info), [])
        seeds.append((info, table, curve))
    groups = dict(sorted(groups.items()))
    folder = Path(args.pictures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures {folder} cannot be made a folder ({error.strerror}): give another") from error
    print_results(groups)
    colors = {method: f"C{number}" for number, method in enumerate(sorted({method for methods in groups.values() for method in methods}))}
    draw_ladder(groups, colors, folder / "ladder.png")
    draw_panels(groups, colors, folder / "evaluations.png", "velocity evaluations at inference", draw_evaluations, log_x=True)
    draw_panels(groups, colors, folder / "tokens.png", "training tokens, millions", draw_tokens)


if __name__ == "__main__":
    run_script(main)
