"""Tests of the studies, and of each fork as it stands."""

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_kl
import lft
import test_lft
from studies import crossing, frontier, results, spans, speed
from test_lft import IDS, approx, book, call_of, close, kl_of, layer_of, random_teacher, teacher_folder, tokenizer
from train_fm import flow_matching_loss
from train_fw import flow_walking_loss

ROOT = Path(lft.__file__).parent
FORKS = ROOT / "studies/forks"
sys.path.append(str(FORKS))
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
    found = spans.ratios(teacher, IDS[2:])
    x0 = call_of(layer_of(teacher, 0), teacher, IDS[2:])[0][0]
    x1 = call_of(layer_of(teacher, 5), teacher, IDS[2:])[2][0]
    distance = (x1 - x0).norm(dim=1) ** 2
    largest = distance.max() / distance.sum()
    size = x1.abs().mean(dim=0)
    divided = spans.recoupling_ratio(x0 / size, x1 / size)
    close(found[[0, 2, 3], 0, 6], torch.tensor([spans.recoupling_ratio(x0, x1), largest, divided]))
    assert found[0].isfinite().equal(torch.ones(6, 7).triu(1).bool())


@pytest.mark.parametrize("name, evaluations", [("flow matching", 1), ("Flow Walking", 6)])
def test_operations_of_a_step(name, evaluations):
    """12 width² weights and two products of attention in each layer; backward takes twice as many as forward."""
    args = SimpleNamespace(width=128, end=4, seq_len=64)
    trunk, velocity = speed.start_training(args, torch.device("cpu"))
    counted = speed.operations(trunk, velocity, [], speed.METHODS[name], torch.randint(50304, (3, 64)))
    forward = 2 * 3 * 64 * (12 * 128**2 + 2 * 64 * 128)
    assert 1 < counted / (forward * (4 + 3 * evaluations)) < 1.03  # the rest is the time embedding


def test_rivals_are_the_best_cuts(tmp_path, teacher_folder, book):
    """Chosen on validation windows, scored on test windows; in a table that results.py reads."""
    teacher = random_teacher()
    test, validation, fit = torch.randint(97, (3, 8, 24))
    split = SimpleNamespace(test=test, documents=torch.arange(8))
    patches = frontier.fit_patches(teacher, fit, 1, 6)
    models = frontier.candidates(teacher, patches)
    kl = {key: kl_of(teacher, model, validation) for key, model in models.items()}
    skip = frontier.best_rows(teacher, models, kl, patches, split, "1..5")[3]
    best = min(range(1, 5), key=lambda i: kl["skip", i, 2])
    assert skip["kl"] == approx(kl_of(teacher, lft.replace_span(teacher, best, best + 2), test))
    mean = sum(kl_of(teacher, models["skip", i, 2], test) for i in range(1, 5)) / 4
    assert frontier.mean_row(teacher, split, 1, 6)["kl"] == approx(mean)


def write_table(folder, seed=0, kl=0.5, **more):
    folder.mkdir()
    training = {"method": "fm", "batch_size": 2, "seq_len": 8, "steps": 5, "solver": "midpoint", "k": 1, "seed": seed}
    training.update(start=1, end=4, teacher="any", teacher_sha256="a")
    training.update(more)
    row = {"name": "LFT midpoint x1", "layers_replaced": "1..3", "evaluations": 2}
    rows = [{**row, "kl": kl, "kl_stderr": 0.1, "time": 0.7}]
    table = {"data": ["text"], "tokens": 64, "training": training, "rows": rows}
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "log.jsonl").write_text(json.dumps({"step": 5, "validation_kl": 0.6}) + "\n")


def test_results_are_seeds_of_one_method(tmp_path, capsys):
    """Tables that cannot be compared are refused."""
    write_table(tmp_path / "a")
    write_table(tmp_path / "b", 1, 0.8)
    write_table(tmp_path / "c", 0, 0.9, lr=1)
    call(results, tmp_path)
    printed = capsys.readouterr().out
    assert "0.500, 0.800 ± 0.100" in printed and "lr 1, midpoint ×1 | 2 | 0.900" in printed
    for number, other in enumerate(({"seed": 1, "seq_len": 16}, {"seed": 0})):
        write_table(tmp_path / str(number), **other)
        with pytest.raises(lft.InputError):
            call(results, tmp_path)
        shutil.rmtree(tmp_path / str(number))


