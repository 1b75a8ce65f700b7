"""What a student writes, and what it brings as a drafter for its teacher: greedy text, accepted share, tokens per second.

    python studies/drafting.py runs/fw-12-24-seed0 --skip 3 --first 15

A drafter proposes a few tokens, and the teacher checks them in one pass and keeps those that it would have written itself, so the
text is the teacher's own. Beside the student stands the teacher with a few layers skipped. Greedy, on beginnings of held-out rows.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import held_out_rows
from eval_kl import integrated
from lft import load_student, load_teacher, replace_span, run_script
from train_fm import one_or_more

PROMPT = 64  # tokens of a row


def generate(model, prompt, tokens, drafter=None, drafted=5):
    """Greedy text of exactly so many tokens, ids (1, prompt + tokens). drafted: tokens that the drafter proposes at a time."""
    more = {} if drafter is None else {"assistant_model": drafter}
    if drafter is not None:
        drafter.generation_config.update(num_assistant_tokens=drafted, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    return model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)


def calls_of(model):
    """A list that grows by one number, the tokens given, with each call of a model from now on."""
    calls = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append((args[0] if args else given["input_ids"]).shape[1]), with_kwargs=True)
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder that train_fm.py or train_fw.py wrote")
    add("--skip", type=one_or_more, default=3, help="layers that the rival skips (default %(default)s)")
    add("--first", type=int, help="first of them (default: the span's first)")
    add("--prompts", type=one_or_more, default=8, help="held-out rows to go on from (default %(default)s)")
    add("--tokens", type=one_or_more, default=60, help="tokens to write after each (default %(default)s)")
    args = parser.parse_args()
    student, tokenizer = load_student(args.run)
    config = student.config
    teacher, _ = load_teacher(config.teacher)
    first = config.start if args.first is None else args.first
    rows, _ = held_out_rows(config.training["data"], tokenizer, config.training["seq_len"], args.prompts * config.training["seq_len"], test=True)
    prompts = rows[:, :PROMPT].split(1)
    models = {"teacher": teacher, f"{config.solver} x{config.k}": student, "midpoint x1": integrated(student, "midpoint", 1)}
    models[f"layers {first}..{first + args.skip - 1} skipped"] = replace_span(teacher, first, first + args.skip)
    print(f"The prompt ends in:\n{tokenizer.decode(prompts[0][0])[-200:]}")
    for name, model in models.items():
        print(f"\n{name} writes:\n{tokenizer.decode(generate(model, prompts[0], args.tokens)[0, PROMPT:])}")

    print(f"\n{'drafter':24}{'kept of drafted':>17}{'tokens per pass':>17}{'tokens per second over the teacher alone':>42}")
    checks = calls_of(teacher)
    begin = time.perf_counter()
    alone = [generate(teacher, prompt, args.tokens) for prompt in prompts]
    teacher_time = time.perf_counter() - begin
    for name, model in list(models.items())[1:]:
        checks.clear()
        begin = time.perf_counter()
        same = [generate(teacher, prompt, args.tokens, model) for prompt in prompts]
        took = time.perf_counter() - begin
        new, passes = args.tokens * len(prompts), len(checks)
        drafted = sum(checks) - PROMPT * len(prompts) - (passes - len(prompts))  # a pass sees the last token kept, and the drafted
        equal = sum(torch.equal(a, b) for a, b in zip(alone, same))
        print(f"{name:24}{(new - passes) / drafted:>17.1%}{new / passes:>17.2f}{teacher_time / took:>42.2f}   {equal} of {len(prompts)} texts the teacher's own")


if __name__ == "__main__":
    run_script(main)
