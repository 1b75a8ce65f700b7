"""Compare losses that weigh the tokens of a sequence differently, each over a short run; prints KL on validation text.

    python studies/massive.py --states states --teacher smollm2 --method fm --start 10 --end 16 --losses 0 1 2 rest median

In language models a few tokens carry massive activations: the first of a sequence above all, far longer than the
others. A plain mean of squares sees little but them. Losses are 0, 1 and 2, each token's squared error over its |x1| to this
power (0 is the paper's plain mean); "rest", the plain mean without the first token; "median", over |x1|² plus its median.
Options that are not listed are the training script's: `--losses 1 --init first` tries another start of the weights.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_fm
import train_fw
from lft import run_script
from studies.stored import Stored


def rest(error, x1, token_power):
    """The plain mean of squares of all tokens but the first."""
    return error[:, 1:].float().square().mean()


def median(error, x1, token_power):
    """Each token's squared error over its own |x1|² plus the median one."""
    size = x1.float().square().mean(dim=-1)
    return (error.float().square().mean(dim=-1) / (size + size.median())).mean()


LOSSES = {"rest": rest, "median": median}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--states", required=True, help="folder of stored states (studies/stored.py)")
    add("--teacher", required=True, help="as for train_fm.py")
    add("--method", choices=["fm", "fw"], required=True)
    add("--start", type=int, required=True)
    add("--end", type=int, required=True)
    add("--losses", nargs="+", default=["0", "1", "2", "rest", "median"], help="which (default: all)")
    add("--tokens", type=int, default=262_144, help="training tokens of each (default %(default)s)")
    add("--validation-tokens", type=int, default=8192, help="tokens scored (default %(default)s)")
    add("--lr", type=float, nargs="+", default=[1 / 64], help="learning rates (default: %(default)s)")
    add("--out", default="runs/massive", help="folder for the runs (default %(default)s)")
    args, more = parser.parse_known_args()
    train_fm.VALIDATION_TOKENS = args.validation_tokens
    stored, plain = Stored(args.states, args.teacher, "stdlib", 256), train_fm.mean_square
    train_fm.hidden_pair = stored.pair
    for loss in args.losses:
        for lr in args.lr:
            train_fm.mean_square = train_fw.mean_square = LOSSES.get(loss, plain)
            sys.argv = [
                f"train_{args.method}.py", "--teacher", args.teacher, "--data", "stdlib", "--seq-len", "256", "--compile", "--overwrite",
                "--start", str(args.start), "--end", str(args.end), "--max-steps", str(args.tokens // 2048), "--save-every", "100000",
                "--token-power", loss if loss not in LOSSES else "0", "--lr", str(lr),
                "--out", f"{args.out}/{args.method}-{args.start}-{args.end}-{loss}-{lr:g}", *more,
            ]  # fmt: skip
            print(f"{args.method} {args.start} -> {args.end}, loss {loss}, learning rate {lr:g}", *more)
            {"fm": train_fm, "fw": train_fw}[args.method].main()
            if train_fm.SIGNALS:  # Ctrl-C
                return


if __name__ == "__main__":
    run_script(main)
