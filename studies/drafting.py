"""What does a student write, and how well does it draft for its teacher?

    python studies/drafting.py runs/fw-6-18 --skip 3

A drafter proposes five tokens; the teacher checks them in one pass and keeps those that it would have written itself, so the text
is the teacher's own. The rival is the teacher without the span's first layers. Prompts are the beginnings of test rows.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import held_out_rows
from eval_kl import load_student
from lft import load_teacher, replace_span, run_script


def write(teacher, prompts, tokens, drafter=None):
    """Greedy text after each prompt, the tokens per forward pass of the teacher, and the seconds that it took."""
    passes, begin = [], time.perf_counter()
    hook = teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "assistant_model": drafter}
    if drafter is not None:  # without these settings the number of drafted tokens varies
        constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        drafter.generation_config.update(num_assistant_tokens=5, **constant)
    texts = [teacher.generate(prompt, **options) for prompt in prompts]
    hook.remove()
    return texts, tokens * len(prompts) / len(passes), time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="folder of a trained student")
    parser.add_argument("--skip", type=int, default=3, help="layers that the rival skips")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of up to 64 tokens")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to write after each")
    args = parser.parse_args()
    student = load_student(args.run)
    start, data, seq_len = student.config.start, student.config.training["data"], student.config.training["seq_len"]
    teacher, tokenizer = load_teacher(student.config.teacher)
    rows, _ = held_out_rows(data, tokenizer, seq_len, args.prompts * seq_len, test=True)
    prompts = rows[:, :64].split(1)
    alone, _, seconds = write(teacher, prompts, args.tokens)
    own, _, _ = write(student, prompts[:1], args.tokens)
    print(f"the teacher: {ascii(tokenizer.decode(alone[0][0]))}\nthe student: {ascii(tokenizer.decode(own[0][0]))}")
    for name, drafter in ("the student", student), (f"skip {args.skip}", replace_span(teacher, start, start + args.skip)):
        texts, per_pass, drafted = write(teacher, prompts, args.tokens, drafter)
        equal = sum(map(torch.equal, alone, texts))
        print(f"{name} drafts: {per_pass:.2f} tokens per pass of the teacher, {seconds / drafted:.2f} times the teacher's speed, "
              f"{equal} of {len(texts)} texts equal to the teacher's")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
