"""Save a student and its rivals for lm-eval, and say what word perplexity our own scoring gives on lm-eval's text.

    python studies/word_perplexity.py runs/fw-6-18 --out runs/models
    lm_eval --model hf --model_args pretrained=runs/models/student,trust_remote_code=True --include_path studies/lm_eval --tasks lft_held_out

The text, studies/lm_eval/held_out.jsonl, is the beginning of each held-out file of the standard library; --write makes it anew.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data import stdlib_texts
from eval_kl import evaluate
from lft import load_student, load_teacher, replace_span, run_script

TEXT = Path(__file__).parent / "lm_eval" / "held_out.jsonl"
CHARACTERS = 600  # of each file: under 512 tokens, one window


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run for the embedded teacher, or of a saved student")
    parser.add_argument("--out", required=True, help="folder to save the models in: teacher, student, skip-2")
    parser.add_argument("--write", action="store_true", help="write the text anew from this Python's standard library (default: read it)")
    args = parser.parse_args()
    student, tokenizer = load_student(args.run)
    teacher, _ = load_teacher(student.config.teacher)
    end = student.config.end
    if args.write:
        TEXT.write_text("".join(json.dumps({"text": text[:CHARACTERS]}) + "\n" for text in stdlib_texts(held_out=True) if text))
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as lm-eval counts them
    models = {"teacher": teacher, "student": student, "skip-2": replace_span(teacher, end - 2, end)}
    nll = dict.fromkeys(models, 0.0)
    for text in texts:  # lm-eval, too, puts the end-of-text token before the first
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        for name, score in evaluate(teacher, models, ids, end).items():
            nll[name] += score["nll"].item() * (ids.shape[1] - 1)
    for name, model in models.items():
        model.save_pretrained(f"{args.out}/{name}")
        tokenizer.save_pretrained(f"{args.out}/{name}")
        print(f"{name:10} word perplexity {torch.tensor(nll[name] / words, dtype=torch.float64).exp().item():.2f}")
    print(f"over {words:,} words of {len(texts)} files; skip-2 skips layers {end - 2}..{end - 1}")


if __name__ == "__main__":
    run_script(main)
