"""Train a student further, end to end: the flow and all layers after it, on the KL of the logits. The paper does not.

    python studies/tune.py runs/fw-6-18 --out runs/tuned                     # a plain loop
    python studies/tune.py runs/fw-6-18 --out runs/tuned --how trainer       # the same by transformers' Trainer
    python studies/tune.py runs/fw-6-18 --out runs/tuned --how lora          # peft's LoRA, merged into the weights at the end
    python eval_kl.py runs/tuned

It is the usual last step where layers are replaced. `trainer` needs the package accelerate, `lora` peft.
"""
import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from data import training_rows
from eval_kl import kl_divergence, log_probabilities
from lft import backbone, load_student, load_teacher, run_script


def loss_of(student, teacher, ids):
    """KL(teacher || student) of the next-token distributions, the mean over tokens, in nats."""
    with torch.no_grad():
        log_p = log_probabilities(teacher(ids, use_cache=False).logits)
    return kl_divergence(log_p, log_probabilities(student(ids, use_cache=False).logits)).mean()


class KLTrainer(Trainer):
    """transformers' Trainer with `loss_of`; the teacher is set after it is made."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return loss_of(model, self.teacher, inputs["input_ids"])


def train_by_loop(student, teacher, rows, args):
    """A plain loop."""
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for ids in tqdm(torch.tensor([row["input_ids"] for row in rows]).split(args.batch_size)):
        loss_of(student, teacher, ids).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_by_trainer(student, teacher, rows, args):
    """transformers' Trainer, with the same optimizer and schedule."""
    options = TrainingArguments(
        output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr, weight_decay=0.0,
        warmup_steps=args.steps // 20, lr_scheduler_type="linear", max_grad_norm=1.0, save_strategy="no", report_to=[], use_cpu=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = KLTrainer(model=student, args=options, train_dataset=rows)
    trainer.teacher = teacher
    trainer.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", help="folder of a run, or of a saved student")
    add("--out", required=True, help="folder to save the tuned student in")
    add("--how", choices=["loop", "trainer", "lora"], default="loop", help="what trains (default %(default)s)")
    add("--tokens", type=int, default=512_000, help="training tokens (default %(default)s)")
    add("--batch-size", type=int, default=8, help="rows in a step (default %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default %(default)s)")
    args = parser.parse_args()
    student, tokenizer = load_student(args.run)
    config = student.config
    teacher, _ = load_teacher(config.teacher)
    seq_len = config.training["seq_len"]
    args.steps = args.tokens // (args.batch_size * seq_len)
    rows = [{"input_ids": row["ids"]} for row in itertools.islice(training_rows(config.training["data"], tokenizer, seq_len, seed=1), args.steps * args.batch_size)]
    student.requires_grad_(False)
    for layer in backbone(student).layers[config.start :]:
        layer.requires_grad_(True)
    student.train()
    torch.manual_seed(0)
    if args.how == "lora":
        from peft import LoraConfig, get_peft_model

        numbers = "|".join(map(str, range(config.start, len(backbone(student).layers))))
        targets = rf".*layers\.({numbers})\..*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h|[qkvo]_proj|gate_proj|up_proj|down_proj)"
        adapted = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        adapted.print_trainable_parameters()
        train_by_loop(adapted, teacher, rows, args)
        student = adapted.merge_and_unload()
    else:
        (train_by_loop if args.how == "loop" else train_by_trainer)(student, teacher, rows, args)
    config.training = config.training | {"tuned": {"how": args.how, "tokens": args.tokens, "lr": args.lr}}
    student.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved in {args.out}: python eval_kl.py {args.out}")


if __name__ == "__main__":
    run_script(main)
