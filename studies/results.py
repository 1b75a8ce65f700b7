"""What do several runs show together? A Markdown table of means over seeds, KL against forward time, and training curves.

    python eval_kl.py runs/fw-6-18-seed0 --json runs/fw-6-18-seed0/table.json      # for each run, or for each run and text
    python studies/results.py runs/*/table.json --rivals runs/rivals.json

Runs whose options differ in the seed only are seeds of one method. Needs studies/requirements.txt; frontier.py writes the rivals.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval_kl import fingerprint, load_student
from lft import InputError, run_script

try:
    from matplotlib import pyplot
    from scipy import optimize  # noqa: F401, for spans.py
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install -r studies/requirements.txt") from error

SHOWN = "LFT euler x1", "LFT euler x3", "LFT midpoint x1", "LFT midpoint x3"  # and the row as trained
# Options that change a result by rounding at most, or are compared in another way.
IGNORED = {"seed", "out", "resume", "device", "compile", "save_every", "accumulate", "teacher", "max_steps", "start", "end"}
COLUMNS = {"± std. error over documents": ("kl_stderr", ".4f"), "NMSE": ("nmse", ".4f"), "perplexity": ("perplexity", ".2f"),
           "top-1": ("top1_agreement", ".1%"), "time": ("prefill_time", ".2f")}  # fmt: skip


def read_curve(folder, options):
    """(training tokens, validation KL) of each checkpoint in a run's log. Raises InputError if the last is not of the model."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    curve = [(line["tokens"], line["held_out_kl"]) for line in lines if "held_out_kl" in line]
    if not curve or curve[-1][0] != options["tokens"]:
        raise InputError(f"{folder}/log.jsonl does not end with the score of the saved model: finish the run with --resume")
    return curve


def load_table(file):
    """A table that eval_kl.py wrote into a run's folder. Raises InputError if it is missing, corrupt, or of another flow."""
    student = load_student(file.parent)
    config = student.config
    try:
        made = json.loads(file.read_text())
        rows = {row["name"]: row for row in made["rows"]}
        rows[trained := f"LFT {config.solver} x{config.k}"]["kl"]
        if made["flow"] != fingerprint(student.flow):
            raise ValueError("it is of another flow than the run holds now")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot use {file} ({error}): python eval_kl.py {file.parent} --json {file}") from error
    options = {name: value for name, value in config.training.items() if name not in IGNORED}
    walking = "regression" if trained == "LFT euler x1" else f"Flow Walking, {config.solver} ×{config.k}"  # or one plain layer
    method = {"fm": "flow matching", "fw": walking}.get(options["method"], options["method"])
    return SimpleNamespace(
        file=file, panel=(config.start, config.end, " ".join(made["data"])), made=made, seed=config.training["seed"], rows=rows,
        options=options, trained=trained, method=f"{method}, {options['tokens'] / 1e6:.4g}M",
        curve=read_curve(file.parent, options),
    )  # fmt: skip


def group(tables):
    """Tables by panel and method: {(start, end, text): {method: tables}}. Raises InputError if they cannot be compared."""
    words, groups = [table.method for table in tables], {}
    for table, method in zip(tables, words):
        for name in ("fingerprint", "tokens", "seq_len"):
            if table.made[name] != tables[0].made[name]:
                raise InputError(f"{tables[0].file} and {table.file} differ in {name}: score them on one text")
        same = [other.options for other, word in zip(tables, words) if word == method]  # told apart by the options that differ
        names = [name for name in table.options if any(other.get(name) != table.options[name] for other in same)]
        table.method = ", ".join([method, *(f"{name} {table.options[name]}" for name in names)])
    for table in sorted(tables, key=lambda table: table.panel):
        seeds = groups.setdefault(table.panel, {}).setdefault(table.method, [])
        if twin := next((other for other in seeds if other.seed == table.seed), None):
            raise InputError(f"{twin.file} and {table.file} have the same options and seed: leave one out")
        seeds.append(table)
    return groups


def mean(tables, name, key="kl"):
    """The mean over tables of one figure in the row of this name; None where a table has none."""
    values = [table.rows[name][key] for table in tables]
    return None if None in values else statistics.mean(values)


