"""What do several runs show together? A Markdown table of means over seeds, and pictures.

    python eval_kl.py runs/fw-6-18-seed0 --json runs/fw-6-18-seed0/table.json    # for each run
    python studies/results.py runs/fw-6-18-seed* runs/fm-6-12-seed*

Runs whose options differ in the seed only are seeds of one method. Needs studies/requirements.txt.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval_kl import PAPER, fingerprint, load_student
from lft import InputError, run_script

try:
    from matplotlib import pyplot
    from scipy import optimize, stats  # noqa: F401, for spans.py
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install -r studies/requirements.txt") from error

SHOWN = "LFT euler x1", "LFT euler x3", "LFT midpoint x1", "LFT midpoint x3"  # and the row as trained
# Options that change a result by rounding at most, or are compared in another way.
IGNORED = {"seed", "out", "resume", "device", "compile", "save_every", "accumulate", "teacher", "max_steps", "start", "end"}
COLUMNS = {"± std. error over documents": ("kl_stderr", ".4f"), "NMSE": ("nmse", ".4f"), "perplexity": ("perplexity", ".2f"),
           "top-1": ("top1_agreement", ".1%"), "time": ("prefill_time", ".2f")}  # fmt: skip


def read_curve(folder, options):
    """(training tokens, validation KL) of each checkpoint in a run's log. Raises InputError if the last is not of the model."""
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    curve = [(line["tokens"], line["held_out_kl"]) for line in lines if "held_out_kl" in line]
    if not curve or curve[-1][0] != options["tokens"]:
        raise InputError(f"{folder}/log.jsonl does not end with the score of the saved model: finish the run with --resume")
    return curve


