"""Train a flow that starts at the least-squares map of x0, by Flow Walking."""

import functools

from linear_start import LinearStartForCausalLM

from data import take, training_windows
from eval_kl import fit_linear, state_pairs
from loop import make_parser, train
from run import load_teacher, run_script
from train_fw import flow_walking_loss

FIT_TOKENS = 131_072


def loss_from_map(velocity, x0, x1, batch, loss_of=flow_walking_loss):
    """The loss from W x0 + b to x1. velocity.func: the block, of which `train` has bound the context."""
    return loss_of(velocity, velocity.func.linear(x0), x1, batch)


def new_student(config, teacher, args, student_class):
    """A student whose flow is the linear map at first: the velocity is 0, since α1 = α2 = 0."""
    student = student_class(config, teacher)
    velocity = student.flow.velocity
    _, tokenizer = load_teacher(args.teacher)
    windows = take(training_windows(args.data, tokenizer, args.seq_len), FIT_TOKENS // args.seq_len)
    linear = fit_linear(state_pairs(teacher, windows, args.start, args.end))
    velocity.linear.load_state_dict(linear.state_dict())
    vectors = velocity.modulation[-1].bias.data.view(6, -1)  # shift, scale and gate of each branch
    vectors[2].fill_(-1.0)
    vectors[5].fill_(-1.0)
    return student


def with_map(student_class, args):
    """What loop.train takes as student_class: makes the student and fits its map."""
    make = functools.partial(new_student, args=args, student_class=student_class)
    make.block_class = student_class.block_class
    make.config_class = student_class.config_class
    return make


def main():
    args = make_parser(__doc__, "linear-start", start=12, end=24).parse_args()
    student_class = with_map(LinearStartForCausalLM, args)
    train(args, loss_from_map, solver="midpoint", k=3, student_class=student_class)


if __name__ == "__main__":
    run_script(main)
