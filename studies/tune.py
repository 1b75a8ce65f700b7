"""What does tuning a student end to end bring? The flow and all layers after it, on the KL of the logits; the paper does not.

    python studies/tune.py runs/fw-6-18 --out runs/tuned
    python eval_kl.py runs/tuned
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from data import take, training_rows
from eval_kl import DEVICES, kl_divergence, load_student
from lft import load_teacher, run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of a trained student")
    add("--out", required=True, help="folder for the tuned student")
    add("--max-steps", type=int, default=250, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="sequences per step")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--flow-only", action="store_true", help="leave the layers after the flow as they are")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to run")
    args = parser.parse_args()
    student = load_student(args.run, args.device)
    training = student.config.training
    teacher, tokenizer = load_teacher(student.config.teacher, student.device)
    student.requires_grad_(False)
    tuned = student.flow if args.flow_only else student.get_decoder().layers[student.config.start :]
    weights = [*tuned.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    factor = lambda i: min(1, 20 * (i + 1) / args.max_steps) * (1 - i / args.max_steps)  # up in a twentieth, then down to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows = iter(training_rows(training["data"], tokenizer, training["seq_len"], seed=1))
    for _ in tqdm(range(args.max_steps), unit="step"):
        ids = take(rows, args.batch_size).to(student.device)
        with torch.no_grad():
            log_p = teacher(ids, use_cache=False).logits.log_softmax(dim=-1)
        kl_divergence(log_p, student(ids, use_cache=False).logits.log_softmax(dim=-1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    student.config.training = training | {"tuned": vars(args)}
    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved in {args.out}")


if __name__ == "__main__":
    run_script(main)