def load_run(folder):
    """A run with its table.json. Raises InputError if that is missing, corrupt, or of another flow than the run holds now."""
    student = load_student(folder)
    config, command = student.config, f"python eval_kl.py {folder} --json {folder}/table.json"
    try:
        made = json.loads((folder / "table.json").read_text())
        flow, rows = made["flow"], {row["name"]: row for row in made["rows"]}
        text = {name: made[name] for name in ("fingerprint", "data", "tokens", "seq_len")}
        trained = f"LFT {config.solver} x{config.k}"
        rows[trained]["kl"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/table.json is missing or corrupt ({error}): {command}") from error
    if flow != fingerprint(student.flow):
        raise InputError(f"{folder}/table.json is of another flow than the run holds now: {command}")
    options = {name: value for name, value in config.training.items() if name not in IGNORED}
    walking = "regression" if trained == "LFT euler x1" else f"Flow Walking, {config.solver} ×{config.k}"  # or one plain layer
    method = {"fm": "flow matching", "fw": walking}.get(options["method"], options["method"])
    return SimpleNamespace(
        folder=folder, span=(config.start, config.end), seed=config.training["seed"], options=options, text=text, rows=rows,
        trained=trained, method=f"{method}, {options['tokens'] / 1e6:.4g} M tokens", curve=read_curve(folder, options),
    )  # fmt: skip


def group(runs):
    """Runs by span and method: {(start, end): {method: runs}}. Raises InputError if runs or tables cannot be compared."""
    words, groups = [run.method for run in runs], {}
    for run, method in zip(runs, words):
        for name in runs[0].text:
            if run.text[name] != runs[0].text[name]:
                raise InputError(f"the tables of {runs[0].folder} and {run.folder} differ in {name}: score them on one text")
        alike = [other.options for other, word in zip(runs, words) if word == method]  # told apart by the options that differ
        names = [name for name in run.options if any(other.get(name) != run.options[name] for other in alike)]
        run.method = ", ".join([method, *(f"{name} {run.options[name]}" for name in names)])
    for run in sorted(runs, key=lambda run: run.span):
        seeds = groups.setdefault(run.span, {}).setdefault(run.method, [])
        if twin := next((other for other in seeds if other.seed == run.seed), None):
            raise InputError(f"{twin.folder} and {run.folder} have the same options and seed: leave one out")
        seeds.append(run)
    return groups


def mean(runs, name, key="kl"):
    """The mean over runs of one figure in the row of this name; None where a run has none."""
    values = [run.rows[name][key] for run in runs]
    return None if None in values else statistics.mean(values)


def baselines(methods):  # of any run for this span that has them
    rows = {name: row for runs in methods.values() for run in runs for name, row in run.rows.items()}
    return {name: row for name, row in rows.items() if not name.startswith(("LFT", "teacher"))}


def flow_rows(runs):  # of regression only the one step that it is made for
    return [runs[0].trained] if runs[0].method.startswith("regression") else [*dict.fromkeys([*SHOWN, runs[0].trained])]


def print_table(groups):
    print(f"| layers replaced | by | evaluations | KL ± std. dev. over seeds | seeds | {' | '.join(COLUMNS)} |")
    print("|---" * (5 + len(COLUMNS)) + "|")
    for (start, end), methods in groups.items():
        rows = [(f"{start}..{end - 1}", f"{method}; {name.removeprefix('LFT ').replace(' x', ' ×')}", runs, name)
                for method, runs in methods.items() for name in flow_rows(runs)]  # fmt: skip
        for name, row in baselines(methods).items():
            rows.append((row["layers_replaced"], name, [SimpleNamespace(rows={name: row})], name))
        for layers, by, runs, name in rows:
            kls = [run.rows[name]["kl"] for run in runs]
            kl = f"{statistics.mean(kls):.4f}" + (f" ± {statistics.stdev(kls):.4f}" if len(kls) > 1 else "")
            cells = [layers, by, runs[0].rows[name]["evaluations"] or "-", kl, len(runs) if name.startswith("LFT") else "-"]
            for key, form in COLUMNS.values():
                figure = mean(runs, name, key)
                cells.append("-" if figure is None else format(figure, form))
            print("|", " | ".join(map(str, cells)), "|")


def draw_bars(axes, span, methods):
    """A bar for each method as trained, for the baselines, and for the paper's pair on a span of this length."""
    bars = [(method, mean(runs, runs[0].trained), "C0") for method, runs in methods.items()]
    bars += [(name, row["kl"], "lightgray") for name, row in baselines(methods).items()]
    if span[1] - span[0] in PAPER:
        n, method, skip, flow = PAPER[span[1] - span[0]]
        bars += [(f"paper (Pythia-410M), skip {n}", skip, "C1"), (f"paper (Pythia-410M), {method}", flow, "C1")]
    bars.sort(key=lambda bar: -bar[1])
    widest = 1.5 * max(kl for name, kl, _ in bars if name != "span dropped")  # a longer bar is cut
    names, kls, colors = zip(*bars)
    axes.bar_label(axes.barh(names, [min(kl, widest) for kl in kls], color=colors), [f" {kl:.3f}" for kl in kls])
    axes.set(xlabel="KL, nats per token: shorter is better", xlim=(0, 1.2 * widest))


def draw_time(axes, span, methods):
    for method, runs in methods.items():
        points = sorted((mean(runs, name, "prefill_time"), mean(runs, name)) for name in flow_rows(runs))
        axes.plot(*zip(*points), "o-", ms=4, label=method)
    for (name, row), marker in zip(baselines(methods).items(), "sDv^<>pP*XhHdo"):
        axes.plot(row["prefill_time"], row["kl"], marker, color="gray", ms=5, label=name)
    axes.set(xlabel="time of a forward pass, over the teacher's", ylabel="KL, nats per token", yscale="log")


def draw_tokens(axes, span, methods):
    for number, (method, runs) in enumerate(methods.items()):
        for run in runs:
            axes.plot(*zip(*run.curve), "o-", color=f"C{number}", ms=3, lw=1, label=method if run is runs[0] else None)
    axes.set(xlabel="training tokens", ylabel="KL on validation text, nats per token", yscale="log")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a table.json written by eval_kl.py --json")
    parser.add_argument("--pictures", default="runs/pictures", help="folder for bars.png, time.png and tokens.png")
    args = parser.parse_args()
    groups = group([load_run(folder) for folder in dict.fromkeys(Path(run).resolve() for run in args.runs)])
    sys.stdout.reconfigure(encoding="utf-8")
    print_table(groups)
    Path(args.pictures).mkdir(parents=True, exist_ok=True)
    for draw_panel, name in (draw_bars, "bars.png"), (draw_time, "time.png"), (draw_tokens, "tokens.png"):
        figure, panels = pyplot.subplots(1, len(groups), figsize=(7 * len(groups), 5), layout="constrained", squeeze=False)
        for axes, (span, methods) in zip(panels[0], groups.items()):
            draw_panel(axes, span, methods)
            axes.set_title(f"layers {span[0]}..{span[1] - 1} replaced by one")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7)
        figure.savefig(f"{args.pictures}/{name}", dpi=80)


if __name__ == "__main__":
    run_script(main)
