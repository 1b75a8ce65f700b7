"""How far a student's predictions are from its teacher's, next to cheaper ways of removing the same layers.

    python eval_kl.py runs/fw-6-18

Each row of the table is a model made by `replace_span`, scored in float32 on test text that the flow was not trained on. KL is
KL(teacher || student) of the next-token distributions in nats per token: 0 is a perfect copy, lower is better.
"""
import argparse
import hashlib
import itertools
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import held_out_rows, take, training_rows
from lft import SOLVERS, FlowLayer, InputError, LFTForCausalLM, hidden_pair, load, load_teacher, replace_span, run_script, share
from lft import trunk_of


# ---- 1. Measures
def kl_divergence(log_p, log_q):
    """KL(p || q) = Σ p (log p - log q), p the teacher's and q the student's: (batch, seq, vocabulary) twice -> (batch, seq)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


TOKEN_POWER = 1.0  # ours; the paper's plain mean is 0


def token_errors(error, x1, power=TOKEN_POWER):
    """Each token's mean squared error, divided by the RMS of its x1 to a power: (batch, seq, hidden) twice -> (batch, seq).

    Language models give a few tokens, above all the first, states hundreds of times longer than the rest (massive activations).
    With power 0 those few tokens are almost the whole mean; with 2, which gives the NMSE, they hardly count.
    """
    rms = x1.square().mean(dim=-1).sqrt()
    rms = torch.maximum(rms, 1e-3 * rms.mean())  # a state of zero would divide by zero
    return error.square().mean(dim=-1) / rms**power


def log_probabilities(model, ids):
    """Log-probabilities of each next token (batch, seq, vocabulary), and the seconds that the forward pass took."""
    ids[0, 0].item()  # reading a value waits until a GPU has done all earlier work
    begin = time.perf_counter()
    logits = model(ids, use_cache=False).logits
    logits[0, 0, 0].item()
    seconds = time.perf_counter() - begin
    return logits.log_softmax(dim=-1), seconds


@torch.no_grad()
def evaluate(teacher, models, rows, start, end, title=None):
    """Score {name: model} on rows of ids (rows, seq): {name: {"kl", "nll", "top1", "nmse", "time": (rows,)}}, means over tokens.

    kl and nll in nats. nmse: of the state entering layer `end`, nan unless a flow or linear map stands in place of start..end-1.
    time: of the forward pass, relative to the teacher's; the models take turns.
    """
    trunk, scores = trunk_of(teacher, end), {name: [] for name in models}
    for ids in tqdm(rows.to(teacher.device).split(max(1, 1024 // rows.shape[1])), desc=title, disable=not title, leave=False):
        log_p, teacher_seconds = log_probabilities(teacher, ids)
        x0, x1, context = hidden_pair(trunk, ids, start)
        for name, model in models.items():
            log_q, seconds = log_probabilities(model, ids)
            nll = -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            top1 = (log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).float()
            nmse, relative = torch.full_like(top1, torch.nan), torch.full_like(top1, seconds / teacher_seconds)
            layer = [*model.get_decoder().layers, None][start]  # start may be past the last layer
            if isinstance(layer, (FlowLayer, LinearLayer)):
                nmse = token_errors(layer(x0, **context) - x1, x1, power=2)
            measures = (kl_divergence(log_p, log_q), nll, top1, nmse, relative)
            scores[name].append(torch.stack([values.mean(dim=1).cpu() for values in measures]))
    return {name: dict(zip(("kl", "nll", "top1", "nmse", "time"), torch.cat(parts, dim=1))) for name, parts in scores.items()}


def standard_error(values, documents):
    """Standard error of the mean of values (rows,) over documents, whose rows depend on each other; None for one document."""
    sums = torch.stack([(values - values.mean())[documents == document].sum() for document in documents.unique()])
    return (sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt().item() / len(values) if len(sums) > 1 else None


# ---- 2. The models of the table
class LinearLayer(nn.Linear):
    """A linear map that is called like a decoder layer."""

    def forward(self, x, **context):
        return super().forward(x)


def least_squares(pairs, token_power=TOKEN_POWER):
    """The linear map from x0 to x1 by least squares over batches of pairs; tokens are weighted as in the flow's loss."""
    inputs, products = 0, 0  # sums over tokens of [x0, 1] with itself and with x1; in float64, which not every device has
    for x0, x1 in pairs:
        weight = token_errors(torch.ones_like(x1), x1, token_power)[..., None]
        x0, x1, weight = (x.flatten(0, 1).cpu().double() for x in (F.pad(x0, (0, 1), value=1.0), x1, weight))
        inputs, products = inputs + (weight * x0).T @ x0, products + (weight * x0).T @ x1
    solution = torch.linalg.lstsq(inputs, products, driver="gelsd").solution.float()  # (hidden + 1, hidden)
    linear = LinearLayer(solution.shape[1], solution.shape[1]).requires_grad_(False)
    linear.load_state_dict({"weight": solution[:-1].T, "bias": solution[-1]})
    return linear


