"""Train a velocity of two stacked blocks by Flow Walking."""

from two_blocks import TwoBlocksForCausalLM

from loop import make_parser, train
from run import run_script
from train_fw import flow_walking_loss


def main():
    args = make_parser(__doc__, "two-blocks", start=6, end=18).parse_args()
    train(args, flow_walking_loss, solver="midpoint", k=3, student_class=TwoBlocksForCausalLM)


if __name__ == "__main__":
    run_script(main)
