"""Which span to replace? The Recoupling Ratio (Eq. 7) of every span of a teacher's layers.

    python studies/spans.py --length 6 --picture recoupling.png

Optimal transport pairs the states entering a span with those leaving it so that the sum of squared distances is
smallest. If it pairs every token with itself, straight paths from x0 to x1 do not cross, and flow matching can follow
them; R is the share of tokens that it pairs with others. Spans of equal R are sorted by how far they move the state,
which is our addition.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas
import torch
from scipy import optimize
from tqdm import tqdm

from data import take, training_windows
from run import DEVICES, load_teacher, run_script
from studies.frontier import layer_states
from studies.results import pyplot


def recoupling_ratio(x0, x1):
    """The share of tokens that optimal transport pairs with another token's state: R = 1 - Tr(M) / O_M (Eq. 7).

    x0, x1: (tokens, hidden). Where several pairings are optimal, the one that keeps most pairs counts.
    """
    # |x0 - x1|² = |x0|² + |x1|² - 2 x0·x1, where all pairings have the same sum of the first two. Centering changes no
    # pairing, and makes the products smaller.
    x0 = x0.double() - x0.double().mean(dim=0)
    x1 = x1.double() - x1.double().mean(dim=0)
    products = x0 @ x1.T
    # A bonus for own pairs decides ties: far above the rounding of float64, far below that of the float32 states.
    products.diagonal().add_(1e-12 * products.abs().max())
    _, paired_with = optimize.linear_sum_assignment(products.cpu().numpy(), maximize=True)  # M, a permutation
    return 1 - (paired_with == range(len(x0))).mean().item()


@torch.no_grad()
def ratios(teacher, windows):
    """R, moved, largest, divided of every span: (4, layers, layers + 1), indexed [start, end]; nan where start >= end.

    windows: ids (windows, seq); tokens are paired within a window, and the measures averaged. moved: |x1 - x0|² / |x1|²
    of the median token. largest: the share of one token in the sum of |x1 - x0|², near 1 where massive activations
    appear. divided: R after each channel was divided by its mean |x1|, so that no channel decides alone.
    """
    n = len(teacher.get_decoder().layers)
    found = torch.full((4, n, n + 1), torch.nan).tril()  # 0 where start < end
    for ids in tqdm(windows.to(teacher.device).split(1), desc="pairing windows"):
        states = layer_states(teacher, ids)
        for start, end in itertools.combinations(range(n + 1), 2):
            x0 = states[start][0]
            x1 = states[end][0]
            distance = (x1 - x0).square().sum(dim=-1)
            moved = (distance / x1.square().sum(dim=-1)).median()
            largest = distance.max() / distance.sum()
            ratio = recoupling_ratio(x0, x1)
            size = x1.abs().mean(dim=0)
            divided = recoupling_ratio(x0 / size, x1 / size)
            found[:, start, end] += torch.tensor([ratio, moved, largest, divided]) / len(windows)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--teacher", default="tiny_teacher", help="a folder or a model on the hub (default: %(default)s)")
    add("--data", nargs="+", default=["stdlib"], help="texts, as for train_fm.py; their training part is read")
    add("--length", type=int, default=6, help="layers of the spans to list (default: %(default)s)")
    add(
        "--windows",
        type=int,
        default=32,
        help="windows of 256 tokens, each paired within itself (default: %(default)s)",
    )
    add("--picture", help="PNG file for a heat map of all spans")
    args = parser.parse_args()
    teacher, tokenizer = load_teacher(args.teacher, DEVICES[0])
    windows = training_windows(args.data, tokenizer, seq_len=256)
    found = ratios(teacher, take(windows, args.windows))
    measures = found.diagonal(args.length, dim1=1, dim2=2)  # start + length = end: (4, spans)
    table = pandas.DataFrame(measures.T.numpy(), columns=["R", "moved", "largest", "divided"])
    table.index = [f"{start}..{start + args.length - 1}" for start in table.index]
    print(table.sort_values(["R", "moved"]).to_string(float_format="{:.3f}".format))
    if args.picture:
        n = found.shape[1]
        figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
        image = axes.imshow(found[0, :, 1:].numpy(), origin="lower", extent=(0.5, n + 0.5, -0.5, n - 0.5))
        axes.set(xlabel="end (first layer to keep)", ylabel="start (first to replace)")
        axes.set_title("Recoupling Ratio of every span")
        figure.colorbar(image, label="R: 0, optimal transport keeps every pair")
        figure.savefig(args.picture)


if __name__ == "__main__":
    run_script(main)
