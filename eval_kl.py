"""How far a student's predictions are from its teacher's, next to cheaper ways of removing the same layers.

    python eval_kl.py runs/fw-6-18

All models are scored in float32 on test text that the flow was not trained on. KL is KL(teacher || student) of the
next-token distributions in nats per token: 0 is a perfect copy, lower is better.
"""

import argparse
import importlib
import json
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import held_out_windows, take, training_windows
from lft import (
    SOLVERS,
    TOKEN_POWER,
    InputError,
    hidden_pair,
    kl_divergence,
    replace_span,
    share,
    token_weights,
    trunk_of,
)
from run import DEVICES, hashes, load, load_teacher, run_script

BATCH_TOKENS = 1024  # scored at a time: their logits fill memory
VALIDATION_TOKENS = 16_384
FIT_TOKENS = 131_072  # for the linear maps: far more tokens than their hidden + 1 inputs


# ---- 1. Measures
def timed_logits(model, ids):
    """The logits of each next token (batch, seq, vocabulary), and the seconds of the forward pass."""
    ids[0, 0].item()  # reading a value waits until a GPU has done all earlier work
    begin = time.perf_counter()
    logits = model(ids, use_cache=False).logits
    logits[0, 0, 0].item()
    return logits, time.perf_counter() - begin


