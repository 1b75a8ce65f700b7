"""Put the tables of several runs together: a Markdown table of means over seeds, and the pictures.

    python eval_kl.py runs/fw-6-18-seed0 --json runs/fw-6-18-seed0/table.json    # for each run
    python studies/results.py runs/fw-6-18-seed* runs/fm-6-12-seed*

Runs are seeds of one method where all that trained them is the same but the seed. Draws a bar for each method, and KL against velocity
evaluations, time and training tokens. Needs studies/requirements.txt.
"""
import argparse
import functools
import json
import re
import statistics
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from eval_kl import PAPER, SKIPS
from lft import InputError, LFTConfig, LFTForCausalLM, fingerprint, first_line, read_run, run_script
from studies.spans import read_curve

try:
    from matplotlib import pyplot, ticker
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install -r studies/requirements.txt") from error

SHOWN = ("LFT euler x1", "LFT euler x3", "LFT midpoint x1", "LFT midpoint x2", "LFT midpoint x3")
BASELINES = (
    "span dropped", "linear map",
    *(f"skip {n}, {where}" for n in SKIPS for where in ("best inside span", "mean inside span", "first of span", "best anywhere")),
)  # fmt: skip
SKIPPED = {6: 2, 12: 3}  # the paper's pairs: so many layers skipped are beside so many replaced
# What changes no result, or only how it is rounded; the teacher's name, since its fingerprint is compared.
NO_MATTER = {"seed", "out", "resume", "overwrite", "device", "compile", "save_every", "accumulate", "teacher"}

# made: what table.json holds. rows: its rows by name. curve: (tokens, KL) of each score in training. method: in words.
Run = namedtuple("Run", "folder config made rows curve method")


def as_trained(config):
    """The row of the table in which a run's flow is integrated as it was in training."""
    return f"LFT {config.solver} x{config.k}"


def flow_in(config, weights):
    """The fingerprint of the flow that a run holds, by eval_kl.py's reckoning; the teacher is built without memory, and not loaded."""
    with torch.device("meta"):
        student = LFTForCausalLM(LFTConfig(**config.to_dict()))
    student.flow.velocity.load_state_dict(weights, assign=True)
    return fingerprint(student.flow)


def load_run(folder):
    """A Run, its method not yet in words; raises InputError where its table.json is missing, damaged, or of an earlier flow."""
    config, weights = read_run(folder)
    command = f"python eval_kl.py {folder} --json {folder}/table.json"
    try:
        made = json.loads((folder / "table.json").read_text())
        rows = {row["name"]: row for row in made["rows"]}
        rows[as_trained(config)]["kl"], made["fingerprint"], made["data"], made["tokens"]  # a KeyError, if one is not there
        flow = made["flow"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"run {folder} lacks a whole table.json ({first_line(error)}): {command}") from error
    if flow != flow_in(config, weights):
        raise InputError(f"the table.json of run {folder} is of another flow than the run holds now: {command}")
    return Run(folder, config, made, rows, read_curve(folder, config), None)


def check_alike(runs):
    """Raise InputError unless the tables of all runs are over one teacher and one text, cut into rows of one length."""
    for what, values in {
        "teachers": [run.made["fingerprint"] for run in runs],
        "texts": [(run.made["data"], run.made["tokens"], run.config.training["seq_len"]) for run in runs],
    }.items():
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            said = "" if what == "teachers" else ", {} and {} (data, tokens, tokens in a row)".format(values[0], values[other])
            raise InputError(f"the tables of {runs[0].folder} and {runs[other].folder} are over different {what}{said}: give runs of one")


def options_of(run):
    """All that a run was trained by and that matters to its result: {name: value}."""
    return {name: value for name, value in run.config.training.items() if name not in NO_MATTER}


def is_regression(config):
    """Whether a run walked in one step from t = 0 to 1: a plain layer, trained on x1, and of no use in more steps."""
    return config.training["method"] == "fw" and (config.solver, config.k) == ("euler", 1)


def words_for(config):
    """How a run was trained, and on how much, in words; not all of its options."""
    training = config.training
    power = training.get("time_power", 1)
    if training["method"] == "fm":
        words = "flow matching" + (f", t = τ^{power:g}" if power != 1 else "")
    elif training["method"] == "fw":
        words = "regression" if is_regression(config) else f"Flow Walking, {config.solver} ×{config.k}"
    else:  # a fork's own
        words = training["method"]
    for term, weight in (("flow matching", training.get("alpha")), ("logits' KL", training.get("logit_weight"))):
        if weight:
            words += f" + {term}" if weight == 1 else f" + {weight:g} {term}"
    return f"{words}, {training['tokens'] / 1e6:.4g} M tokens"


