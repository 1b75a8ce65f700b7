"""Which span to replace? The Recoupling Ratio (Eq. 7) of every span of a teacher's layers.

    python studies/spans.py --length 6 --picture recoupling.png

Optimal transport pairs the states entering a span with those leaving it so that the sum of squared distances is smallest. If it
pairs every token with itself, straight paths from x0 to x1 do not cross, and flow matching can follow them; R is the share of
tokens that it pairs with others. Spans of equal R are sorted by how far they move the state, which is ours.
"""
import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from data import take, training_rows
from eval_kl import DEVICES
from lft import load_teacher, run_script, trunk_of
from studies.results import optimize, pyplot


def recoupling_ratio(x0, x1):
    """The share of tokens that optimal transport pairs with another token's state: R = 1 - Tr(M) / O_M (Eq. 7).

    x0, x1: (tokens, hidden). Where several pairings are optimal, as with equal states, the one with most own pairs counts.
    """
    # |x0 - x1|² = |x0|² + |x1|² - 2 x0·x1; the first two sum to the same for every pairing. Centering changes no pairing.
    x0, x1 = x0.double() - x0.double().mean(dim=0), x1.double() - x1.double().mean(dim=0)
    products = x0 @ x1.T
    # A bonus for own pairs decides ties: far above the rounding of float64, far below that of the float32 states.
    products.diagonal().add_(1e-12 * products.abs().max())
    _, paired_with = optimize.linear_sum_assignment(products.cpu().numpy(), maximize=True)  # M, a permutation
    return 1 - (paired_with == range(len(x0))).mean().item()


@torch.no_grad()
def ratios(teacher, rows):
    """R, moved and largest of every span, three tensors (layers, layers + 1) indexed [start, end]; nan if that is not a span.

    rows: ids (rows, seq); tokens are paired within a row, and the measures averaged over rows. moved: |x1 - x0|² / |x1|² of the
    median token. largest: the share of one token in the row's sum of |x1 - x0|², near 1 where massive activations appear.
    """
    n = len(teacher.get_decoder().layers)
    trunk, found = trunk_of(teacher, n), torch.full((3, n, n + 1), torch.nan).tril()  # 0 where start < end
    for ids in tqdm(rows.to(teacher.device).split(1), desc="pairing", unit="row", leave=False):
        states = trunk(ids, use_cache=False, output_hidden_states=True).hidden_states
        for start, end in itertools.combinations(range(n + 1), 2):
            x0, x1 = states[start][0], states[end][0]
            distance = (x1 - x0).square().sum(dim=-1)
            moved, largest = (distance / x1.square().sum(dim=-1)).median(), distance.max() / distance.sum()
            found[:, start, end] += torch.tensor([recoupling_ratio(x0, x1), moved, largest]) / len(rows)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--teacher", default="tiny_teacher", help="a folder or a model on the hub")
    add("--data", nargs="+", default=["stdlib"], help="texts, as for train_fm.py; their training part is read")
    add("--length", type=int, default=6, help="layers of the spans to list")
    add("--rows", type=int, default=32, help="rows of 256 tokens, which are paired with each other")
    add("--picture", help="PNG file for a heat map of all spans")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run")
    args = parser.parse_args()
    teacher, tokenizer = load_teacher(args.teacher, args.device)
    n = len(teacher.get_decoder().layers)
    rows = training_rows(args.data, tokenizer, min(256, teacher.config.max_position_embeddings))
    found = ratios(teacher, take(rows, args.rows))
    spans = [(*found[:, start, start + args.length].tolist(), start) for start in range(n - args.length + 1)]
    print(f"{'layers':>8}{'R':>8}{'moved':>8}{'largest':>9}")
    for ratio, moved, largest, start in sorted(spans):
        print(f"{f'{start}..{start + args.length - 1}':>8}{ratio:>8.3f}{moved:>8.3f}{largest:>9.3f}")
    if args.picture:
        figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
        image = axes.imshow(found[0, :, 1:].numpy(), origin="lower", extent=(0.5, n + 0.5, -0.5, n - 0.5))
        axes.set(xlabel="end (first layer to keep)", ylabel="start (first to replace)", title="Recoupling Ratio of every span")
        figure.colorbar(image, label="R: 0, optimal transport keeps every pair")
        figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    run_script(main)