def test_readmes_show_what_results_prints(capsys, tmp_path):
    """Each row of a table of KLs."""
    shutil.copytree(results.RESULTS, tmp_path / "results")
    call(results, tmp_path / "results")
    printed = capsys.readouterr().out.splitlines()
    for file in (ROOT / "README.md", ROOT / "studies/README.md"):
        rows = [line for line in file.read_text().splitlines() if line.startswith("| ") and "±" in line]
        assert rows and set(rows) <= set(printed)


def test_runs_have_the_options_of_runs_sh(monkeypatch):
    """Each run in studies/results, the defaults included."""
    listed = subprocess.check_output(["bash", ROOT / "studies/runs.sh"], env={"LIST": "1"}, text=True)
    commands = {}
    for line in listed.splitlines():
        name, *words = line.split()
        commands[name] = words
    seen = []
    for table in results.RESULTS.rglob("*seed*/table*.json"):
        script, *options = commands[str(table.parent.relative_to(results.RESULTS))]
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(module, "train", lambda args, *more, **named: seen.append(vars(args)))
        call(module, *options)
        training = json.loads(table.read_text())["training"]
        for key, value in seen.pop().items():
            if value is not None and key not in ("init", "resume", "device"):
                assert training[key] == value, (table, key)


def test_kept_states_are_read(tmp_path):
    """From disk, though the trunk has changed; a new run sees that it has."""
    keep_states = importlib.import_module("keep_states")
    arguments = (lft.trunk_of(random_teacher(), 4), IDS, 1, tmp_path, [1, 4])
    expected = keep_states.hidden_pair(*arguments)
    arguments[0].get_input_embeddings().weight.data.zero_()  # so that it would give other states
    found = keep_states.hidden_pair(*arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    keep_states.contexts.clear()
    with pytest.raises(lft.InputError):
        keep_states.hidden_pair(*arguments)


def test_crossing_paths_need_flow_walking():
    """After 300 steps flow matching leaves at least twice the error."""
    x0 = crossing.starts(50)
    errors = []
    for loss_of in (flow_matching_loss, flow_walking_loss):
        landed = crossing.walk(crossing.trained(loss_of, steps=300), x0, 3)[-1]
        errors.append((landed + x0[:, 0]).norm(dim=-1).mean())
    assert errors[1] < 0.3 and errors[0] > 2 * errors[1]


@pytest.mark.parametrize("name", [file.stem for file in FORKS.glob("train_*.py")] + ["train_early"])
def test_fork_trains_and_opens_as_a_model(name, tmp_path, monkeypatch, teacher_folder, book):
    """In place; train_early.py is the README's."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")
    (early,) = (block.split("```")[0] for block in blocks if "early_loss" in block)
    (tmp_path / "train_early.py").write_text(early)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(lft.SOLVERS, "rk4", lft.euler)  # replaced by train_rk4, undone at the end of the test
    if "gemma3" in name:
        teacher_folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
        random_teacher("norms after branches", vocab_size=4096).save_pretrained(teacher_folder)
    files = [f"--teacher={teacher_folder}", f"--data={book}", f"--out={tmp_path / 'run'}"]
    call(importlib.import_module(name), *SHORT, *files)
    call(eval_kl, tmp_path / "run", "--tokens=64", "--no-baselines", "--device=cpu")
    student = eval_kl.load_student(tmp_path / "run")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True, dtype=torch.float32)
    close(opened(IDS).logits, student(IDS).logits)
    texts = [opened.generate(IDS, max_new_tokens=5, use_cache=use_cache) for use_cache in (False, True)]
    assert torch.equal(*texts)


def test_gemma_generates_over_its_sliding_window(monkeypatch):
    """With a cache, beams and left padding as without."""
    monkeypatch.setattr(lft, "LFTForCausalLM", importlib.import_module("gemma3").Gemma3Student)
    test_lft.test_generated_text_equals_uncached("norms after branches", {"num_beams": 3})
