"""Which span to replace: the Recoupling Ratio (Eq. 7) of every span of a teacher's layers.

    python studies/spans.py --length 6 --picture recoupling.png

Between the states entering a span and the states leaving it there is one pairing that is shortest overall, the optimal transport.
Where it pairs every token with itself, straight paths from x0 to x1 keep apart and flow matching can follow them. Where it
re-pairs the tokens, the paths cross, and flow matching learns a mean over them. Spans that share a ratio, 0 above all, are
put in the order of how far they move the state, which is ours. Needs studies/requirements.txt.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from data import training_rows
from lft import (
    TINY_TEACHER, InputError, backbone, final_norm, fingerprint, first_line, load_teacher, pick_device, read_run, record_inputs,
    run_script,
)  # fmt: skip
from train_fm import one_or_more

try:
    from matplotlib import pyplot
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import spearmanr
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install -r studies/requirements.txt") from error


def recoupling_ratio(x0, x1):
    """The share of tokens that optimal transport pairs with another one's state, R = 1 - Tr(M) / O_M (Eq. 7).

    x0, x1: (tokens, hidden). 0: every token keeps its own; near 1: nearly all are re-paired. Of pairings that are equally
    short, as where equal tokens have equal states, the one that keeps most tokens to themselves counts.
    """
    # |x0 - x1|² = |x0|² + |x1|² - 2 x0·x1, and the sum of the first two is the same for every pairing; so is what centring adds.
    x0, x1 = x0.double() - x0.double().mean(dim=0), x1.double() - x1.double().mean(dim=0)
    products = x0 @ x1.T
    # A token's own pair gets a bonus that decides ties: far above float64's rounding, and far below float32's, in which x0 and x1 came.
    products.diagonal().add_(1e-12 * products.abs().max())
    _, paired_with = linear_sum_assignment(products.cpu().numpy(), maximize=True)  # M, a permutation
    return 1 - (paired_with == range(len(x0))).mean().item()


@torch.no_grad()
def ratios(teacher, rows, title=None):
    """Three measures of every span: the Recoupling Ratio, how far the span moves a token, and how unlike its tokens are.

    rows: ids (rows, seq), each row a batch of tokens to pair; means over rows. Returns three tensors (layers, layers + 1) to be
    asked for [start, end], nan where that is no span: R; the median token's |x1 - x0|² / |x1|²; and the share that the token
    moved most has in the batch's sum of |x1 - x0|², which is near 1 where massive activations appear or vanish.
    """
    layers = backbone(teacher).layers
    result, moved, massive = torch.full((3, len(layers), len(layers) + 1), torch.nan).tril().unbind()  # 0 where [start, end) is a span
    for ids in tqdm(rows.to(teacher.device).split(1), desc=title, disable=title is None, unit="batch", leave=False):
        with record_inputs(*layers, final_norm(teacher)) as calls:
            backbone(teacher)(ids, use_cache=False)
        states = [x[0] for x, _ in calls]  # (seq, hidden) each
        for start, end in itertools.combinations(range(len(states)), 2):
            x0, x1 = states[start], states[end]
            result[start, end] += recoupling_ratio(x0, x1) / len(rows)
            distance = (x1 - x0).square().sum(dim=-1)  # of each token
            moved[start, end] += (distance / x1.square().sum(dim=-1)).median().item() / len(rows)
            massive[start, end] += (distance.max() / distance.sum()).item() / len(rows)
    return result, moved, massive


def read_curve(folder, config):
    """The training tokens and the held-out KL of each score in a run's log, pairs; raises InputError if the flow's own is not the last."""
    try:
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        curve = [(line["tokens"], line["held_out_kl"]) for line in lines if "held_out_kl" in line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} lacks a whole log.jsonl: train it anew ({first_line(error)})") from error
    if not curve or curve[-1][0] != config.training["tokens"]:
        raise InputError(f"{folder}/log.jsonl does not end in the score of the run's flow: train it on with --resume {folder}, or anew")
    return curve


def compare(runs, teacher, result, moved):
    """Print the two measures of each run's span beside the held-out KL that it reached, and their rank correlations."""
    lines, teacher_is = [], fingerprint(teacher)
    for run in dict.fromkeys(Path(run).resolve() for run in runs):  # each once
        config, _ = read_run(run)
        if config.fingerprint != teacher_is:
            raise InputError(f"run {run} is of another teacher, {config.teacher}: leave it out, or give --teacher {config.teacher}")
        tokens, kl = read_curve(run, config)[-1]
        span = (config.start, config.end)
        lines.append((result[span].item(), moved[span].item(), kl, f"{config.start}..{config.end - 1}", tokens))
    print(f"\n{'layers':>8}{'R':>8}{'moved':>8}{'KL':>9}   held-out text for validation, nats per token, after training")
    for ratio, move, kl, layers, tokens in sorted(lines):
        print(f"{layers:>8}{ratio:>8.3f}{move:>8.3f}{kl:>9.4f}   {tokens:,} tokens")
    if len(lines) > 2:
        ratio, move, kl, *_ = zip(*lines)
        print(
            f"rank correlation (Spearman) with the KL over {len(lines)} runs: of R {spearmanr(ratio, kl).statistic:.2f}, "
            f"of how far the span moves the state {spearmanr(move, kl).statistic:.2f}"
        )