def with_methods(runs):
    """The runs with their methods in words; where those of different options, span apart, would be the same, they name the options."""
    result = []
    for run in runs:
        words = words_for(run.config)
        alike = [options_of(other) for other in runs if words_for(other.config) == words]
        names = sorted({name for options in alike for name in options} - {"start", "end"})
        differing = [name for name in names if len({repr(options.get(name)) for options in alike}) > 1]
        named = [f"{name.replace('_', ' ')} {options_of(run).get(name)}" for name in differing]
        result.append(run._replace(method=", ".join([words, *named])))
    return result


def grouped(runs):
    """Runs by span and method: {(start, end): {method: runs}}; raises InputError where two of them are one seed."""
    groups = {}
    for run in sorted(runs, key=lambda run: (run.config.start, run.config.end)):
        seeds = groups.setdefault((run.config.start, run.config.end), {}).setdefault(run.method, [])
        same = [other for other in seeds if other.config.training["seed"] == run.config.training["seed"]]
        if same:
            raise InputError(f"{same[0].folder} and {run.folder} were trained by the same options and seed: leave one of them out")
        seeds.append(run)
    return groups


def shared_rows(methods):
    """The rows by name of all runs for a span, whose tables share the baselines: those of at least one."""
    return {name: row for runs in methods.values() for run in runs for name, row in run.rows.items()}


def mean_kl(runs, name):
    """The KL of a row, mean over the seeds ± their standard deviation, as text; the mean alone as a number."""
    values = [run.rows[name]["kl"] for run in runs]
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""), mean


def rows_shown(runs, names):
    """Of the rows of these names, those that the tables of all runs of a method have, and that the method is made for."""
    trained = as_trained(runs[0].config)
    names = [name for name in names if name == trained or not is_regression(runs[0].config)]
    return [name for name in names if all(name in run.rows for run in runs)]


COLUMNS = {
    "± by document": ("kl_stderr", ".4f"), "NMSE": ("nmse", ".4f"), "perplexity": ("perplexity", ".2f"), "top-1": ("top1_agreement", ".1%"),
    "forward pass": ("prefill_time", ".2f"), "decoding": ("decode_time", ".2f"),
}  # fmt: skip


def other_cells(rows):
    """The cells of COLUMNS, means over the rows of all seeds; – where one of them has no such figure."""
    cells = {key: [row.get(key) for row in rows] for key, _ in COLUMNS.values()}
    return " | ".join("–" if None in cells[key] else format(statistics.mean(cells[key]), form) for key, form in COLUMNS.values())


def print_results(groups):
    """Print the table of the groups that `grouped` returned; the times are over the teacher's."""
    print(f"| layers replaced | by | evaluations | KL | seeds | {' | '.join(COLUMNS)} |\n{'|---' * (5 + len(COLUMNS))}|")
    for (start, end), methods in groups.items():
        for method, runs in methods.items():
            for name in rows_shown(runs, dict.fromkeys((*SHOWN, as_trained(runs[0].config)))):
                solver, evaluations = name.removeprefix("LFT ").replace(" x", " ×"), runs[0].rows[name]["evaluations"]
                cells = other_cells([run.rows[name] for run in runs])
                print(f"| {start}..{end - 1} | {method}; {solver} | {evaluations} | {mean_kl(runs, name)[0]} | {len(runs)} | {cells} |")
        rows = shared_rows(methods)
        for name in BASELINES:
            if name in rows:
                print(f"| {rows[name]['layers_replaced']} | {name} | – | {rows[name]['kl']:.4f} | – | {other_cells([rows[name]])} |")


def save_picture(figure, path):
    """Write a figure as a PNG; raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)
    except OSError as error:
        raise InputError(f"{path} could not be written ({first_line(error)}): give another --pictures") from error
    pyplot.close(figure)


def plain_logarithmic(axes, name):
    """Make the axis x or y logarithmic, and number it 0.1, 0.2, 0.5 rather than by powers of ten."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def in_short(methods):
    """Methods by a shorter name, without the number of tokens where that tells none of them apart: {method: name}."""
    short = {method: re.sub(r", [\d.e+]+ M tokens", "", method) for method in methods}
    return short if len(set(short.values())) == len(short) else {method: method for method in methods}


def bars_of(methods, skipped):
    """The bars of one span, (name, KL): each method as it was trained, and what else could stand there; lowest KL last."""
    rows, names = shared_rows(methods), in_short(methods)
    bars = [(names[method], mean_kl(runs, as_trained(runs[0].config))[1]) for method, runs in methods.items()]
    others = ("span dropped", "linear map", f"skip {skipped}, best inside span", f"skip {skipped}, mean inside span")
    bars += [(name, rows[name]["kl"]) for name in others if name in rows]
    return sorted(bars, key=lambda bar: -bar[1])


