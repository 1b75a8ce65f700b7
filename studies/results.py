"""What do all runs show together? Markdown tables, KL against forward time, KL against training tokens.

    python studies/results.py                   # of the runs behind the READMEs' figures
    python studies/results.py runs/sweep        # of your own: those scored with --json runs/sweep/NAME/table.json

Reads each table*.json in the folder and below, and the log.jsonl beside it. Runs whose options differ in the seed only
are seeds of one method: a cell has the KL of each seed, and ± the standard error over documents. Two pictures for each
teacher are written into the folder. TEACHER-time.png shows the best points of each method, whatever its options: no
other point of the method beats them in both time and KL. Needs studies/requirements.txt.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas
from matplotlib import pyplot, ticker

sys.path.insert(0, str(Path(__file__).parent.parent))

from lft import InputError
from run import run_script

RESULTS = Path(__file__).parent / "results"
NAMES = {"fm": "flow matching", "fw": "Flow Walking"}
# Options that a method's name tells if they vary among its runs:
SHOWN = [
    "k",
    "solver",
    "times",
    "max_steps",
    "batch_size",
    "data",
    "alpha",
    "logit_weight",
    "token_power",
    "channel_power",
    "lr",
    "init",
]
LINE = ["span", "layers_replaced", "by", "name"]  # what a line of the printed table is about


# ---- 1. Tables
def read_rows(folder):
    """The rows of all tables, each with the options of its run. Raises InputError if there is none."""
    rows = []
    for file in sorted(folder.rglob("table*.json")):
        table = json.loads(file.read_text())
        options = table["training"]
        span = f"layers {options['start']}..{options['end'] - 1}"
        for row in table["rows"]:
            row.update(options, span=span, text=" ".join(table["data"]), tokens=table["tokens"], folder=file.parent)
            rows.append(row)
    if not rows:
        raise InputError(f"{folder} holds no table*.json: write one by eval_kl.py --json")
    rows = pandas.DataFrame(rows).convert_dtypes().sort_values("span", kind="stable")
    return rows[rows.name != "teacher"]


def name_methods(rows):
    """Add the column "by": the loss, and those options that vary among the runs of this loss on this span."""
    names = rows.method.replace(NAMES)
    names[(rows.method == "fw") & (rows.solver == "euler") & (rows.k == 1)] = "regression"
    for _, same in rows.groupby(["span", names]):
        for option in SHOWN:
            if option in rows:
                values = same[option].map(str)
                if values.nunique() > 1:
                    names[same.index] += f", {option.replace('_', '-')} " + values
    return rows.assign(by=names)


def compare(rows):
    """The rows that can be compared, once each. Raises InputError if window length, test tokens or seeds forbid it."""
    if rows[["seq_len", "tokens"]].nunique().max() > 1:
        raise InputError(f"tables for {rows.teacher.iloc[0]} differ in window length or test tokens: score them again")
    rows["time"] = rows.groupby(["layers_replaced", "name"]).time.transform("mean")
    is_flow = rows.name.str.startswith("LFT")
    flows = rows[is_flow & ~(rows.by.str.startswith("regression") & (rows.name != "LFT euler x1"))]
    twice = flows[flows.duplicated([*LINE, "text", "seed"])]
    if len(twice):
        raise InputError(f"{twice.folder.iloc[0]} has the same options and seed as another run: leave one out")
    others = rows[~is_flow].assign(by="").drop_duplicates([*LINE, "text"])  # the same in all tables
    return pandas.concat([flows, others])


def print_table(rows):
    texts = sorted(rows.text.unique(), reverse=True)  # code before English, as in the READMEs' sentences
    print("| layers replaced | by | evaluations |", " | ".join(f"KL, {text}" for text in texts), "| time |")
    print("|---" * (len(texts) + 4) + "|")
    for (_, layers, by, name), line in rows.groupby(LINE, sort=False):
        label = f"{by}, {name}".removeprefix(", ").replace("LFT ", "").replace(" x", " ×")
        cells = [layers, label, f"{line.evaluations.iloc[0]}".replace("<NA>", "–")]
        for text in texts:
            seeds = line[line.text == text]
            kl = ", ".join(seeds.kl.map("{:.3f}".format))
            cells.append(f"{kl} ± {seeds.kl_stderr.mean():.3f}".replace(" ± <NA>", "–"))
        print("|", " | ".join(cells), f"| {line.time.mean():.2f} |")


# ---- 2. Pictures
def draw_time(axes, rows):
    rows = rows[~rows.name.isin(["span dropped", "skipped, mean of places"])]
    for method, same in rows.groupby(rows.by.where(rows.by != "", rows.name).str.partition(",")[0]):
        points = same.groupby(LINE)[["time", "kl", "kl_stderr"]].mean().sort_values(["time", "kl"])  # over seeds
        best = points[points.kl == points.kl.cummin()]
        axes.errorbar(best.time, best.kl, best.kl_stderr, marker="o", ms=4, capsize=2, label=method)
    axes.set(xlabel="time of a forward pass, relative to the teacher", ylabel="KL, nats per token")


def draw_tokens(axes, rows):
    for (folder, method), run in rows.groupby(["folder", "by"]):
        options = run.iloc[0]
        log = pandas.read_json(folder / "log.jsonl", lines=True).dropna(subset="validation_kl")
        if log.step.iloc[-1] != options.steps:
            raise InputError(f"{folder} was trained on since its table was made: run eval_kl.py again")
        tokens = log.step * options.batch_size * options.seq_len
        axes.plot(tokens, log.validation_kl, ".-", label=f"{method}, seed {options.seed:.0f}")
    axes.set(xlabel="training tokens", ylabel="KL on validation text, nats per token")


def save_picture(rows, by, draw, file):
    """A panel for each value of by."""
    panels = rows.groupby(by)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False)
    for axes, (name, same) in zip(grid.flat, panels):
        draw(axes, same)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.grid()
        axes.legend(fontsize=7)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of tables (default: studies/results)")
    args = parser.parse_args()
    for _, rows in read_rows(args.folder).groupby("teacher_sha256", sort=False):
        teacher = Path(rows.teacher.iloc[0]).name
        rows = compare(name_methods(rows))
        print(f"\n{teacher}, {rows.tokens.iloc[0]:,} test tokens of each text\n")
        print_table(rows)
        save_picture(rows, "text", draw_time, args.folder / f"{teacher}-time.png")
        save_picture(rows[rows.by != ""], "span", draw_tokens, args.folder / f"{teacher}-tokens.png")


if __name__ == "__main__":
    run_script(main)