def in_batches(teacher, windows):
    return windows.to(teacher.device).split(max(1, BATCH_TOKENS // windows.shape[1]))


@torch.no_grad()
def evaluate(teacher, models, windows, title=None):
    """Score {name: model} on windows of ids (windows, seq): {name: {"kl", "nll", "time"}}, each (windows,).

    kl: from the teacher. nll: of the text's next tokens. Both are means over tokens, in nats. time: of the forward
    pass, relative to the teacher's; the models take turns.
    """
    scores = {name: defaultdict(list) for name in models}
    batches = in_batches(teacher, windows)
    for model in (teacher, *models.values()):
        model(batches[0], use_cache=False)  # the first pass takes longer, so it is not timed
    for ids in tqdm(batches, desc=title, disable=title is None, leave=False):
        logits, teacher_seconds = timed_logits(teacher, ids)
        log_p = logits.log_softmax(dim=-1)
        for name, model in models.items():
            logits, seconds = timed_logits(model, ids)
            log_q = logits.log_softmax(dim=-1)
            score = scores[name]
            score["kl"].append(kl_divergence(log_p, log_q).mean(dim=1))
            score["nll"].append(F.nll_loss(log_q[:, :-1].mT, ids[:, 1:], reduction="none").mean(dim=1))
            score["time"].append(torch.full((len(ids),), seconds / teacher_seconds))
    return {name: {key: torch.cat(parts).cpu() for key, parts in score.items()} for name, score in scores.items()}


def state_pairs(teacher, windows, start, end):
    """Yield x0, x1 and context of windows of ids, batch by batch."""
    trunk = trunk_of(teacher, end)
    for ids in in_batches(teacher, windows):
        yield hidden_pair(trunk, ids, start)


@torch.no_grad()
def nmse(layer, pairs):
    """Mean over tokens of ‖x̂1 - x1‖² / ‖x1‖², where x̂1 is the layer's output for x0."""
    errors = []
    for x0, x1, context in pairs:
        errors.append((layer(x0, **context) - x1).square().mean(dim=-1) * token_weights(x1, 2))
    return torch.cat(errors).mean().item()


def standard_error(values, documents):
    """Cluster-robust standard error of the mean of values (windows,), one cluster per document; None for one document.

    Windows of one document depend on each other. The pieces of a book count as documents, so its error is too small.
    documents: the number of each window's document (windows,).
    """
    deviations = values - values.mean()
    sums = torch.stack([deviations[documents == number].sum() for number in documents.unique()])
    if len(sums) == 1:
        return None
    return (len(sums) * sums.var()).sqrt().item() / len(values)  # the sums' mean is 0


# ---- 2. The rows of the table. split: test windows and their documents, validation windows, windows to fit maps on
def make_row(name, layers, model, score, split, **more):
    return {
        "name": name,
        "layers_replaced": layers,
        "kl": score["kl"].mean().item(),
        "kl_stderr": standard_error(score["kl"], split.documents),
        "perplexity": score["nll"].mean().exp().item(),
        "parameters": model.num_parameters(),
        "time": score["time"].median().item(),
        **more,
    }


@torch.no_grad()
def count_evaluations(student, ids):
    """How often the velocity is evaluated in one forward pass."""
    calls = []

    def count(velocity, args, output):
        calls.append(output)

    hook = student.flow.velocity.register_forward_hook(count)
    student(ids)
    hook.remove()
    return len(calls)


def flow_rows(teacher, student, split):
    """The teacher, the student with each solver, and the teacher without the span."""
    start = student.config.start
    end = student.config.end
    models = {"teacher": teacher}
    more = defaultdict(dict)
    pairs = list(state_pairs(teacher, split.test, start, end))
    for solver in SOLVERS:
        for k in sorted({1, 3, student.config.k}):
            name = f"LFT {solver} x{k}"
            model = share(student)
            model.set_solver(solver, k)
            models[name] = model
            more[name] = {
                "evaluations": count_evaluations(model, split.test[:1].to(teacher.device)),
                "nmse": nmse(model.flow, pairs),
            }
    models["span dropped"] = replace_span(teacher, start, end)
    scores = evaluate(teacher, models, split.test, "scoring")
    rows = []
    for name, model in models.items():
        layers = "-" if model is teacher else f"{start}..{end - 1}"
        rows.append(make_row(name, layers, model, scores[name], split, **more[name]))
    return rows


class LinearLayer(nn.Linear):
    """A linear map that is called like a decoder layer."""

    def forward(self, x, **context):
        return super().forward(x)


@torch.no_grad()
def fit_linear(pairs, token_power=TOKEN_POWER):
    """The linear map from x0 to x1 by least squares over pairs; tokens are weighted as in the flow's loss."""
    # The normal equations, summed over tokens, with x = [x0, 1] and y = x1. In float64 on the CPU: MPS has none.
    xtx = 0
    xty = 0
    for x0, x1, _ in pairs:
        weights = token_weights(x1, token_power).flatten().cpu().double()[:, None]
        x = F.pad(x0, (0, 1), value=1.0).flatten(0, 1).cpu().double()  # (tokens, hidden + 1)
        y = x1.flatten(0, 1).cpu().double()
        xtx += (weights * x).T @ x
        xty += (weights * x).T @ y
    solution = torch.linalg.lstsq(xtx, xty, driver="gelsd").solution.float()  # (hidden + 1, hidden)
    linear = LinearLayer(solution.shape[1], solution.shape[1]).requires_grad_(False)
    linear.load_state_dict({"weight": solution[:-1].T, "bias": solution[-1]})
    return linear.to(x0.device)


def linear_row(teacher, name, split, start, end, token_power):
    """Layers start..end-1 replaced by a linear map."""
    linear = fit_linear(state_pairs(teacher, split.fit, start, end), token_power)
    model = replace_span(teacher, start, end, linear)
    score = evaluate(teacher, {name: model}, split.test)[name]
    pairs = state_pairs(teacher, split.test, start, end)
    return make_row(name, f"{start}..{end - 1}", model, score, split, nmse=nmse(linear, pairs))


def skip_rows(teacher, split, start, end, n):
    """n layers of the span skipped: at the best place on validation text, averaged over all places, at the first.

    The average's perplexity is the geometric mean.
    """
    models = {i: replace_span(teacher, i, i + n) for i in range(start, end - n + 1)}
    choice = evaluate(teacher, models, split.validation, f"choosing {n} layers to skip")
    kl = {i: choice[i]["kl"].mean().item() for i in models}
    best = min(kl, key=kl.get)
    scores = evaluate(teacher, models, split.test, f"skipping {n} layers")
    mean = {key: torch.stack([score[key] for score in scores.values()]).mean(dim=0) for key in scores[best]}
    model = models[best]
    rows = [
        make_row(f"skip {n}, best place", f"{best}..{best + n - 1}", model, scores[best], split),
        make_row(f"skip {n}, mean of places", f"{n} of {start}..{end - 1}", model, mean, split),
        make_row(f"skip {n}, first place", f"{start}..{start + n - 1}", model, scores[start], split),
    ]
    return rows, best


def baseline_rows(teacher, split, start, end, token_power):
    """The span replaced by a linear map; n of its layers skipped; the same n layers replaced by a linear map.

    As in the paper, n is 3 for a span of 12 layers and 2 for one of 6.
    """
    n = min(3 if end - start >= 12 else 2, end - start)
    skips, best = skip_rows(teacher, split, start, end, n)
    linear = linear_row(teacher, "linear map", split, start, end, token_power)
    patched = linear_row(teacher, f"linear map of {n} layers", split, best, best + n, token_power)
    return [linear, *skips, patched]


# ---- 3. The table
LEGEND = """KL: nats per token +- standard error over documents, lower is better. NMSE: of the state after the span.
weights: millions. time: forward pass, relative to the teacher.
"""

# By method and number of layers replaced. Which layers the paper skipped is not known.
PAPER = {
    ("fm", 6): f"in the paper, on Pythia-410M, flow / skip 2: {0.407 / 0.529:.2f}",
    ("fw", 12): f"in the paper, on Pythia-410M, flow / skip 3: {0.736 / 0.932:.2f}",
}


def print_table(rows):
    print(LEGEND)
    print(f"{'':25}{'replaced':>11}{'evaluations':>12}{'KL':>17}{'NMSE':>8}", end="")
    print(f"{'perplexity':>12}{'weights':>9}{'time':>6}")
    for row in rows:
        kl = f"{row['kl']:.4f}"
        if row["kl_stderr"] is not None:
            kl += f" +- {row['kl_stderr']:.4f}"
        error = "-"
        if "nmse" in row:
            error = f"{row['nmse']:.4f}"
        print(f"{row['name']:25}{row['layers_replaced']:>11}{row.get('evaluations', '-'):>12}{kl:>17}", end="")
        print(f"{error:>8}{row['perplexity']:>12.2f}{row['parameters'] / 1e6:>9.2f}{row['time']:>6.2f}")


def print_ratios(rows, config):
    """Print how the flow, as trained, compares with skipping layers."""
    kl = {row["name"]: row["kl"] for row in rows}
    trained = kl[f"LFT {config.solver} x{config.k}"]
    for name in kl:
        if name.startswith("skip"):
            print(f"KL ratio, flow / {name}: {trained / kl[name]:.2f}")
    print(PAPER.get((config.training["method"], config.end - config.start), ""))


# ---- 4. Loading
def load_student(run, device="cpu"):
    """The student in a run's folder, in float32, by the class that its configuration names: LFTForCausalLM or a fork's.

    Raises InputError if it cannot be loaded.
    """
    try:
        config = json.loads((Path(run) / "config.json").read_text())
        module, name = config["auto_map"]["AutoModelForCausalLM"].split(".")
        student_class = getattr(importlib.import_module(module), name)  # this folder's code, not the run's copy of it
        return load(student_class, Path(run).resolve()).to(device)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise InputError(f"{run} does not hold a trained student: train it, or finish it with --resume") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder of a run")
    add("--teacher", help="where the teacher is now (default: where it was in training)")
    add("--data", nargs="+", help="texts whose held-out parts are scored (default: the training text)")
    add("--tokens", type=int, default=32_768, help="test tokens to score (default: %(default)s)")
    add("--no-baselines", action="store_true", help="no linear maps and skips (the same for all runs on a span)")
    add("--json", help="also write the rows to this file")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run (default: %(default)s)")
    args = parser.parse_args()
    student = load_student(args.run, args.device)
    config = student.config
    training = config.training
    teacher, tokenizer = load_teacher(args.teacher or config.teacher, args.device)
    data = args.data or training["data"]
    reading = {"tokenizer": tokenizer, "seq_len": training["seq_len"]}
    validation = None
    if args.data is None or not args.no_baselines:  # scores of other text alone do not depend on the training text
        validation, _ = held_out_windows(training["data"], tokens=VALIDATION_TOKENS, **reading)
    for name, value in hashes(teacher, tokenizer, validation).items():
        if training[name] != value:
            raise InputError(f"{args.run} was trained with another {name}: its teacher or text has changed since")
    test, documents = held_out_windows(data, tokens=args.tokens, test=True, **reading)
    split = SimpleNamespace(test=test, documents=documents)
    rows = flow_rows(teacher, student, split)
    if not args.no_baselines:
        split.validation, _ = held_out_windows(data, tokens=args.tokens, **reading)
        windows = training_windows(training["data"], **reading)  # the linear maps learn from the student's text
        split.fit = take(windows, FIT_TOKENS // training["seq_len"])
        rows += baseline_rows(teacher, split, config.start, config.end, training.get("token_power", TOKEN_POWER))
    print(f"{args.run}: one flow replaces layers {config.start}..{config.end - 1} of {config.teacher}")
    tokens = training["steps"] * training["batch_size"] * training["seq_len"]
    print(f"trained for {training['steps']} of {training['max_steps']} steps, {tokens:,} tokens")
    print(f"scored on {test.numel():,} test tokens of {' and '.join(data)}, from {len(documents.unique())} documents")
    print_table(rows)
    if not args.no_baselines:
        print_ratios(rows, config)
    if args.json:
        made = {"data": data, "tokens": test.numel(), "training": training, "rows": rows}
        Path(args.json).write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