def fit_linear(teacher, rows, start, end, token_power=TOKEN_POWER):
    """The linear map from x0 to x1, fitted on rows of ids."""
    trunk, batches = trunk_of(teacher, end), rows.to(teacher.device).split(max(1, 4096 // rows.shape[1]))
    return least_squares((hidden_pair(trunk, ids, start)[:2] for ids in batches), token_power).to(teacher.device)


def skips(teacher, rows, fit_rows, start, end, token_power):
    """n layers of the span skipped at every place, and a linear map in the best: {name: (layers, model, scores)}.

    n is 3 for spans of 12 layers and more, and 2 for shorter ones, as in the paper.
    """
    n = min(3 if end - start >= 12 else 2, end - start)
    models = {i: replace_span(teacher, i, i + n) for i in range(start, end - n + 1)}
    scores = evaluate(teacher, models, rows, start, end, f"skipping {n}")
    best = min(models, key=lambda i: scores[i]["kl"].mean())
    mean = {key: torch.stack([score[key] for score in scores.values()]).mean(dim=0) for key in scores[best]}
    patched = replace_span(teacher, best, best + n, fit_linear(teacher, fit_rows, best, best + n, token_power))
    place = f"{best}..{best + n - 1}"
    return {
        f"skip {n}, best inside span": (place, models[best], scores[best]),
        f"skip {n}, mean inside span": (f"{n} of {start}..{end - 1}", models[best], mean),
        f"skip {n}, first of span": (f"{start}..{start + n - 1}", models[start], scores[start]),
        f"skip {n}, patched": (place, patched, evaluate(teacher, {0: patched}, rows, best, best + n)[0]),
    }


# ---- 3. The table
def table(teacher, student, rows, documents, fit_rows=None):
    """The rows of the table over test rows of ids, as dicts. fit_rows: training rows for the linear maps; None: no baselines."""
    start, end, calls = student.config.start, student.config.end, {}
    span, token_power = f"{start}..{end - 1}", student.config.training.get("token_power", TOKEN_POWER)
    models = {"teacher": teacher}
    for solver, k in itertools.product(SOLVERS, sorted({1, 3, student.config.k})):
        models[f"LFT {solver} x{k}"] = model = share(student)
        model.config.solver = model.flow.solver = solver
        model.config.k = model.flow.k = k
        calls[f"LFT {solver} x{k}"] = times = []
        model.flow.walk(lambda x, t: times.append(t) or 0.0, 0.0)  # a velocity of 0.0 that counts its evaluations
    models["span dropped"] = replace_span(teacher, start, end)
    if fit_rows is not None:
        models["linear map"] = replace_span(teacher, start, end, fit_linear(teacher, fit_rows, start, end, token_power))
    scores = evaluate(teacher, models, rows, start, end, "scoring")
    found = {name: ("-" if name == "teacher" else span, model, scores[name]) for name, model in models.items()}
    if fit_rows is not None:
        found |= skips(teacher, rows, fit_rows, start, end, token_power)
    return [
        {"name": name, "layers_replaced": layers, "evaluations": len(calls.get(name, [])), "tokens": rows.numel(),
         "kl": score["kl"].mean().item(), "kl_stderr": standard_error(score["kl"], documents),
         "nmse": score["nmse"].mean().item() if score["nmse"].isfinite().all() else None,
         "perplexity": score["nll"].mean().exp().item(), "top1_agreement": score["top1"].mean().item(),
         "parameters": model.num_parameters(), "prefill_time": score["time"].median().item()}
        for name, (layers, model, score) in found.items()
    ]  # fmt: skip


# KL over that of the skipped layers, by length of the span, on Pythia-410M. Which layers were skipped is not known.
PAPER = {6: f"paper, flow matching: {0.407 / 0.529:.2f}", 12: f"paper, Flow Walking: {0.736 / 0.932:.2f}"}


def print_table(rows, config, title):
    """Print how the flow, as trained, compares with skipping layers; then the title and the table."""
    kl, trained = {row["name"]: row["kl"] for row in rows}, f"LFT {config.solver} x{config.k}"
    if skipped := [name for name in kl if name.startswith("skip") and "patched" not in name]:
        ratios = ", ".join(f"{kl[trained] / kl[name]:.2f} {name.split(', ')[1]}" for name in skipped)
        paper = PAPER.get(config.end - config.start, "not in the paper")
        print(f"KL of {trained} over that of {skipped[0].split(',')[0]}: {ratios} ({paper})")
    print(title)
    print("KL: nats per token +- standard error over documents, lower is better. NMSE: of the state after the span. top-1: how")
    print("often the most likely token is the teacher's. weights: millions. time: forward pass, relative to the teacher.\n")
    print(f"{'row':25}{'replaced':>11}{'evaluations':>12}{'KL':>17}{'NMSE':>8}{'perpl.':>8}{'top-1':>8}{'weights':>9}{'time':>6}")
    for row in rows:
        error = "" if row["kl_stderr"] is None else f" +- {row['kl_stderr']:.4f}"
        nmse = "-" if row["nmse"] is None else f"{row['nmse']:.4f}"
        kl = f"{row['kl']:.4f}{error}"
        print(f"{row['name']:25}{row['layers_replaced']:>11}{row['evaluations'] or '-':>12}{kl:>17} {nmse:>7} ", end="")
        print(f"{row['perplexity']:>7.2f}{row['top1_agreement']:>8.1%}{row['parameters'] / 1e6:>9.2f}{row['prefill_time']:>6.2f}")


# ---- 4. Loading
DEVICES = [*dict.fromkeys([str(torch.accelerator.current_accelerator(check_available=True) or "cpu"), "cpu"])]  # cuda, mps first


def fingerprint(model):
    """A hash of a model's configuration and weights."""
    config = model.config.to_diff_dict() | dict.fromkeys(("_name_or_path", "dtype", "transformers_version"))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy())
    return digest.hexdigest()


def origins(teacher, validation):
    """What a run is made from, as hashes: the teacher, and the ids of validation text, so also text and tokenizer."""
    return {"teacher_sha256": fingerprint(teacher), "validation_sha256": hashlib.sha256(validation.numpy()).hexdigest()}


def load_student(run, device="cpu"):
    """The student in a run's folder, in float32. Raises InputError if it cannot be loaded."""
    try:
        student = load(LFTForCausalLM, Path(run).resolve(strict=True))
        student.config.training["data"]  # KeyError if training did not finish
    except Exception as error:  # transformers and safetensors raise many kinds
        raise InputError(f"{run} does not hold a trained student: train it, or finish it with --resume") from error
    return student.to(device)


VALIDATION_TOKENS = 16_384
FIT_TOKENS = 131_072


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder that train_fm.py or train_fw.py wrote")
    add("--teacher", help="where the teacher is now (default: where it was in training)")
    add("--data", nargs="+", help="texts whose held-out parts are scored (default: the training text)")
    add("--tokens", type=int, default=32_768, help="test tokens to score (default: %(default)s)")
    add("--no-baselines", action="store_true", help="leave out linear maps and skips (the same for all runs on one span)")
    add("--json", help="also write the rows to this file")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run (default: %(default)s)")
    args = parser.parse_args()
    student = load_student(args.run, args.device)
    config, training = student.config, student.config.training
    teacher, tokenizer = load_teacher(args.teacher or config.teacher, student.device)
    data, reading = args.data or training["data"], {"tokenizer": tokenizer, "seq_len": training["seq_len"]}
    validation, _ = held_out_rows(training["data"], tokens=VALIDATION_TOKENS, **reading)
    for name, value in origins(teacher, validation).items():
        if training[name] != value:
            raise InputError(f"{args.run} was trained with another {name}: its teacher, tokenizer or text has changed since")
    rows, documents = held_out_rows(data, tokens=args.tokens, test=True, **reading)
    fit_rows = None
    if not args.no_baselines:  # the linear maps learn from the student's own training text
        fit_rows = take(training_rows(training["data"], **reading), FIT_TOKENS // training["seq_len"])
    result = table(teacher, student, rows, documents, fit_rows)
    title = f"{args.run}: one flow replaces layers {config.start}..{config.end - 1} of {config.teacher}"
    title += f"\n{rows.numel():,} test tokens of {' and '.join(data)}, from {len(documents.unique())} documents"
    print_table(result, config, title)
    if args.json:
        made = {"teacher": config.teacher, "fingerprint": training["teacher_sha256"], "flow": fingerprint(student.flow)}
        made |= {"start": config.start, "end": config.end, "data": data, "seq_len": training["seq_len"], "tokens": rows.numel()}
        Path(args.json).write_text(json.dumps(made | {"rows": result}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
