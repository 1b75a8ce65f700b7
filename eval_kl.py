"""How far a student's logits are from its teacher's, beside skipping layers.

    python eval_kl.py runs/fw-6-18

Prints a table over held-out text, other than that which training scores itself on. KL is KL(teacher || student) of the
next-token distributions, in nats per token; the lower, the nearer to the teacher. Everything runs in float32, whatever the
flow was trained in.
"""
import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lft import (
    SOLVERS, FlowLayer, InputError, check_positive, embed, held_out_tokens, hidden_pair, layer_range, load_flow,
    load_teacher, pick_device, read_info, replace_span, run_layers, run_script, token_batches, write_whole,
)  # fmt: skip


def log_probabilities(logits):
    """The logarithms of the next-token probabilities, in float32 whatever the logits are in."""
    return logits.float().log_softmax(dim=-1)


def kl_divergence(log_p, log_q):
    """KL(p || q), p the teacher's and q the student's, in nats for each token: (batch, seq, vocabulary) to (batch, seq)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


# A row of the table is a way to get from the teacher's states to the state entering layer `end` and to the last state.
# The teacher's states are computed once and serve all rows: states[i] enters layer i, states[-1] the final norm.


def teacher_row(end):
    """The teacher itself."""
    return lambda teacher, states, context: (states[end], states[-1])


def flow_row(flow):
    """The student: `flow`, a FlowLayer, in the place of its span."""

    def row(teacher, states, context):
        x_end = flow(states[flow.start], **context)
        return x_end, run_layers(teacher, x_end, flow.end, len(states) - 1, context)

    return row


def skip_row(first, n, end):
    """The teacher without layers [first, first + n)."""

    def row(teacher, states, context):
        x = states[first]
        if first + n > end:  # the state entering `end` is the teacher's own, or the one that was carried over the gap
            return states[min(first, end)], run_layers(teacher, x, first + n, len(states) - 1, context)
        x_end = run_layers(teacher, x, first + n, end, context)
        return x_end, run_layers(teacher, x_end, end, len(states) - 1, context)

    return row


def linear_row(start, end, linear):
    """The span replaced by a linear layer."""

    def row(teacher, states, context):
        x_end = linear(states[start])
        return x_end, run_layers(teacher, x_end, end, len(states) - 1, context)

    return row


LINEAR_TOKENS = 262_144  # of training text, far more than the map has weights: with 14 times as many its KL falls by less than 1 %


def fit_linear(teacher, batches, start, end):
    """The linear layer that carries x0 nearest to x1, in closed form: least squares over batches of ids (batch, seq)."""
    hidden = teacher.config.hidden_size
    inputs, products = 0, 0  # sums over tokens, in float64: of [x0, 1] with itself, and with x1
    for ids in batches:
        x0, x1, _ = hidden_pair(teacher, ids.to(teacher.device), start, end)
        x0 = F.pad(x0, (0, 1), value=1.0).flatten(0, 1).double()
        inputs, products = inputs + x0.T @ x0, products + x0.T @ x1.flatten(0, 1).double()
    solution = torch.linalg.lstsq(inputs.cpu(), products.cpu(), driver="gelsd").solution.float()  # (hidden + 1, hidden)
    linear = torch.nn.Linear(hidden, hidden).requires_grad_(False)
    linear.load_state_dict({"weight": solution[:-1].T, "bias": solution[-1]})
    return linear.to(teacher.device)


def linear_model(teacher, start, end, linear):
    """The teacher without layers [start, end), and with `linear` before what follows them."""
    model = replace_span(teacher, start, end)
    model.linear = linear
    after = [*model.gpt_neox.layers, model.gpt_neox.final_layer_norm][start]
    after.register_forward_pre_hook(lambda module, args: (linear(args[0]), *args[1:]))
    return model


def logits_of(model, x):
    """The logits of a last state x, (batch, seq, vocabulary)."""
    return model.get_output_embeddings()(model.gpt_neox.final_layer_norm(x))


LOGITS_AT_ONCE = 2**26  # a quarter of a GiB in float32, and several such tensors are held; one sequence at least


@torch.no_grad()
def evaluate(teacher, sequences, end, rows, title=None):
    """Score rows on held-out sequences (sequences, seq); with a title, show a progress bar.

    rows: {name: row}. Returns {name: {measure: (sequences,)}}, a mean over each sequence's tokens: "kl" in nats, "nll" in
    nats, "agreement" of the top tokens, and the squared "error" and squared "norm" of the state entering layer `end`.
    """
    device = next(teacher.parameters()).device
    scores = {name: [] for name in rows}
    logits = sequences.shape[1] * teacher.config.vocab_size  # of a sequence
    batches = sequences.split(max(1, min(4096 // sequences.shape[1], LOGITS_AT_ONCE // logits)))
    progress = tqdm(total=len(batches) * len(rows), desc=title, disable=title is None, unit="row", leave=False)
    for ids in batches:
        ids = ids.to(device)
        x, context = embed(teacher, ids)
        states = [x]
        for layer in teacher.gpt_neox.layers:
            states.append(layer(states[-1], **context))
        log_p = log_probabilities(logits_of(teacher, states[-1]))
        top = log_p.argmax(-1)
        for name, row in rows.items():
            x_end, x_last = row(teacher, states, context)
            log_q = log_probabilities(logits_of(teacher, x_last))
            measures = {
                "kl": kl_divergence(log_p, log_q),
                "nll": -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0],
                "agreement": (log_q.argmax(-1) == top).float(),
                "error": (x_end - states[end]).square().sum(-1),
                "norm": states[end].square().sum(-1),
            }
            scores[name].append({measure: values.mean(dim=1).cpu() for measure, values in measures.items()})
            progress.update()
    progress.close()
    return {name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]} for name, parts in scores.items()}


def summarise(score):
    """The figures of a row, from its measures by sequence; the standard error is over sequences."""
    n = len(score["kl"])
    return {
        "kl": score["kl"].mean().item(),
        "kl_stderr": score["kl"].std().item() / math.sqrt(n) if n > 1 else None,
        "nmse": (score["error"].sum() / score["norm"].sum()).item(),
        "perplexity": score["nll"].mean().exp().item(),
        "top1_agreement": score["agreement"].mean().item(),
    }


TIMED_ROUNDS = 5
DECODED = 4  # tokens in a timing of decoding


@torch.no_grad()
def times_over_first(models, step):
    """The time of step(model, number) over that of the first model, for each: medians over rounds in which all take turns."""
    rounds = []
    for _ in range(TIMED_ROUNDS + 1):
        times = []
        for number, model in enumerate(models):
            begin = time.perf_counter()
            step(model, number)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        rounds.append([t / times[0] for t in times])
    return [statistics.median(ratios) for ratios in zip(*rounds[1:])]  # the first round warms up


def speeds(models, ids):
    """Parameters of each model, and its time over the first one's, the teacher's: a list of dicts.

    "prefill_time": a forward pass over ids (1, seq) without a cache. "decode_time": some tokens more with the cache of that
    pass; None if the flow has more evaluations than cache slots. "ideal_time": layers left plus velocity evaluations, over
    the teacher's layers.
    """
    prefill = times_over_first(models, lambda model, _: model(ids, use_cache=False, logits_to_keep=1))
    cached = [model for model in models if model.config.use_cache]
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for model in cached]

    def decode(model, number):
        for _ in range(DECODED):
            model(ids[:, -1:], past_key_values=caches[number])

    decoding = dict(zip(map(id, cached), times_over_first(cached, decode)))

    def calls(model):
        return sum(layer.evaluations if isinstance(layer, FlowLayer) else 1 for layer in model.gpt_neox.layers)

    return [
        {"parameters": model.num_parameters(), "prefill_time": prefill_time, "decode_time": decoding.get(id(model)),
         "ideal_time": calls(model) / calls(models[0])}
        for model, prefill_time in zip(models, prefill)
    ]  # fmt: skip


FLOW_STEPS = (1, 2, 3, 8)
SKIPS = (1, 2, 3, 4)
RANKED_PART = 10  # the placements of skipped layers are many: every tenth sequence ranks them


def kl_text(summary):
    """A KL and its standard error, where there are sequences enough to have one."""
    return f"{summary['kl']:.4f}" + (f" ± {summary['kl_stderr']:.4f}" if summary["kl_stderr"] is not None else "")


def table(teacher, velocity, sequences, start, end, flow_steps=FLOW_STEPS, linear=None, skips=SKIPS):
    """All rows of the table, over held-out sequences (sequences, seq): a list of dicts, in the order of printing.

    flow_steps: the numbers of steps to integrate in. linear: what `fit_linear` returned, for a row of its own. skips: the
    numbers of layers to skip.
    The best placements for skipping are found on every tenth sequence and scored on all of them; a mean over placements
    is of that tenth. The key "tokens" of a row says how many it was scored on. Times are of the first sequence.
    """
    layers = teacher.config.num_hidden_layers
    placements = {(first, n): skip_row(first, n, end) for n in skips for first in range(layers - n + 1)}
    part = sequences[::RANKED_PART]
    ranked = evaluate(teacher, part, end, placements, "ranking skips") if placements else {}

    rows = {"teacher": (None, 0, teacher_row(end))}  # name: layers replaced, velocity evaluations, row
    models = {"teacher": teacher, "span dropped": replace_span(teacher, start, end)}  # to be timed
    models |= {f"skip {n}": replace_span(teacher, 0, n) for n in skips if n <= layers}  # the time is the same anywhere
    for solver in SOLVERS:
        for steps in flow_steps:
            flow = FlowLayer(velocity, start, end, solver, steps)
            rows[f"LFT {solver} x{steps}"] = (layer_range(start, end), flow.evaluations, flow_row(flow))
            models[f"LFT {solver} x{steps}"] = replace_span(teacher, start, end, flow)
    rows["span dropped"] = (layer_range(start, end), 0, skip_row(start, end - start, end))
    if linear:
        rows["linear map"] = (layer_range(start, end), 0, linear_row(start, end, linear))
        models["linear map"] = linear_model(teacher, start, end, linear)
    means = {}
    for n in skips:
        anywhere = [placement for placement in placements if placement[1] == n]
        inside = [(first, n) for first, _ in anywhere if start <= first and first + n <= end]
        for where, candidates in (("inside span", inside), ("anywhere", anywhere)):
            if candidates:
                best = min(candidates, key=lambda placement: ranked[placement]["kl"].mean())
                rows[f"skip {n}, best {where}"] = (layer_range(best[0], best[0] + n), 0, placements[best])
        if inside:
            name = f"skip {n}, mean inside span"
            rows[name] = (f"{n} of {layer_range(start, end)}", 0, None)
            scores = [ranked[placement] for placement in inside]
            means[name] = {measure: torch.stack([score[measure] for score in scores]).mean(0) for measure in scores[0]}

    to_score = {name: row for name, (_, _, row) in rows.items() if row is not None}
    scores = means | evaluate(teacher, sequences, end, to_score, "scoring rows")
    speed = dict(zip(models, speeds([*models.values()], sequences[:1].to(teacher.device))))
    return [
        {"name": name, "layers_replaced": replaced, "evaluations": evaluations, **summarise(scores[name]),
         "tokens": len(scores[name]["kl"]) * sequences.shape[1], **speed[name.split(",")[0]]}
        for name, (replaced, evaluations, _) in rows.items()
    ]  # fmt: skip


def print_table(rows, end):
    """Print the rows that `table` returned, with units and direction."""
    print(
        f"KL(teacher || student) in nats per token ± standard error over sequences, NMSE of the state entering layer {end},\n"
        "perplexity: lower is better. Top-1, how often the top token is the teacher's: higher is better. Time over the\n"
        "teacher's: prefill, a sequence at once; decode, token by token with a cache (-: more evaluations than cache slots);\n"
        "ideal, layers and evaluations over the teacher's layers."
    )
    if any("mean" in row["name"] for row in rows):
        tokens = min(row["tokens"] for row in rows)
        print(f"Means over placements are of {tokens:,} of the tokens (geometric for the perplexity).")
    print()
    print(f"{'':25}{'layers':>11}{'velocity':>10}{'':41}{'million':>9}  time over the teacher's")
    print(
        f"{'row':25}{'replaced':>11}{'evals':>10}{'KL':>17}{'NMSE':>8}{'perpl.':>8}{'top-1':>8}{'weights':>9}"
        f"{'prefill':>9}{'decode':>8}{'ideal':>7}"
    )
    for row in rows:
        decode = "-" if row["decode_time"] is None else f"{row['decode_time']:.2f}"
        print(
            f"{row['name']:25}{row['layers_replaced'] or '-':>11}{row['evaluations'] or '-':>10}{kl_text(row):>17}"
            f"{row['nmse']:>8.4f}{row['perplexity']:>8.2f}{row['top1_agreement']:>8.1%}{row['parameters'] / 1e6:>9.2f}"
            f"{row['prefill_time']:>9.2f}{decode:>8}{row['ideal_time']:>7.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder that train_fm.py or train_fw.py wrote")
    add("--teacher", help="where the run's teacher is now (default: where it was in training)")
    add("--data", help="stdlib, a text file, a glob, or a data set, on the hub or in a folder; its held-out part is read, less what is for validation (default: what the run was trained on)")
    add("--tokens", type=int, default=32_768, help="held-out tokens to score (default %(default)s)")
    add("--flow-steps", type=int, nargs="+", help=f"numbers of steps to integrate the flow in (default: {FLOW_STEPS} and that of the training)")
    add("--no-baselines", action="store_true", help="leave out the linear map and the skips, which runs for one span share (default: do not)")
    add("--json", help="file to write the rows to as well (default: none)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args()
    check_positive(args, "tokens")
    if args.flow_steps and min(args.flow_steps) < 1:
        raise InputError(f"--flow-steps {min(args.flow_steps)} is too small: give 1 or more")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise InputError(f"--json {args.json} is no file in an existing folder: give one")
    device = pick_device(args.device)
    teacher, tokenizer = load_teacher(args.teacher or read_info(args.run)["teacher"], device)
    velocity, info = load_flow(args.run, teacher)
    start, end, data = info["start"], info["end"], args.data or info["data"]
    sequences = held_out_tokens(data, tokenizer, info["seq_len"], args.tokens)
    print(
        f"teacher {info['teacher']}, data {data}, held-out text for the test: {sequences.numel():,} tokens in {len(sequences)} sequences; "
        f"{args.run} replaces layers {layer_range(start, end)}, {end - start} of {teacher.config.num_hidden_layers}", flush=True
    )  # fmt: skip
    linear, skips = None, ()
    if not args.no_baselines:
        batches = token_batches(data, tokenizer, 16, info["seq_len"], seed=0)
        batches = itertools.islice(batches, max(1, LINEAR_TOKENS // (16 * info["seq_len"])))
        linear, skips = fit_linear(teacher, batches, start, end), SKIPS
    flow_steps = args.flow_steps or sorted({*FLOW_STEPS, info["steps"]})
    rows = table(teacher, velocity, sequences, start, end, flow_steps, linear, skips)
    print_table(rows, end)
    if args.json:
        result = {"teacher": info["teacher"], "data": data, "start": start, "end": end, "tokens": sequences.numel(), "rows": rows}
        write_whole(args.json, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))


if __name__ == "__main__":
    run_script(main)
