"""How far a student's logits are from its teacher's, beside skipping layers.

    python eval_kl.py runs/fw-6-18

Prints a table over held-out text, other than that which training scores itself on. KL is KL(teacher || student) of the
next-token distributions, in nats per token; the lower, the nearer to the teacher. Each row is a model, made from the teacher
by `replace_span`, and all are scored and timed in the same way, in float32.
"""
import argparse
import itertools
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import held_out_rows, training_rows
from lft import (
    SOLVERS, FlowLayer, InputError, backbone, final_norm, fingerprint, hidden_pair, load_student, load_teacher,
    pick_device, record_inputs, replace_span, run_script, share, trunk_of, write_whole,
)  # fmt: skip


def log_probabilities(logits):
    """The logarithms of the next token's probabilities, in float32 whatever the logits are in."""
    return logits.float().log_softmax(dim=-1)


def kl_divergence(log_p, log_q):
    """KL(p || q) = Σ p (log p − log q), p the teacher's and q the student's, in nats for each token.

    log_p, log_q: (batch, seq, vocabulary). Returns (batch, seq).
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def layer_entered(model, end):
    """The module of a model that is entered by what stands for the teacher's state at layer `end`."""
    layers = enumerate(backbone(model).layers)
    return next((layer for number, layer in layers if getattr(layer, "depth", number) >= end), final_norm(model))


class Unchanged(nn.Module):
    """Stands for a layer whose work is already done."""

    def forward(self, x, **context):
        return x


