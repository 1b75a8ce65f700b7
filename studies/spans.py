"""Which span to replace: the Recoupling Ratio (Eq. 7) of every span of a teacher's layers.

    python choose_span.py --length 6 --picture recoupling.png

Between the states entering a span and the states leaving it there is one pairing that is shortest overall, the optimal transport.
Where it pairs every token with itself, straight paths from x0 to x1 keep apart and flow matching can follow them. Where it
re-pairs the tokens, the paths cross, and flow matching learns a mean over them. Spans that share a ratio, 0 above all, are
put in the order of how far they move the state, which is ours. Needs scipy, and matplotlib for a picture.
"""
import argparse
import itertools

import torch
from tqdm import tqdm

from lft import (
    TINY_TEACHER, InputError, check_positive, check_seq_len, check_span, describe_teacher, embed, first_line, layer_range,
    load_teacher, pick_device, read_curve, read_info, run_script, token_batches,
)  # fmt: skip

try:
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import spearmanr
except ImportError as error:
    raise SystemExit("error: choose_span.py needs two packages more: pip install scipy matplotlib") from error


def recoupling_ratio(x0, x1):
    """The share of tokens that optimal transport pairs with another one's state, R = 1 - Tr(M) / O_M (Eq. 7).

    x0, x1: (tokens, hidden). 0: every token keeps its own; near 1: nearly all are re-paired.
    """
    # |x0 - x1|² = |x0|² + |x1|² - 2 x0·x1, and the sum of the first two is the same for every pairing.
    products = x0.double() @ x1.double().T
    _, paired_with = linear_sum_assignment(products.cpu().numpy(), maximize=True)  # M, a permutation
    return 1 - (paired_with == range(len(x0))).mean().item()


@torch.no_grad()
def ratios(teacher, sequences, title=None):
    """The Recoupling Ratio of every span, and how far it moves the state, |x1 - x0|² / |x1|².

    sequences: (sequences, seq), each a batch of tokens to pair; means over sequences. Returns two tensors (layers, layers + 1)
    to be asked for [start, end]; nan where that is no span.
    """
    layers = teacher.config.num_hidden_layers
    result, moved = torch.full((2, layers, layers + 1), torch.nan).tril().unbind()  # 0 where [start, end) is a span
    for ids in tqdm(sequences.to(teacher.device).split(1), desc=title, disable=title is None, unit="batch", leave=False):
        x, context = embed(teacher, ids)
        states = [x[0]]  # entering each layer and, last, the final norm: (seq, hidden)
        for layer in teacher.gpt_neox.layers:
            states.append(layer(states[-1][None], **context)[0])
        for start, end in itertools.combinations(range(layers + 1), 2):
            x0, x1 = states[start], states[end]
            result[start, end] += recoupling_ratio(x0, x1) / len(sequences)
            moved[start, end] += (x1 - x0).square().sum().item() / x1.square().sum().item() / len(sequences)
    return result, moved


def compare(runs, teacher, result, moved):
    """Print the two measures of each run's span beside the held-out KL that it reached, and their rank correlations."""
    lines, teacher_is = [], describe_teacher(teacher)
    for run in runs:
        info = read_info(run)
        if info["teacher_is"] != teacher_is:
            raise InputError(f"run {run} is of another teacher, {info['teacher']}: leave it out, or give --teacher {info['teacher']}")
        start, end = info["start"], info["end"]
        tokens, kl = read_curve(run)[-1]
        lines.append((result[start, end].item(), moved[start, end].item(), kl, layer_range(start, end), tokens))
    print(f"\n{'layers':>8}{'R':>8}{'moved':>8}{'KL':>9}   held-out text, nats per token, after training")
    for ratio, move, kl, layers, tokens in sorted(lines):
        print(f"{layers:>8}{ratio:>8.3f}{move:>8.3f}{kl:>9.4f}   {tokens:,} tokens")
    ratio, move, kl, *_ = zip(*lines)
    print(
        f"rank correlation (Spearman) with the KL over {len(runs)} runs: of R {spearmanr(ratio, kl).statistic:.2f}, "
        f"of how far the span moves the state {spearmanr(move, kl).statistic:.2f}"
    )


def draw(result, path):
    """Draw the ratios of all spans as a heat map; raises InputError if matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError("a picture needs one package more: pip install matplotlib") from error
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
    add("--length", type=int, default=6, help="layers in the span to choose (default %(default)s)")
    add("--teacher", default=TINY_TEACHER, help=f"{TINY_TEACHER}, a folder, or a GPT-NeoX on the hub (default %(default)s)")
    add("--data", help="stdlib, a text file, a glob, or a data set; its training part is read (default: stdlib for tiny_teacher, else monology/pile-uncopyrighted)")
    add("--tokens", type=int, default=8192, help="tokens to pair, each with those of its own batch (default %(default)s)")
    add("--batch", type=int, default=256, help="tokens in a batch, consecutive in the text (default %(default)s)")
    add("--picture", help="PNG file for a heat map of all spans (default: none)")
    add("--compare", metavar="RUN", nargs="+", help="runs of train_fm.py: print R beside their held-out KL, and the rank correlation")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args()
    check_positive(args, "length", "tokens", "batch")
    teacher, tokenizer = load_teacher(args.teacher, pick_device(args.device))
    layers = teacher.config.num_hidden_layers
    check_span(teacher, 0, args.length)
    check_seq_len(teacher, args.batch, "--batch")
    data = args.data or ("stdlib" if args.teacher == TINY_TEACHER else "monology/pile-uncopyrighted")
    sequences = next(token_batches(data, tokenizer, max(1, args.tokens // args.batch), args.batch, seed=0))
    result, moved = ratios(teacher, sequences, "pairing")
    print(
        f"teacher {args.teacher}, data {data}: Recoupling Ratio R, the mean of {len(sequences)} batches of {args.batch} training "
        "tokens,\nand how far the span moves the state, |x1 - x0|² / |x1|²; the lower, the better for flow matching"
    )
    spans = [(start, start + args.length) for start in range(layers - args.length + 1)]
    spans.sort(key=lambda span: (result[span], moved[span]))
    for span in spans:
        print(f"  layers {layer_range(*span):>6}   R {result[span]:.3f}   moved {moved[span]:.3f}")
    best, ties = spans[0], sum(bool(result[span] == result[spans[0]]) for span in spans)
    if ties > 1:
        print(f"{ties} spans share the lowest R, which does not tell them apart; the first of them moves the state least")
    print(f"best span of {args.length} layers: python train_fm.py --start {best[0]} --end {best[1]}")
    if args.picture:
        draw(result, args.picture)
    if args.compare:
        compare(args.compare, teacher, result, moved)


if __name__ == "__main__":
    run_script(main)