def draw(result, path):
    """Draw the ratios (layers, layers + 1) of all spans as a heat map; raises InputError if the file cannot be written."""
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    layers = len(result)
    image = axes.imshow(result[:, 1:].numpy(), origin="lower", extent=(0.5, layers + 0.5, -0.5, layers - 0.5))
    axes.set(xlabel="end (first layer not replaced)", ylabel="start (first layer replaced)", title="Recoupling Ratio R of every span")
    figure.colorbar(image, label="R: 0, optimal transport keeps every pair")
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise InputError(f"--picture {path} could not be written ({first_line(error)}): give a .png in an existing folder") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--length", type=one_or_more, default=6, help="layers in the span to choose (default %(default)s)")
    add("--teacher", default=TINY_TEACHER, help=f"{TINY_TEACHER}, a folder, a .gguf file, or a model on the hub (default %(default)s)")
    add("--data", help="stdlib, a text file, a glob, or a data set; its training part is read (default: stdlib for tiny_teacher, else monology/pile-uncopyrighted)")
    add("--tokens", type=one_or_more, default=8192, help="tokens to pair, each with those of its own batch (default %(default)s)")
    add("--batch", type=one_or_more, default=256, help="tokens in a batch, consecutive in the text (default %(default)s)")
    add("--picture", help="PNG file for a heat map of all spans (default: none)")
    add("--compare", metavar="RUN", nargs="+", help="runs of train_fm.py: print R beside their held-out KL, and the rank correlation (default: none)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args()
    teacher, tokenizer = load_teacher(args.teacher, pick_device(args.device))
    layers, positions = len(backbone(teacher).layers), teacher.config.max_position_embeddings
    if args.length > layers:
        raise InputError(f"--length {args.length} is more than this teacher's {layers} layers: give 1 to {layers}")
    if not 2 <= args.batch <= positions:
        raise InputError(f"--batch {args.batch} does not fit this teacher: give 2 to {positions}, its number of positions")
    data = args.data or ("stdlib" if args.teacher == TINY_TEACHER else "monology/pile-uncopyrighted")
    rows = itertools.islice(training_rows(data, tokenizer, args.batch), max(1, args.tokens // args.batch))
    rows = torch.tensor([row["ids"] for row in rows])
    result, moved, massive = ratios(teacher, rows, "pairing")
    print(
        f"teacher {args.teacher}, data {data}: Recoupling Ratio R, the mean of {len(rows)} batches of {args.batch} training "
        "tokens,\nand how far the span moves the median token, |x1 - x0|² / |x1|²; the lower, the better for flow matching.\n"
        "Largest: the share of the token moved most in the batch's sum of |x1 - x0|²"
    )
    spans = [(start, start + args.length) for start in range(layers - args.length + 1)]
    spans.sort(key=lambda span: (result[span], moved[span]))
    for start, end in spans:
        print(f"  layers {f'{start}..{end - 1}':>6}   R {result[start, end]:.3f}   moved {moved[start, end]:.3f}   largest {massive[start, end]:.3f}")
    ties = sum(bool(result[span] == result[spans[0]]) for span in spans)
    if ties > 1:
        print(f"{ties} spans share the lowest R, which does not tell them apart; the first of them moves the state least")
    print(f"best span of {args.length} layers: python train_fm.py --start {spans[0][0]} --end {spans[0][1]}")
    if args.picture:
        draw(result, args.picture)
    if args.compare:
        compare(args.compare, teacher, result, moved)


if __name__ == "__main__":
    run_script(main)
