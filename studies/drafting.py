"""What a student writes, and what it brings as a drafter for its teacher: greedy text, accepted share, tokens per second.

    python studies/drafting.py runs/fw-12-24-seed0 --skip 3

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
DRAFTED = 5


def generate(model, prompt, tokens, drafter=None):
    """Greedy text of exactly so many tokens, ids (1, prompt + tokens); a drafter proposes DRAFTED tokens at a time."""
    more = {} if drafter is None else {"assistant_model": drafter}
    if drafter is not None:
        drafter.generation_config.update(num_assistant_tokens=DRAFTED, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    return model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)


def drafts(teacher, drafter, prompts, tokens):
    """The texts with a drafter, a list of ids; the share of the drafted tokens that is kept; and the tokens written in a pass of the teacher."""
    passes = []  # the tokens that each is given: the prompt or the last token kept, and the drafted
    hook = teacher.register_forward_pre_hook(lambda _, args, given: passes.append((args[0] if args else given["input_ids"]).shape[1]), with_kwargs=True)
    texts = [generate(teacher, prompt, tokens, drafter) for prompt in prompts]
    hook.remove()
    written = tokens * len(prompts)
    drafted = sum(passes) - sum(prompt.numel() for prompt in prompts) - (len(passes) - len(prompts))
    return texts, (written - len(passes)) / drafted, written / len(passes)


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
    begin = time.perf_counter()
    alone = [generate(teacher, prompt, args.tokens) for prompt in prompts]
    teacher_time = time.perf_counter() - begin
    for name, model in list(models.items())[1:]:
        begin = time.perf_counter()
        texts, kept, per_pass = drafts(teacher, model, prompts, args.tokens)
        faster = teacher_time / (time.perf_counter() - begin)
        equal = sum(torch.equal(a, b) for a, b in zip(alone, texts))
        print(f"{name:24}{kept:>17.1%}{per_pass:>17.2f}{faster:>42.2f}   {equal} of {len(prompts)} texts as the teacher's alone")


if __name__ == "__main__":
    run_script(main)
