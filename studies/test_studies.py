"""Tests of the studies, and of each fork as it stands."""

import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import eval_kl
import lft
from studies import crossing, frontier, results, spans, speed
from test_lft import IDS, approx, book, call_of, close, kl_of, layer_of, random_teacher, teacher_folder, tokenizer
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss

ROOT = Path(lft.__file__).parent
FORKS = ROOT / "studies/forks"
SHORT = ["--start=1", "--end=4", "--seq-len=32", "--batch-size=2", "--max-steps=2", "--device=cpu"]


def call(module, *options):
    sys.argv = [module.__name__, *map(str, options)]
    module.main()


def test_recoupling_ratio_is_that_of_the_best_of_all_pairings():
    """Of 6 tokens, some of them equal; of several best pairings the one that keeps most pairs."""
    pairings = torch.tensor([*itertools.permutations(range(6))])
    for seed, copies in itertools.product(range(4), ([0, 1, 2, 3, 4, 5], [0, 0, 2, 3, 4, 4])):
        x0, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x0 = x0[copies]
        x1 = x0 + 1.5 * noise
        cost = (x0 - x1[pairings]).square().sum(dim=(1, 2))
        own = (pairings == torch.arange(6)).sum(dim=1)[cost < cost.min() + 1e-9].max().item()
        assert spans.recoupling_ratio(x0, x1) == approx(1 - own / 6)


def test_spans_are_measured_between_layers():
    """Between the states that the library's layers get and give."""
    teacher = random_teacher()
    found = spans.ratios(teacher, IDS[:1])
    x0 = call_of(layer_of(teacher, 2), teacher, IDS[:1])[0][0]
    x1 = call_of(layer_of(teacher, 5), teacher, IDS[:1])[2][0]
    distance = (x1 - x0).norm(dim=1) ** 2
    close(found[[0, 2], 2, 6], torch.tensor([spans.recoupling_ratio(x0, x1), distance.max() / distance.sum()]))
    assert found[0].isfinite().equal(torch.ones(6, 7).triu(1).bool())


@pytest.mark.parametrize("name", speed.METHODS)
def test_floor_of_speed_is_what_training_multiplies(name):
    """Counted by torch; the rest is the time embedding."""
    args = SimpleNamespace(width=128, end=4, batch_size=3, seq_len=64, compile=False)
    loss_of, evaluations = speed.METHODS[name]
    trunk, velocity = speed.start_training(args, torch.device("cpu"))
    trunk.config._attn_implementation = velocity.attention.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted:
        speed.step(trunk, velocity, [], loss_of, torch.randint(50304, (3, 64)))
    products = speed.matrix_products(args, trunk.layers[0], evaluations, torch.device("cpu"))
    floor = sum(2 * a.numel() * b.shape[-1] for a, b in products)
    assert 1 < counted.get_total_flops() / floor < 1.03


def test_rivals_are_the_best_cuts():
    """Chosen on validation windows, scored on test windows."""
    teacher = random_teacher()
    test, validation, fit = torch.randint(97, (3, 8, 24))
    split = SimpleNamespace(test=test, documents=torch.arange(8), validation=validation)
    patches = frontier.fit_patches(teacher, fit, 1, 6, 2)
    skip, _, two = frontier.rivals(teacher, patches, split, 1, 6, 2)[3:]
    models = {i: lft.replace_span(teacher, i, i + 2) for i in range(1, 5)}
    best = min(models, key=lambda i: kl_of(teacher, models[i], validation))
    assert skip["layers"] == f"{best}..{best + 1}" and skip["kl"] == approx(kl_of(teacher, models[best], test))
    assert two["n"] == 2


def write_table(folder, seed=0, kl=0.5, **more):
    folder.mkdir()
    training = {"method": "fm", "batch_size": 2, "seq_len": 8, "steps": 5, "solver": "midpoint", "k": 1, "seed": seed}
    training.update(start=1, end=4, teacher_sha256="a")
    training.update(more)
    row = {"name": "LFT midpoint x1", "layers_replaced": "1..3", "kl": kl, "kl_stderr": 0.1, "time": 0.7}
    table = {"data": ["text"], "tokens": 64, "training": training, "rows": [row]}
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "log.jsonl").write_text(json.dumps({"step": 5, "validation_kl": 0.6}) + "\n")
    return folder / "table.json"


def test_results_are_means_over_seeds(tmp_path, capsys):
    """Tables that cannot be compared are refused."""
    files = [
        write_table(tmp_path / "a"),
        write_table(tmp_path / "b", 1, 0.8),
        write_table(tmp_path / "c", 0, 0.9, lr=1),
    ]
    call(results, *files, "--pictures", tmp_path / "pictures")
    printed = capsys.readouterr().out
    assert "0.6500 ± 0.1000 | 0.5000, 0.8000" in printed and "lr 1; midpoint ×1 | - | 0.9000" in printed
    for other in ({"seed": 1, "teacher_sha256": "b"}, {"seed": 0}):
        with pytest.raises(lft.InputError):
            call(results, files[0], write_table(tmp_path / str(other), **other))


def test_crossing_paths_need_flow_walking():
    """After 300 steps flow matching leaves at least twice the error."""
    x0 = crossing.starts(50)
    errors = []
    for loss_of in (flow_matching_loss, flow_walking_loss):
        landed = crossing.walk(crossing.trained(loss_of, steps=300, token_power=0), x0, 3)[-1]
        errors.append((landed + x0[:, 0]).norm(dim=-1).mean())
    assert errors[1] < 0.3 and errors[0] > 2 * errors[1]


@pytest.mark.parametrize("name", [file.stem for file in FORKS.glob("train_*.py")] + ["train_early"])
def test_fork_trains_and_opens_as_a_model(name, tmp_path, monkeypatch, teacher_folder, book):
    """Beside the other files; train_early.py is the README's."""
    for file in (*ROOT.glob("*.py"), *FORKS.glob("*.py")):
        shutil.copy(file, tmp_path)
    blocks = (ROOT / "README.md").read_text().split("```python\n")
    (early,) = (block.split("```")[0] for block in blocks if "early_loss" in block)
    (tmp_path / "train_early.py").write_text(early)
    monkeypatch.syspath_prepend(tmp_path)
    files = [f"--teacher={teacher_folder}", f"--data={book}", f"--out={tmp_path / 'run'}"]
    call(importlib.import_module(name), *SHORT, *files)
    call(eval_kl, tmp_path / "run", "--tokens=64", "--no-baselines", "--device=cpu")
    student = eval_kl.load_student(tmp_path / "run")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True, dtype=torch.float32)
    close(opened(IDS).logits, student(IDS).logits)
    texts = [opened.generate(IDS, max_new_tokens=5, use_cache=use_cache) for use_cache in (False, True)]
    assert torch.equal(*texts)


def test_readme_counts_the_lines():
    """`lft.py` (400 lines) means 391 to 409."""
    readme = (ROOT / "README.md").read_text()
    for file in ("lft.py", "train_fm.py", "train_fw.py", "loop.py", "eval_kl.py"):
        count = int(readme.split(f"`{file}` (")[1].split(")")[0].split(" ")[0])
        assert abs(count - len((ROOT / file).read_text().splitlines())) < 10