def draw_bars(groups, path):
    """For each span a bar for each method, and for skipping a third or a quarter of it, beside the paper's pair."""
    spans = {span: methods for span, methods in groups.items() if span[1] - span[0] in SKIPPED}
    if not spans:
        return
    figure, panels = pyplot.subplots(1, len(spans), figsize=(6 * len(spans), 3.4), layout="constrained", squeeze=False)
    for axes, ((start, end), methods) in zip(panels[0], spans.items()):
        skipped = SKIPPED[end - start]
        what, method, skip = PAPER[skipped]
        bars = [(f"paper, skip {skipped}", skip), (f"paper, {what.split(' by ')[1]}", method), *bars_of(methods, skipped)]
        widest = 2.2 * sorted(kl for _, kl in bars)[-2]  # one bar may be cut, and says its length
        for number, (name, kl) in enumerate(bars):
            ours = name in in_short(methods).values() and not name.startswith("regression")  # which is a rival
            color = "C1" if name.startswith("paper") else "C0" if ours else "lightgray"
            axes.barh(number, min(kl, widest), color=color)
            axes.text(min(kl, widest), number, f" {kl:.2f}" + (" →" if kl > widest else ""), va="center", fontsize=9)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.set(title=f"layers {start}..{end - 1} replaced by one", xlabel="KL, nats per token: shorter is better", xlim=(0, 1.15 * widest))
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def label_ends(axes):
    """Write each line's label beside its right end, one above the other where they would touch."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    to_panel = axes.transData + axes.transAxes.inverted()
    ends = [to_panel.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1] for line in lines]
    height = -1
    for end, line in sorted(zip(ends, lines), key=lambda pair: pair[0]):
        height = max(end, height + 0.06)  # of the panel
        axes.text(1.02, height, line.get_label(), color=line.get_color(), transform=axes.transAxes, va="center", fontsize=8)


def draw_panels(groups, path, xlabel, lines_of):
    """A panel for each span: the lines that lines_of(runs) gives of each method, [(name or None, points)], over the skips."""
    figure, panels = pyplot.subplots(1, len(groups), figsize=(6.5 * len(groups), 4), layout="constrained", squeeze=False)
    for axes, ((start, end), methods) in zip(panels[0], groups.items()):
        rows, names = shared_rows(methods), in_short(methods)
        number_skipped = SKIPPED.get(end - start, 2)
        for number, (method, runs) in enumerate(methods.items()):
            for labelled, points in lines_of(runs):
                axes.plot(*zip(*points), "o-", color=f"C{number}", ms=3, lw=1, label=names[method] if labelled else None)
        for where, style in (("best inside span", "--"), ("mean inside span", ":")):
            skips = {n: rows[f"skip {n}, {where}"] for n in SKIPS if f"skip {n}, {where}" in rows}
            if lines_of is by_time and skips:  # fewer layers skipped take more time
                points = sorted((row["prefill_time"], row["kl"]) for row in skips.values())
                axes.plot(*zip(*points), style, marker="o", ms=3, color="gray", lw=1, label=f"skip {min(skips)} to {max(skips)}, {where}")
            elif number_skipped in skips:
                axes.plot(axes.get_xlim(), [skips[number_skipped]["kl"]] * 2, style, color="gray", lw=1, label=f"skip {number_skipped}, {where}")
        axes.set(title=f"layers {start}..{end - 1} replaced by one", xlabel=xlabel, ylabel="KL from the teacher, nats per token")
        plain_logarithmic(axes, "y")
        label_ends(axes)
    save_picture(figure, path)


def lines_against(key, runs):
    """KL against a key of the rows, by the solver of the training, mean over seeds; of regression only the one step it is made for."""
    names = rows_shown(runs, [name for name in runs[0].rows if name.startswith(f"LFT {runs[0].config.solver}")])
    return [(True, sorted((statistics.mean(run.rows[name][key] for run in runs), mean_kl(runs, name)[1]) for name in names))]


by_evaluations = functools.partial(lines_against, "evaluations")
by_time = functools.partial(lines_against, "prefill_time")


def by_tokens(runs):
    """KL on validation text against millions of training tokens, a line for each seed; only of runs that trained on the table's text."""
    runs = [run for run in runs if run.config.training["data"] == run.made["data"]]
    return [(number == 0, [(tokens / 1e6, kl) for tokens, kl in run.curve]) for number, run in enumerate(runs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a table.json of eval_kl.py")
    parser.add_argument("--pictures", default="pictures", help="folder for the pictures (default %(default)s)")
    args = parser.parse_args()
    runs = [load_run(folder) for folder in dict.fromkeys(Path(folder).resolve() for folder in args.runs)]  # each once
    check_alike(runs)
    groups = grouped(with_methods(runs))
    pictures = Path(args.pictures)
    draw_bars(groups, pictures / "bars.png")
    draw_panels(groups, pictures / "evaluations.png", "velocity evaluations at inference", by_evaluations)
    draw_panels(groups, pictures / "time.png", "time of a forward pass over the teacher's", by_time)
    draw_panels(groups, pictures / "tokens.png", "training tokens, millions", by_tokens)
    print_results(groups)


if __name__ == "__main__":
    run_script(main)