def first_changed(teacher, model):
    """The number of layers, from the first, in which a model is the very teacher; 0 if its embedding is not."""

    def equal(a, b):
        return type(a) is type(b) and all(x is y or torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

    pairs = zip(backbone(model).layers, backbone(teacher).layers)
    same = equal(model.get_input_embeddings(), teacher.get_input_embeddings())
    return sum(1 for _ in itertools.takewhile(lambda pair: equal(*pair), pairs)) if same else 0


LOGITS_AT_ONCE = 2**26  # a quarter of a GiB in float32, and several such tensors are held; one row at least


@torch.no_grad()
def evaluate(teacher, models, rows, end, title=None):
    """Score models on held-out rows of ids (rows, seq); with a title, show a progress bar.

    models: {name: model}. Returns {name: {measure: (rows,)}}, means over each row's tokens: "kl" in nats, "nll" in nats,
    "agreement" of the top tokens, and "nmse", the squared error of the state entering layer `end` over its squared norm.
    """
    tails = {}  # each model from the first layer on that is not the teacher's; what is before it runs once for all
    for name, model in models.items():
        (tail,), begin = share(model), min(end, first_changed(teacher, model))
        for number in range(begin):
            backbone(tail).layers[number] = Unchanged()
        tails[name] = tail, begin
    scores = {name: [] for name in models}
    batches = rows.split(max(1, min(4096, LOGITS_AT_ONCE // teacher.config.vocab_size) // rows.shape[1]))
    progress = tqdm(total=len(batches) * len(models), desc=title, disable=title is None, unit="model", leave=False)
    for ids in batches:
        ids = ids.to(teacher.device)
        with record_inputs(*backbone(teacher).layers, final_norm(teacher)) as calls:
            log_p = log_probabilities(teacher(ids, use_cache=False).logits)
        states, top = [x for x, _ in calls], log_p.argmax(dim=-1)  # states[n] enters layer n
        x1 = states[end]
        for name, (tail, begin) in tails.items():
            with record_inputs(layer_entered(tail, end)) as calls:
                given = {"inputs_embeds": states[begin]} if begin else {"input_ids": ids}
                log_q = log_probabilities(tail(**given, use_cache=False).logits)
            measures = {
                "kl": kl_divergence(log_p, log_q),
                "nll": -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0],
                "agreement": (log_q.argmax(dim=-1) == top).float(),
                "nmse": (calls[0][0] - x1).square().sum(dim=-1) / x1.square().sum(dim=-1),  # each token's own ratio
            }
            scores[name].append({measure: values.mean(dim=1).cpu() for measure, values in measures.items()})
            progress.update()
    progress.close()
    return {name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]} for name, parts in scores.items()}


def standard_error(values, documents):
    """Of the mean of values (rows,), where rows that begin in one document are not independent; None if all are of one."""
    groups = [(values - values.mean())[documents == number].sum() for number in documents.unique()]
    n = len(groups)
    return (torch.stack(groups).square().sum() * n / (n - 1)).sqrt().item() / len(values) if n > 1 else None


def summarize(score, documents=None):
    """The figures of a model, from its measures by row. documents: the number of each row's document, for the standard error."""
    return {
        "kl": score["kl"].mean().item(),
        "kl_stderr": None if documents is None else standard_error(score["kl"], documents),
        "nmse": score["nmse"].mean().item(),
        "perplexity": score["nll"].mean().exp().item(),
        "top1_agreement": score["agreement"].mean().item(),
    }


class LinearLayer(nn.Linear):
    """A linear map called like a decoder layer."""

    def forward(self, x, **context):
        return super().forward(x)


LINEAR_TOKENS = 131_072  # of training text; each output is fitted by hidden + 1 weights, so this is plenty


def fit_linear(teacher, batches, start, end):
    """The linear layer that carries x0 nearest to x1, in closed form: least squares over batches of ids (batch, seq)."""
    trunk, hidden = trunk_of(teacher, end), teacher.config.hidden_size
    inputs, products = 0, 0  # sums over tokens, in float64: of [x0, 1] with itself, and with x1
    for ids in batches:
        x0, x1, _ = hidden_pair(trunk, ids.to(teacher.device), start)
        x0 = F.pad(x0, (0, 1), value=1.0).flatten(0, 1).double()
        inputs, products = inputs + x0.T @ x0, products + x0.T @ x1.flatten(0, 1).double()
    solution = torch.linalg.lstsq(inputs.cpu(), products.cpu(), driver="gelsd").solution.float()  # (hidden + 1, hidden)
    linear = LinearLayer(hidden, hidden).requires_grad_(False)
    linear.load_state_dict({"weight": solution[:-1].T, "bias": solution[-1]})
    return linear.to(teacher.device)


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


def cost(model):
    """The layers of a model, each evaluation of a velocity counted as one, and a linear map as none."""
    layers = backbone(model).layers
    return sum(layer.evaluations if isinstance(layer, FlowLayer) else not isinstance(layer, LinearLayer) for layer in layers)


@torch.no_grad()
def speeds(models, ids):
    """Parameters of each model, and its time over the first one's, the teacher's: a list of dicts.

    "prefill_time": a forward pass over ids (1, seq) without a cache. "decode_time": some tokens more with the cache of that
    pass; None if the flow has more evaluations than cache slots. "ideal_time": by `cost`.
    """
    prefill = times_over_first(models, lambda model, _: model(ids, use_cache=False, logits_to_keep=1))
    caches = []
    for model in models:
        try:
            caches.append(model(ids, use_cache=True, logits_to_keep=1).past_key_values)
        except InputError:  # too many evaluations
            caches.append(None)

    def decode(model, number):
        for _ in range(DECODED if caches[number] is not None else 0):
            model(ids[:, -1:], past_key_values=caches[number], use_cache=True)

    decoding = times_over_first(models, decode)
    return [
        {"parameters": model.num_parameters(), "prefill_time": prefill[i], "decode_time": decoding[i] if caches[i] is not None else None,
         "ideal_time": cost(model) / cost(models[0])}
        for i, model in enumerate(models)
    ]  # fmt: skip


FLOW_STEPS = (1, 2, 3, 8)
SKIPS = (1, 2, 3, 4)
RANKED_PART = 10  # layers skipped outside the span: every tenth row finds the best place
# The paper's pairs on Pythia-410M: KL of the method, and of skipping so many layers (its abstract; it does not say which layers).
PAPER = {2: ("6 layers by flow matching", 0.407, 0.529), 3: ("12 layers by Flow Walking", 0.736, 0.932)}


def integrated(student, solver, k):
    """The student, weights and all, with its flow integrated in k steps of a solver."""
    (model,) = share(student)
    model.config.solver, model.config.k = solver, k
    return model


def skips_of(teacher, rows, start, end):
    """The teacher with 1 to 4 layers skipped: {name: (layers skipped, model)}, and {name: scores on all rows}.

    Inside the span every placement is scored on all rows; elsewhere every tenth row finds the best one, which is scored then.
    """
    layers, models, result = len(backbone(teacher).layers), {}, {}
    placements = {(first, n): replace_span(teacher, first, first + n) for n in SKIPS for first in range(layers - n + 1)}
    inside = {(first, n): model for (first, n), model in placements.items() if start <= first and first + n <= end}
    elsewhere = {place: model for place, model in placements.items() if place not in inside}
    scores = evaluate(teacher, inside, rows, end, "skipping inside")
    ranks = evaluate(teacher, elsewhere, rows[::RANKED_PART], end, "skipping elsewhere")
    chosen = [min((place for place in elsewhere if place[1] == n), key=lambda place: ranks[place]["kl"].mean(), default=None) for n in SKIPS]
    scores |= evaluate(teacher, {place: elsewhere[place] for place in chosen if place}, rows, end, "skipping the best")

    for n in SKIPS:
        places = [place for place in inside if place[1] == n]
        named = {"best anywhere": [place for place in scores if place[1] == n]}
        if places:
            named = {"best inside span": places, **named, "first of span": places[:1]}
        for where, candidates in named.items():
            place = min(candidates, key=lambda place: scores[place]["kl"].mean())
            models[f"skip {n}, {where}"] = (f"{place[0]}..{place[0] + n - 1}", placements[place])
            result[f"skip {n}, {where}"] = scores[place]
        if places:
            models[f"skip {n}, mean inside span"] = (f"{n} of {start}..{end - 1}", placements[places[0]])
            result[f"skip {n}, mean inside span"] = {key: torch.stack([scores[place][key] for place in places]).mean(0) for key in scores[places[0]]}
    return models, result


def table(teacher, student, rows, documents, linear=None):
    """The rows of the table, over held-out ids (rows, seq): a list of dicts, in the order of printing.

    linear: what `fit_linear` returned; None leaves out the linear map and the skips.
    """
    start, end = student.config.start, student.config.end
    span = f"{start}..{end - 1}"
    models = {"teacher": (None, teacher)}  # name: layers replaced, model
    for solver in SOLVERS:
        for k in sorted({*FLOW_STEPS, student.config.k}):
            models[f"LFT {solver} x{k}"] = (span, integrated(student, solver, k))
    models["span dropped"] = (span, replace_span(teacher, start, end))
    if linear is not None:
        models["linear map"] = (span, replace_span(teacher, start, end, linear))
    scores = evaluate(teacher, {name: model for name, (_, model) in models.items()}, rows, end, "scoring rows")
    if linear is not None:
        skips, scores_of_skips = skips_of(teacher, rows, start, end)
        models, scores = models | skips, scores | scores_of_skips
    timed = {name.split(",")[0]: model for name, (_, model) in models.items()}  # skipping n takes the same time anywhere
    speed = dict(zip(timed, speeds([*timed.values()], rows[:1].to(teacher.device))))
    result = []
    for name, (replaced, model) in models.items():
        result.append({
            "name": name, "layers_replaced": replaced, "tokens": rows.numel(), "evaluations": model.flow.evaluations if name.startswith("LFT") else 0,
            **summarize(scores[name], documents), **speed[name.split(",")[0]],
        })  # fmt: skip
    return result


def print_table(table, config):
    """Print the rows that `table` returned, with units and direction; what a reader looks for first comes first."""
    kl = {row["name"]: row["kl"] for row in table}
    trained = f"LFT {config.solver} x{config.k}"
    for n, (what, method, skip) in PAPER.items():
        names = [name for name in kl if name.startswith(f"skip {n},")]
        ratios = [f"{kl[trained] / kl[name]:.2f} {name.split(', ')[1]}" for name in names]
        if ratios:
            print(f"{trained}, KL over skip {n}'s: {', '.join(ratios)} (paper, {what}: {method} / {skip} = {method / skip:.2f})")
    print(
        "\nKL:      KL(teacher || student) in nats per token ± standard error over documents; lower is better\n"
        f"NMSE:    squared error of the state entering layer {config.end} over that state's squared norm, mean over tokens; lower is better\n"
        "perpl.:  perplexity of the text; lower is better. top-1: how often the likeliest token is the teacher's; higher is better\n"
        "time over the teacher's: prefill, a whole row; decode, tokens one by one with a cache (-: more evaluations than cache\n"
        "         slots); ideal, layers plus velocity evaluations. A mean over placements is geometric for the perplexity"
    )
    print(f"\n{'':25}{'layers':>11}{'velocity':>10}{'':41}{'million':>9}  time over the teacher's")
    print(
        f"{'row':25}{'replaced':>11}{'evals':>10}{'KL':>17}{'NMSE':>8}{'perpl.':>8}{'top-1':>8}{'weights':>9}"
        f"{'prefill':>9}{'decode':>8}{'ideal':>7}"
    )
    for row in table:
        error = "" if row["kl_stderr"] is None else f" ± {row['kl_stderr']:.4f}"
        decode = "-" if row["decode_time"] is None else f"{row['decode_time']:.2f}"
        print(
            f"{row['name']:25}{row['layers_replaced'] or '-':>11}{row['evaluations'] or '-':>10}{row['kl']:>{17 - len(error)}.4f}{error}"
            f"{row['nmse']:>8.4f}{row['perplexity']:>8.2f}{row['top1_agreement']:>8.1%}{row['parameters'] / 1e6:>9.2f}"
            f"{row['prefill_time']:>9.2f}{decode:>8}{row['ideal_time']:>7.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder that train_fm.py or train_fw.py wrote, or that a student was saved in")
    add("--teacher", help="where the teacher is now (default: where it was in training)")
    add("--data", help="stdlib, a text file, a glob, or a data set, whose held-out part is read (default: what the run was trained on)")
    add("--tokens", type=int, default=32_768, help="held-out tokens to score (default %(default)s)")
    add("--no-baselines", action="store_true", help="leave out the linear map and the skips, which all runs for one span share (default: do not)")
    add("--json", help="file to write the rows to as well (default: none)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    student, _ = load_student(args.run, args.teacher, device)
    config = student.config
    teacher, tokenizer = load_teacher(args.teacher or config.teacher, device)
    if fingerprint(teacher) != config.fingerprint:
        raise InputError(f"{args.run} was trained on another teacher, {config.teacher} as it was then: give that one by --teacher")
    data, seq_len = args.data or config.training.get("data"), config.training.get("seq_len", 256)
    if not data:
        raise InputError(f"{args.run} does not say what text it was trained on: give --data")
    rows, documents = held_out_rows(data, tokenizer, seq_len, args.tokens, test=True)
    linear = None
    if not args.no_baselines:
        ids = (row["ids"] for row in itertools.islice(training_rows(data, tokenizer, seq_len), max(1, LINEAR_TOKENS // seq_len)))
        linear = fit_linear(teacher, torch.tensor(list(ids)).split(16), config.start, config.end)
    result = table(teacher, student, rows, documents, linear)
    if args.json:
        made = {"teacher": config.teacher, "fingerprint": config.fingerprint, "flow": fingerprint(student.flow), "data": data}
        made |= {"start": config.start, "end": config.end, "seq_len": seq_len, "tokens": rows.numel(), "rows": result}
        write_whole(args.json, (json.dumps(made, indent=2) + "\n").encode())
    print(
        f"teacher {config.teacher}, data {data}, held-out text for the test: {rows.numel():,} tokens that begin in {len(documents.unique())} "
        f"documents; {args.run} replaces layers {config.start}..{config.end - 1}, {config.end - config.start} of "
        f"{len(backbone(teacher).layers)}"
    )  # fmt: skip
    print_table(result, config)


if __name__ == "__main__":
    run_script(main)