def baselines(methods):  # of any run for this span that has them
    rows = {name: row for tables in methods.values() for table in tables for name, row in table.rows.items()}
    return {name: row for name, row in rows.items() if not name.startswith(("LFT", "teacher"))}


def flow_rows(tables):  # of regression only the one step that it is made for
    return [tables[0].trained] if tables[0].method.startswith("regression") else [*dict.fromkeys([*SHOWN, tables[0].trained])]


def print_table(groups):
    print(f"| text | layers replaced | by | evaluations | KL ± std. dev. over seeds | seeds | {' | '.join(COLUMNS)} |")
    print("|---" * (6 + len(COLUMNS)) + "|")
    for (start, end, text), methods in groups.items():
        rows = [(f"{start}..{end - 1}", f"{method}; {name.removeprefix('LFT ').replace(' x', ' ×')}", tables, name)
                for method, tables in methods.items() for name in flow_rows(tables)]  # fmt: skip
        for name, row in baselines(methods).items():
            rows.append((row["layers_replaced"], name, [SimpleNamespace(rows={name: row})], name))
        for layers, by, tables, name in rows:
            kls = [table.rows[name]["kl"] for table in tables]
            kl = f"{statistics.mean(kls):.4f}" + (f" ± {statistics.stdev(kls):.4f}" if len(kls) > 1 else "")
            seeds = len(kls) if name.startswith("LFT") else "-"
            cells = [text, layers, by, tables[0].rows[name]["evaluations"] or "-", kl, seeds]
            figures = [(mean(tables, name, key), form) for key, form in COLUMNS.values()]
            cells += ["-" if figure is None else format(figure, form) for figure, form in figures]
            print("|", " | ".join(map(str, cells)), "|")


def draw_time(axes, methods, rivals):
    """A line for each kind of rival and each method, a marker for each number of layers and each solver."""
    for kind, marker in ("skip", "s"), ("patch", "D"), ("two patches", "P"):
        points = sorted((line["time"], line["kl"]) for line in rivals if line["kind"] == kind)
        if points:
            axes.plot(*zip(*points), f"{marker}--", color="gray", ms=5, lw=1, label=kind)
    for method, tables in methods.items():
        points = sorted((mean(tables, name, "prefill_time"), mean(tables, name)) for name in flow_rows(tables))
        axes.plot(*zip(*points), "o-", ms=5, lw=1, label=method)
    axes.set(xlabel="time of a forward pass, relative to the teacher", ylabel="KL, nats per token: lower is better", yscale="log")


def draw_tokens(axes, methods, rivals):
    for number, (method, tables) in enumerate(methods.items()):
        for table in tables:
            axes.plot(*zip(*table.curve), "o-", color=f"C{number}", ms=3, lw=1, label=method if table is tables[0] else None)
    axes.set(xlabel="training tokens", ylabel="KL on validation text, nats per token", yscale="log")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", help="files that eval_kl.py --json wrote into the folders of runs")
    parser.add_argument("--rivals", help="file that frontier.py wrote")
    parser.add_argument("--pictures", default="runs/pictures", help="folder for time.png and tokens.png (default: %(default)s)")
    args = parser.parse_args()
    groups = group([load_table(file) for file in dict.fromkeys(Path(file).resolve() for file in args.tables)])
    sys.stdout.reconfigure(encoding="utf-8")
    print_table(groups)
    lines = json.loads(Path(args.rivals).read_text()) if args.rivals else []
    Path(args.pictures).mkdir(parents=True, exist_ok=True)
    shape = len({panel[:2] for panel in groups}), len({panel[2] for panel in groups})  # rows of spans, columns of texts
    for draw_panel, name in (draw_time, "time.png"), (draw_tokens, "tokens.png"):
        figure, grid = pyplot.subplots(*shape, figsize=(6 * shape[1], 4.5 * shape[0]), layout="constrained", squeeze=False)
        for axes, (panel, methods) in zip(grid.flat, groups.items()):
            draw_panel(axes, methods, [line for line in lines if (line["start"], line["end"], line["text"]) == panel])
            axes.set_title(f"{panel[2]}: layers {panel[0]}..{panel[1] - 1}")
            axes.legend(fontsize=7)
        figure.savefig(f"{args.pictures}/{name}", dpi=80)


if __name__ == "__main__":
    run_script(main)
