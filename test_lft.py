"""Tests, each against an independent truth: a closed form, the library's own output, or a loop by hand.

python -m pytest -q test_lft.py    # with KILLS=50 before it, the killed run is killed that often (default 2)
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test waits for the network

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, DynamicCache

import data
import eval_kl
import lft
import loop
import run
import train_fm
import train_fw

GQA = {"num_key_value_heads": 2}
SLIDING = {**GQA, "sliding_window": 8}
FAMILIES = {
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama": ("Llama", {**GQA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SLIDING),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 16}),
    "mixtral": ("Mixtral", {**GQA, "num_local_experts": 4}),
    "smollm3": ("SmolLM3", {**GQA, "no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    "nanochat": ("NanoChat", GQA),
    "norms after branches": ("Gemma3Text", {**SLIDING, "head_dim": 8}),
    "residual scaled by 0.99": ("Granite", {**GQA, "residual_multiplier": 0.99}),
}
UNFIT = ("norms after branches", "residual scaled by 0.99")
FIT = [family for family in FAMILIES if family not in UNFIT]


def random_teacher(family="neox", **options):
    """A small model with random weights, large enough that every part of a layer matters."""
    name, special = FAMILIES[family]
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    settings.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None})
    settings.update(special)
    settings.update(options)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))
    for name, weight in teacher.eval().requires_grad_(False).named_parameters():
        if name.endswith("bias") or "norm" in name:  # the library starts them at 0 and 1, where mistakes do not show
            weight += 0.2 * torch.randn_like(weight)
    return teacher


@torch.no_grad()
def randomize(velocity):
    """Make all weights of a velocity matter: its modulation starts at zero."""
    torch.manual_seed(1)
    for weight in velocity.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return velocity.eval()


def student_of(teacher, start, end, solver="midpoint", k=1):
    """A student with random weights in its velocity."""
    config = lft.LFTConfig(teacher_config=teacher.config.to_dict(), start=start, end=end, solver=solver, k=k, init=2)
    torch.manual_seed(2)
    student = lft.LFTForCausalLM(config, teacher)
    randomize(student.flow.velocity)
    return student.eval().requires_grad_(False)


def layer_of(model, number):
    return model.get_decoder().layers[number]


def call_of(layer, model, ids):
    """What the library calls a layer with, and what it returns: state, context, output."""
    seen = []

    def record(layer, args, context, output):
        seen.extend([args[0], context, output])

    hook = layer.register_forward_hook(record, with_kwargs=True)
    model(ids, use_cache=False)
    hook.remove()
    return seen


def kl_by_hand(teacher_logits, logits):
    p = teacher_logits.double().softmax(-1)
    q = logits.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def kl_of(teacher, model, ids):
    return kl_by_hand(teacher(ids).logits, model(ids).logits).item()


def approx(value):
    return pytest.approx(value, rel=1e-3, abs=1e-6)


close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
equal = functools.partial(torch.testing.assert_close, atol=0, rtol=0)
IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def small():
    """A small GPT-NeoX."""
    return random_teacher()


@pytest.fixture(scope="session")
def tokenizer():
    return run.load_teacher("tiny_teacher")[1]


# ---- The velocity, the solvers, the training pair
@pytest.mark.parametrize("family", FIT)
def test_pair_and_initial_velocity_equal_the_librarys_layers(family):
    """x0 enters layer `start`, x1 leaves layer `end - 1`; at first x0 + u(x0, t) is the layer."""
    teacher = random_teacher(family)
    for start, end, t in ((0, 1, 0.0), (1, 4, 0.37), (2, 6, torch.rand(3, 1, 1))):
        layer = layer_of(teacher, start)
        entering, _, output = call_of(layer, teacher, IDS)
        x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, end), IDS, start)
        equal(x0, entering)
        equal(x1, call_of(layer_of(teacher, end - 1), teacher, IDS)[2])
        close(x0 + lft.VelocityBlock(layer)(x0, t, **context), output)
    loop.check_layers(teacher, [1, 5], lft.VelocityBlock)


@pytest.mark.parametrize("family", UNFIT)
def test_layers_that_do_not_fit_are_refused_by_number(family):
    """Even if x + u(x, t) misses the layer's update by 1 % only."""
    with pytest.raises(lft.InputError, match="layer 2 of"):
        loop.check_layers(random_teacher(family), [2, 3], lft.VelocityBlock)


@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_velocity_is_the_formula(family):
    """α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2), with one time per sequence."""
    teacher = random_teacher(family)
    layer = layer_of(teacher, 2)
    velocity = lft.VelocityBlock(layer)
    first, _, last = randomize(velocity.modulation)
    x, context, _ = call_of(layer, teacher, IDS)
    t = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1)
    angles = t * 1000 ** (torch.arange(64) / 63)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = last(F.silu(first(embedding))).split(32, dim=-1)
    branch = (1 + gate1) * layer.attention((1 + scale1) * layer.input_layernorm(x) + shift1, **context)[0]
    y = x
    if family == "neox-sequential":
        y = x + branch
    mlp = layer.mlp((1 + scale2) * layer.post_attention_layernorm(y) + shift2)
    close(velocity(x, t, **context), branch + (1 + gate2) * mlp, atol=1e-3, rtol=1e-3)  # sin(1000 t) is not exact


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solver_order(solver, order):
    """On dx/dt = (1 + 2t) x, solved by x(0) exp(t + t²), the error falls with the solver's order."""

    def velocity(x, t):
        return (1 + 2 * t) * x

    def error(k):
        return lft.integrate(velocity, 1.0, lft.equal_times(k), solver) - math.exp(2)

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.06)


# ---- The span replaced
@pytest.mark.parametrize("family", ["neox", "mistral", "qwen3"])
@pytest.mark.parametrize("start, end", [(0, 2), (2, 5), (4, 6)])
def test_skip_equals_rebuilt_model(family, start, end):
    """Skipping layers gives the logits and text of a shorter model made by the library."""
    teacher = random_teacher(family)
    rebuilt = random_teacher(family, num_hidden_layers=6 - (end - start))
    rebuilt.load_state_dict({k: w for k, w in teacher.state_dict().items() if ".layers." not in k}, strict=False)
    for number in range(6 - (end - start)):
        old = number if number < start else number + end - start
        layer_of(rebuilt, number).load_state_dict(layer_of(teacher, old).state_dict())
    skipping = lft.replace_span(teacher, start, end)
    equal(skipping(IDS).logits, rebuilt(IDS).logits)
    assert skipping.config.to_dict() == rebuilt.config.to_dict()


@pytest.mark.parametrize("solver, end", [("midpoint", 4), ("euler", 6)])
def test_flow_takes_equal_steps_from_the_teachers_state(small, solver, end):
    """Three of them."""
    student = student_of(small, 2, end, solver, 3)
    x, context, output = call_of(student.flow, student, IDS)
    equal(x, small(IDS, output_hidden_states=True).hidden_states[2])
    u = functools.partial(student.flow.velocity, **context)
    close(output, lft.integrate(u, x, [0, 1 / 3, 2 / 3, 1], solver))


# ---- The KV cache
class TwoAttentions(lft.VelocityBlock):
    """A fork's velocity that calls two attentions."""

    def __init__(self, layer):
        super().__init__(layer)
        self.second = lft.VelocityBlock(layer)

    def forward(self, x, t, **context):
        first = super().forward(x, t, **context)
        return first + self.second(x + first, t, **context)


def cached_logits(model, cache):
    parts = [model(part, past_key_values=cache).logits for part in IDS.split([11, 1, 1, 7], dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", FIT)
@pytest.mark.parametrize("start, end, solver, k", [(1, 5, "midpoint", 2), (0, 1, "midpoint", 3), (4, 6, "euler", 8)])
def test_cached_and_reloaded_logits_equal_uncached(family, start, end, solver, k, tmp_path):
    """With the model's own cache, one made from its configuration, and one that grows; also after saving."""
    student = student_of(random_teacher(family), start, end, solver, k)
    expected = student(IDS, use_cache=False).logits
    cache = student(IDS[:, :11]).past_key_values
    close(student(IDS[:, 11:], past_key_values=cache).logits, expected[:, 11:])
    for config in (student.config.get_text_config(), None):
        close(cached_logits(student, DynamicCache(config=config)), expected)
    student.save_pretrained(tmp_path, save_original_format=False)
    close(lft.LFTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("before, k, after", [("midpoint", 3, "midpoint"), ("midpoint", 4, "euler"), ("new", 1, "new")])
def test_a_cache_filled_by_other_evaluations_is_refused(small, monkeypatch, before, k, after):
    """Keys and values of other times would be mixed, or some be missing. The adaptive solver takes 4 steps, then 3."""
    remaining = [3, 4]

    def adaptive(velocity, x, t, s):
        for _ in range(remaining.pop()):
            x = x + velocity(x, t)
        return x

    monkeypatch.setitem(lft.SOLVERS, "new", adaptive)
    student = student_of(small, 1, 5, before, min(k, 2))
    cache = student(IDS[:, :11]).past_key_values
    student.set_solver(after, k)
    with pytest.raises(lft.InputError, match="start a new one"):
        student(IDS[:, 11:], past_key_values=cache)


@pytest.mark.parametrize("growing", [False, True])
def test_two_flows_have_slots_of_their_own(small, growing):
    """4 layers, 7 more calls of a velocity with two attentions, 3 of another; use in a third model changes nothing."""
    late = lft.FlowLayer(randomize(TwoAttentions(layer_of(small, 4))), "midpoint", 2)
    early = lft.FlowLayer(randomize(lft.VelocityBlock(layer_of(small, 4))), "midpoint", 2)
    model = lft.replace_span(lft.replace_span(small, 3, 5, late), 0, 2, early).eval()
    expected = model(IDS, use_cache=False).logits
    other = lft.replace_span(small, 1, 2, early)
    assert layer_of(other, 1).velocity.norm1.weight is early.velocity.norm1.weight
    cache = DynamicCache(config=None if growing else model.config)
    close(cached_logits(model, cache), expected)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * (4 + 7 + 3)


@pytest.mark.parametrize("family", ["neox", "mistral"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generated_text_equals_uncached(family, how):
    """A padded batch with a cache, against each of its sequences alone, without padding and without a cache."""
    student = student_of(random_teacher(family), 2, 4, "midpoint", 2)
    beams = how.get("num_beams", 1)
    generate = functools.partial(student.generate, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    lengths = torch.tensor([20, 13, 5])
    mask = (torch.arange(20) >= 20 - lengths[:, None]).long()
    batch = generate(IDS * mask, attention_mask=mask, **how)
    for row, n in enumerate(lengths):
        alone = generate(IDS[row : row + 1, 20 - n :], use_cache=False, num_beams=beams)
        equal(batch[row, 20 - n :], alone[0])


def test_continuous_batching_is_refused(small):
    """It keeps one slot of the cache for each layer, whatever the velocity does."""
    cache = type("PagedAttentionCache", (), {})()
    with pytest.raises(lft.InputError, match="use generate"):
        student_of(small, 1, 5).flow(torch.zeros(1, 1, 32), cache=cache)


def test_student_has_what_trainer_and_lm_eval_ask_for(small, tmp_path):
    """A loss from labels, sizes, copies, new embeddings; states that leave out the flow's input are refused."""
    student = student_of(small, 1, 5, "euler", 2)
    output = student(IDS, labels=IDS)
    close(output.loss, F.cross_entropy(output.logits[:, :-1].mT, IDS[:, 1:]))
    assert student.config.get_text_config().num_hidden_layers == 3
    again = type(student)(student.config)
    again.load_state_dict(copy.deepcopy(student).state_dict())
    close(again.eval()(IDS).logits, output.logits)
    student.resize_token_embeddings(120)
    student.save_pretrained(tmp_path)
    assert lft.LFTForCausalLM.from_pretrained(tmp_path)(IDS).logits.shape == (3, 20, 120)
    with pytest.raises(lft.InputError, match="hooks"):
        student(IDS, output_hidden_states=True)


# ---- The losses
def uniform(times):
    """Kolmogorov's test that times are uniform on [0, 1], at a level of 1 %."""
    expected = torch.arange(1, len(times) + 1) / len(times)
    return len(times) > 9 and (times.sort().values - expected).abs().max() < 1.63 / len(times) ** 0.5


def test_times_are_uniform_and_one_per_sequence():
    """Flow matching draws one time per sequence, Flow Walking sorted inner times."""
    x0 = torch.zeros(20_000, 2, 1)
    times = []

    def velocity(x, t):
        times.append(t)
        return x - t  # x_t on the path from 0 to 1 is t itself

    torch.manual_seed(0)
    assert train_fm.flow_matching_loss(velocity, x0, x0 + 1) == 1 and uniform(times.pop().flatten())
    train_fw.flow_walking_loss(velocity, x0, x0 + 1, solver="euler")
    zero, first, second = times
    assert zero == 0 and (first < second).all() and uniform(torch.cat([first, second]).flatten())


def test_token_weights_are_powers_of_the_rms_with_a_floor():
    """1 / RMS^power; a state of zero counts as one of a thousandth of the mean RMS."""
    x1 = torch.tensor([[[1.0, 7.0], [10.0, 10.0], [0.0, 0.0]]])  # RMS 5, 10, 0
    for power in (0, 0.5, 1, 2):
        close(lft.token_weights(x1, power), torch.tensor([[5, 10, 0.005]]) ** -power)


@pytest.mark.parametrize("solver, drawn", [("euler", 1), ("midpoint", 2)])
@pytest.mark.parametrize("times", ["random", "equal"])
def test_flow_walking_loss_is_that_of_the_walk(solver, drawn, times):
    """The end of the walk through its times, α times flow matching, the KL of the logits."""
    torch.manual_seed(3)
    x0, x1, matrix, head = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    seen = []

    def velocity(x, t):
        seen.append(t)
        return torch.sin(x @ matrix + 3 * t)

    def logits(x):
        return x @ head

    options = {"solver": solver, "times": times, "alpha": 0.3, "logit_weight": 2, "token_power": 2}
    loss = train_fw.flow_walking_loss(velocity, x0, x1, SimpleNamespace(logits=logits), **options)
    t = seen[-1]
    straight = velocity((1 - t) * x0 + t * x1, t) - (x1 - x0)
    path = [0, seen[drawn], seen[2 * drawn], 1]
    if times == "equal":
        path = [0, 1 / 3, 2 / 3, 1]
    x1_hat = lft.integrate(velocity, x0, path, solver)
    error = ((x1_hat - x1) ** 2 + 0.3 * straight**2).mean(-1) / (x1**2).mean(-1)
    close(loss, error.mean() + 2 * kl_by_hand(logits(x1), logits(x1_hat)))  # it takes logits in single precision


# ---- Text
def read(place, held_out=False):
    """The documents of a text."""
    return [row["text"] for row in data.load_documents(str(place), held_out)]


def numbered(first, last):
    return [f"document number {i} of many" for i in range(first, last)]


def write(path, documents):
    """Rows with a column "text", or files of plain text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Dataset.from_dict({"text": documents})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix != ".txt":
        rows.to_json(path)
    else:
        for i, document in enumerate(documents):
            path.with_name(f"{i}.txt").write_text(document)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """One long document, which is cut into 100."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    lines = [f"def function_{i}(x):\n    return x + {i * i % 97}\n" for i in range(6000)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    """A folder of streamed rows, in two files of different sizes."""
    folder = tmp_path_factory.mktemp("stream")
    documents = [f"row {i} " * (20 + i % 7) for i in range(90)]
    write(folder / "0.jsonl", documents[:40])
    write(folder / "1.jsonl", documents[40:])
    return folder


@pytest.mark.parametrize("beginning", [[], [7]])
def test_documents_are_joined_by_end_of_text_and_cut(beginning):
    """Each window names the document it starts in; it starts with the beginning-of-text token if there is one."""

    def tokenizer(text, **options):
        return {"input_ids": text or beginning}

    tokenizer.bos_token_id = 7
    tokenizer.eos_token_id = 0
    found = data.pack({"text": [[1, 2, 3], [4], [5, 6, 7, 8, 9]]}, [5, 6, 7], tokenizer, 4 + len(beginning))
    assert found["document"] == [5, 6, 7]
    assert found["ids"] == [[*beginning, *ids] for ids in ([1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 9, 0])]


def test_a_document_is_on_one_side_in_every_text(tmp_path):
    """In a folder, in a part of it, and as rows; no document is on both sides, and about 1 in 20 is held out."""
    documents = numbered(0, 400)
    write(tmp_path / "all/0.txt", documents)
    write(tmp_path / "part/0.txt", documents[100:200])
    write(tmp_path / "rows.jsonl", documents)
    held_out = set(read(tmp_path / "all", held_out=True))
    trained = set(read(tmp_path / "all"))
    assert held_out | trained == set(documents) and not held_out & trained and 10 < len(held_out) < 35
    assert held_out == set(read(tmp_path / "rows.jsonl", held_out=True))
    assert held_out.intersection(documents[100:200]) == set(read(tmp_path / "part", held_out=True))


def test_a_book_is_cut_into_100_documents(book):
    """Nothing is lost."""
    cut = data.read_plain_text([book])["text"]
    assert "".join(cut) == book.read_text() and len(cut) == 100


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.jsonl.gz", "x.txt"])
def test_files_of_each_kind_are_read(tmp_path, name):
    """By a glob, and in a folder beside a README.md."""
    write(tmp_path / name, numbered(0, 60))
    (tmp_path / "README.md").write_text("not a document")
    for place in (tmp_path, tmp_path / name.replace("x", "*", 1)):
        assert {*read(place), *read(place, held_out=True)} == set(numbered(0, 60))


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_a_data_set_is_trained_on_its_training_split(tmp_path, held_out):
    """As data sets of the hub lie on disk."""
    for split, first in (("train", 0), ("test", 3), (held_out, 6)):
        write(tmp_path / f"data/{split}-00000-of-00001.parquet", numbered(first, first + 3))
    (tmp_path / "README.md").write_text("a card")
    assert read(tmp_path) == numbered(0, 3) and read(tmp_path, held_out=True) == numbered(6, 9)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.rst", "x.jsonl.zst", "missing.txt", "a/hub-set"])
def test_text_that_cannot_be_read_is_refused(tmp_path, monkeypatch, tokenizer, name):
    """Noise, an unknown suffix, a file or data set that is not there: one sentence that names the text."""
    monkeypatch.chdir(tmp_path)
    if name.startswith("x"):
        Path(name).write_bytes(random.Random(0).randbytes(9999))
    with pytest.raises(lft.InputError, match=f"--data {name}"):
        data.read_windows(name, tokenizer, 80)


def windows_of(places, tokenizer, n, **options):
    """The first n training windows, as lists of ids."""
    windows = data.training_windows([str(place) for place in places], tokenizer, 32, **options)
    return data.take(windows, n).tolist()


def test_training_windows_come_once_in_a_pass(book, stream, tokenizer):
    """Plain text is shuffled by the seed, rows keep their order."""
    for place in (book, stream):
        once = [window["ids"] for window in data.read_windows(str(place), tokenizer, 32)]
        n = len(once)
        passes = windows_of([place], tokenizer, 2 * n)
        assert n > 30 and sorted(passes[:n]) == sorted(once) and passes[n:] == passes[:n]
        assert (passes[:n] == once) == (place is stream)
    assert windows_of([book], tokenizer, 9, seed=1) != windows_of([book], tokenizer, 9)


def test_validation_and_test_are_halves_of_the_held_out_windows(monkeypatch):
    """A few windows are spread over their half; documents of two texts have different numbers."""
    found = Dataset.from_dict({"ids": [[i] for i in range(12)], "document": [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3]})
    monkeypatch.setattr(data, "read_windows", lambda *_, **__: found)
    ids, documents = data.held_out_windows(["a"], None, 1, 100, test=True)
    assert ids.flatten().tolist() == [6, 7, 8, 9, 10, 11] and documents.tolist() == [2, 2, 2, 2, 3, 3]
    ids, documents = data.held_out_windows(["a", "b"], None, 1, 6)
    assert ids.flatten().tolist() == [0, 2, 5, 0, 2, 5] and len(documents.unique()) == 4


# ---- Evaluation
@pytest.fixture
def split():
    """Test windows of 30 documents, validation windows, and windows to fit linear maps on."""
    ids = torch.randint(97, (300, 24), generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(test=ids[:60], documents=torch.arange(60) // 2, validation=ids[60:100], fit=ids[100:])


def test_flow_rows_equal_their_models(small, split):
    """The teacher, each solver at 1, 3 and the trained number of steps, and the span dropped."""
    rows = eval_kl.flow_rows(small, student_of(small, 1, 5, "midpoint", 5), split)
    names = [f"LFT {solver} x{k}" for solver in ("euler", "midpoint") for k in (1, 3, 5)]
    assert [row["name"] for row in rows] == ["teacher", *names, "span dropped"]
    assert [row.get("evaluations") for row in rows] == [None, 1, 3, 5, 2, 6, 10, None]
    assert rows[-1]["kl"] == approx(kl_of(small, lft.replace_span(small, 1, 5), split.test)) and rows[0]["kl"] == 0
    nll = F.cross_entropy(small(split.test).logits[:, :-1].mT, split.test[:, 1:])
    assert rows[0]["perplexity"] == approx(nll.exp().item())
    model = student_of(small, 1, 5, "midpoint", 3)
    x0, x1, context = lft.hidden_pair(lft.trunk_of(small, 5), split.test, 1)
    nmse = (model.flow(x0, **context) - x1).square().sum(-1) / x1.square().sum(-1)
    assert [rows[5]["kl"], rows[5]["nmse"]] == approx([kl_of(small, model, split.test), nmse.mean().item()])


def test_skips_are_chosen_on_validation_windows(small, split, monkeypatch):
    """The best place on validation windows, the mean over places and the first place, scored on test windows."""

    def evaluate(teacher, models, windows, title):
        kl = torch.tensor([0.1, 0.3, 0.8])
        if windows is split.validation:
            kl = torch.tensor([0.5, 0.2, 0.4])
        return {i: dict.fromkeys(("kl", "nll", "time"), kl[i - 1].repeat(60)) for i in models}

    monkeypatch.setattr(eval_kl, "evaluate", evaluate)
    rows, best = eval_kl.skip_rows(small, split, 1, 5, 2)
    assert best == 2 and [row["layers_replaced"] for row in rows] == ["2..3", "2 of 1..4", "1..2"]
    assert [row["kl"] for row in rows] == approx([0.3, 0.4, 0.1])


def test_linear_row_equals_least_squares(small, split):
    """Of x1 on [x0, 1] over the library's states, a token weighted by 1 / RMS(x1)."""
    row = eval_kl.linear_row(small, "linear", split, 2, 5, 1.0)
    x0 = call_of(layer_of(small, 2), small, split.fit)[0].flatten(0, 1)
    x1 = call_of(layer_of(small, 4), small, split.fit)[2].flatten(0, 1)
    root = x1.square().mean(-1, keepdim=True) ** -0.25  # the square root of each token's weight
    solution = torch.linalg.lstsq(root * F.pad(x0, (0, 1), value=1.0), root * x1).solution
    linear = eval_kl.LinearLayer(32, 32)
    linear.load_state_dict({"weight": solution[:-1].T, "bias": solution[-1]})
    assert row["kl"] == approx(kl_of(small, lft.replace_span(small, 2, 5, linear), split.test))


def test_standard_error_is_over_documents():
    """sqrt(n / (n - 1) Σ_documents (Σ_windows deviation)²) / windows; of one document there is none."""
    values = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.4, 0.3])  # of mean 0.4
    expected = (3 / 2 * (0.4**2 + 0.5**2 + 0.1**2)) ** 0.5 / 6
    assert eval_kl.standard_error(values, torch.tensor([7, 7, 7, 5, 5, 6])) == approx(expected)
    assert eval_kl.standard_error(values, torch.zeros(6)) is None


# ---- Training
@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    random_teacher(vocab_size=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def standard(teacher_folder, book):
    """Options of a short run."""
    return {"teacher": teacher_folder, "data": book, "start": 1, "end": 4, "max_steps": 3, "device": "cpu"}


def as_flags(options):
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags.append(flag if value is True else f"{flag}={value}")
    return flags


@pytest.fixture
def script(monkeypatch, capsys, standard):
    """Call a script's main as its command would, in float32. Returns what it printed, or checks its one-line error."""
    monkeypatch.setattr(loop, "autocast", lambda device: contextlib.nullcontext())

    def call(module, *args, refused=None, **options):
        if module is not eval_kl:
            options = {**standard, **options}
        monkeypatch.setattr(sys, "argv", ["script", *map(str, args), *as_flags(options)])
        if refused is None:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit, match="2"):
            run.run_script(module.main)
        last = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in last and refused in last

    return call


def trained(folder):
    """What a run's checkpoint holds: the velocity's weights and the optimizers' states."""
    velocity, *optimizers = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    return velocity, [optimizer["state"] for optimizer in optimizers]


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return lines


def test_scores_are_true(script, tmp_path, book, tokenizer):
    """The student in the folder has the KL that log and table say, on the text that they say."""
    script(train_fw, out=tmp_path, solver="euler", k=2, max_steps=2)
    student = eval_kl.load_student(tmp_path)
    teacher = random_teacher(vocab_size=4096)
    validation, _ = data.held_out_windows([str(book)], tokenizer, 32, 16_384)
    first, last = logged(tmp_path)
    assert last["validation_kl"] == approx(kl_of(teacher, student, validation))
    assert last["validation_kl"] < first["validation_kl"]
    printed = script(eval_kl, tmp_path, json=tmp_path / "table.json", no_baselines=True, tokens=512)
    test, _ = data.held_out_windows([str(book)], tokenizer, 32, 512, test=True)
    kl = kl_of(teacher, student, test)
    assert json.loads((tmp_path / "table.json").read_text())["rows"][2]["kl"] == approx(kl)
    for shown in ("2 of 2 steps, 512 tokens", f"{test.numel()} test tokens of {book}", f"{kl:.4f}"):
        assert shown in printed


def test_eval_reads_the_right_text(script, tmp_path, monkeypatch, book, tokenizer):
    """Maps are fitted on the training text, places chosen on the scored text; scoring another text needs no more."""
    own = shutil.copy(book, tmp_path / "own.txt")
    other = str(tmp_path / "other")
    write(tmp_path / "other/0.txt", numbered(0, 900))
    script(train_fw, out=tmp_path / "run", token_power=0.5, data=own, max_steps=1)
    called = []
    monkeypatch.setattr(eval_kl, "baseline_rows", lambda *args: called.extend(args) or [])
    script(eval_kl, tmp_path / "run", data=other, tokens=64)
    _, split, *rest = called
    assert rest == [1, 4, 0.5] and split.fit.tolist() == windows_of([own], tokenizer, 4096)
    equal(split.test, data.held_out_windows([other], tokenizer, 32, 64, test=True)[0])
    equal(split.validation, data.held_out_windows([other], tokenizer, 32, 64)[0])
    own.unlink()
    script(eval_kl, tmp_path / "run", data=other, tokens=64, no_baselines=True)


def test_loop_takes_a_step_by_hand(script, monkeypatch, tmp_path, book, tokenizer):
    """Gradient descent on the mean of micro-batches, the gradient clipped at norm 1."""
    monkeypatch.setattr(loop, "make_optimizers", lambda velocity: [torch.optim.SGD(velocity.parameters(), lr=0)])
    options = {"k": 1, "solver": "euler", "batch_size": 4, "accumulate": 2, "max_steps": 1, "token_power": 0}
    script(train_fw, out=tmp_path / "start", lr=0, **options)
    script(train_fw, out=tmp_path / "run", lr=0.5, **options)
    velocity = eval_kl.load_student(tmp_path / "start").flow.velocity.requires_grad_()
    ids = torch.tensor(windows_of([book], tokenizer, 4))
    x0, x1, context = lft.hidden_pair(lft.trunk_of(random_teacher(vocab_size=4096), 4), ids, 1)
    F.mse_loss(x0 + velocity(x0, 0.0, **context), x1).backward()
    norm = sum(weight.grad.square().sum() for weight in velocity.parameters()) ** 0.5
    assert norm > 2 and logged(tmp_path / "run")[1]["gradient_norm"] == approx(norm.item())
    for name, weight in velocity.named_parameters():
        close(trained(tmp_path / "run")[0][name], weight - 0.5 * weight.grad / norm)


def test_muon_trains_matrices_and_adamw_the_rest():
    """Muon 4 projections and a router; AdamW experts and modulation, and without decay biases and the one free norm."""
    velocity = lft.VelocityBlock(layer_of(random_teacher("mixtral"), 0))
    velocity.norm1.requires_grad_(False)
    muon, adamw = loop.make_optimizers(velocity)
    found = []
    for group in (*muon.param_groups, *adamw.param_groups):
        found.append((group["weight_decay"], [weight.ndim for weight in group["params"]]))
    assert found == [(0.01, [2] * 5), (0.01, [3, 3, 2, 2]), (0.0, [1, 1, 1])]


def test_seeds_steps_and_micro_batches_draw_their_own_times(script, monkeypatch, tmp_path):
    """And the same seed draws the same times again."""
    drawn = []

    def loss_of(velocity, x0, *args, **options):
        drawn.append(torch.rand(1).item())
        return velocity(x0, 0.0).mean()

    monkeypatch.setattr(train_fm, "flow_matching_loss", loss_of)
    for name, seed in enumerate((0, 1, 1)):
        script(train_fm, seed=seed, out=tmp_path / str(name), accumulate=2)
    assert len(set(drawn)) == 12 and drawn[6:12] == drawn[12:]


@pytest.mark.parametrize(
    "module, options, expected",
    [
        (train_fm, {"token_power": 0}, ["fm", 6, 12, "midpoint", 1]),
        (train_fw, {}, ["fw", 6, 18, "midpoint", 3]),
        (train_fw, {"k": 2, "solver": "euler", "times": "equal", "alpha": 0.5}, ["fw", 6, 18, "euler", 2]),
        (train_fw, {"logit_weight": 2, "token_power": 0}, ["fw", 6, 18, "midpoint", 3]),
    ],
)
def test_options_reach_the_loss_and_default_to_its_own(monkeypatch, module, options, expected):
    """The command line has the defaults of the loss's signature; the student walks as it was trained."""
    called = []
    monkeypatch.setattr(module, "train", lambda args, loss, solver, k: called.extend([args, loss, solver, k]))
    monkeypatch.setattr(sys, "argv", ["script", *as_flags(options)])
    module.main()
    args, loss, *how = called
    assert [args.method, args.start, args.end, *how] == expected
    assert (args.batch_size, args.lr, args.seed, args.init, args.accumulate) == (8, 1 / 64, 0, "middle", 1)
    for name, value in loss.keywords.items():
        assert value == options.pop(name, inspect.signature(loss.func).parameters[name].default)
    assert not options


def test_loss_gets_the_batch(script, tmp_path, monkeypatch, book, tokenizer):
    """ids, the layer's context, the step, and the logits of states entering layer `end`."""
    seen = []

    def loss_of(velocity, x0, x1, batch, **options):
        seen.append((x0, batch, batch.logits(x1)))
        return velocity(x0, 0.0).mean()

    monkeypatch.setattr(train_fw, "flow_walking_loss", loss_of)
    script(train_fw, max_steps=2, out=tmp_path)
    x0, batch, logits = seen[1]
    teacher = random_teacher(vocab_size=4096)
    layer = layer_of(teacher, 1)
    assert batch.step == 2 and batch.ids.tolist() == windows_of([book], tokenizer, 16)[8:]
    close(logits, teacher(batch.ids).logits)
    close(layer(x0, **batch.context), call_of(layer, teacher, batch.ids)[2])


@pytest.mark.parametrize("family", UNFIT)
def test_logits_of_teachers_that_rescale_embeddings(family):
    """Gemma does so inside the model, Granite divides its logits; after the last layer too."""
    teacher = random_teacher(family)
    for end in (3, 6):
        upper = lft.replace_span(teacher, 0, end, loop.GivenState())
        close(loop.logits_after(upper, lft.hidden_pair(lft.trunk_of(teacher, end), IDS, 0)[1]), teacher(IDS).logits)


@pytest.mark.parametrize("init, start, layer", [("first", 2, 2), ("middle", 1, 3), (5, 1, 5)])
def test_init_names_the_layer_to_start_from(script, tmp_path, init, start, layer):
    """first, middle or a number; the configuration keeps the number."""
    script(train_fm, start=start, end=6, init=init, max_steps=1, lr=0, out=tmp_path)
    expected = layer_of(random_teacher(vocab_size=4096), layer).mlp.dense_h_to_4h.weight
    equal(trained(tmp_path)[0]["mlp.dense_h_to_4h.weight"], expected)
    assert eval_kl.load_student(tmp_path).config.init == layer


@pytest.mark.parametrize("step, expected", [(1, 2 / 50), (25, 1 - 24 / 2000), (51, 2 - 0.05), (1001, 1), (2000, 0.001)])
def test_learning_rate_rises_shortly_and_falls_to_nothing(step, expected):
    """Over a fortieth of the steps, while it falls in a straight line."""
    assert loop.learning_rate(step, SimpleNamespace(lr=2.0, max_steps=2000)) == approx(expected)


def test_compiled_run_trains_the_same(script, tmp_path, monkeypatch):
    """The graphs of velocity and teacher, captured but not turned into machine code, against the plain run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for name, more in (("plain", {}), ("fast", {"compile": True})):
        script(train_fw, logit_weight=0.1, start=4, end=5, max_steps=2, out=tmp_path / name, **more)
    assert logged(tmp_path / "fast")[1] == approx(logged(tmp_path / "plain")[1])


# ---- Runs that stop and resume
def assert_equal_runs(one, two):
    """Equal weights and optimizers; each folder's student is its checkpoint's."""
    equal(trained(one), trained(two))
    for folder in (one, two):
        equal(eval_kl.load_student(folder).flow.velocity.state_dict(), trained(folder)[0])


def interrupted(loss_of, at, number):
    """The loss, which sends its process a signal at one of its calls."""
    calls = itertools.count(1)

    def loss(*args, **options):
        if next(calls) == at:
            signal.raise_signal(number)
        return loss_of(*args, **options)

    return loss


@pytest.mark.parametrize("number, streamed", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted_run_resumes_exactly(script, tmp_path, monkeypatch, number, streamed, stream, teacher_folder):
    """Bit for bit, over the end of a pass through the streamed text, with the teacher moved and the log torn."""
    handler = signal.getsignal(number)
    options = {"max_steps": 14, "save_every": 4, "accumulate": 2}
    if streamed:
        options["data"] = stream
    script(train_fw, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train_fw, "flow_walking_loss", interrupted(train_fw.flow_walking_loss, 13, number))
        script(train_fw, out=tmp_path / "part", **options)
    assert "7 of 14 steps" in script(eval_kl, tmp_path / "part", tokens=64, no_baselines=True)
    assert signal.getsignal(number) is handler
    with open(tmp_path / "part/log.jsonl", "a") as log:
        log.write('{"step": 8}\n{"step": 9, "tok')
    options["teacher"] = shutil.copytree(teacher_folder, tmp_path / "teacher")
    script(train_fw, out=tmp_path / "part", resume=True, **options)
    assert_equal_runs(tmp_path / "whole", tmp_path / "part")
    assert [line["step"] for line in logged(tmp_path / "part")] == [0, 4, 7, 8, 10, 12, 14]
    assert logged(tmp_path / "part")[-1] == logged(tmp_path / "whole")[-1]


@pytest.mark.parametrize("name, value", [("end", 3), ("init", 1), ("alpha", 0.3), ("seed", 1), ("seq_len", 16)])
def test_changed_options_are_refused_on_resume(script, tmp_path, name, value):
    """All but those that change no step."""
    script(train_fw, out=tmp_path, resume=True)
    script(train_fw, out=tmp_path, resume=True, refused=f"with {name} ", **{name: value})
    script(train_fw, out=tmp_path, resume=True, max_steps=4, save_every=1)
    assert logged(tmp_path)[-1]["step"] == 4


def test_changed_teacher_is_refused(script, tmp_path, teacher_folder):
    """On resume and in evaluation."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    script(train_fm, out=tmp_path / "run", teacher=folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("gelu", "relu"))
    script(train_fm, out=tmp_path / "run", teacher=folder, resume=True, refused="teacher_sha256")
    script(eval_kl, tmp_path / "run", refused="teacher_sha256")


def in_process(options, rank, world_size, at):
    """What a process of its own does: train_fw.py's main, with a Ctrl-C at one call of its loss."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT="29611")
    for module in (run, loop):
        module.RANK = rank
        module.WORLD_SIZE = world_size
    loop.autocast = lambda device: contextlib.nullcontext()
    train_fw.flow_walking_loss = interrupted(train_fw.flow_walking_loss, at, signal.SIGINT)
    sys.argv = ["script", *as_flags(options)]
    run.run_script(train_fw.main)


def start(options, rank=0, world_size=1, at=0):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lft"])  # so that each process has loaded the libraries already
    process = context.Process(target=in_process, args=(options, rank, world_size, at))
    process.start()
    return process


def assert_success(*processes):
    for process in processes:
        process.join(600)
        process.kill()  # one that hangs has no exit code
        assert process.exitcode == 0


def test_killed_run_resumes_exactly(standard, tmp_path):
    """kill -9 at random moments, while saving too, ends in the run that nobody killed."""
    kills = int(os.environ.get("KILLS", 2))
    options = {**standard, "batch_size": 1, "max_steps": 20 + 10 * kills, "save_every": 1, "resume": True}
    killed = {**options, "out": tmp_path / "killed"}
    for _ in range(kills):
        process = start(killed)
        time.sleep(random.uniform(0.5, 3))
        process.kill()
        process.join()
    assert_success(start(killed), start({**options, "out": tmp_path / "whole"}))
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def test_two_processes_equal_the_joint_batch_and_resume_exactly(script, standard, tmp_path, stream):
    """With one Euler step Flow Walking draws no times. Streamed, one of two files ends before the other."""
    options = {**standard, "k": 1, "solver": "euler", "lr": 0.001, "accumulate": 2}
    script(train_fw, **options, out=tmp_path / "one")

    def run_two(out, at=0, **more):
        both = {**options, "out": tmp_path / out, **more}
        assert_success(start(both, 0, 2), start(both, 1, 2, at))

    run_two("two")
    assert logged(tmp_path / "two")[-1] == approx(logged(tmp_path / "one")[-1])
    options.update(data=stream, batch_size=32, max_steps=8)
    run_two("whole")
    run_two("half", at=13)
    run_two("half", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "half")


# ---- Mistakes and accidents
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch):
    """Before its step is taken; the last checkpoint stays."""
    calls = itertools.count(1)

    def loss_of(velocity, x0, *args, **options):
        return velocity(x0, 0.0).mean() / (next(calls) != 5)

    monkeypatch.setattr(train_fm, "flow_matching_loss", loss_of)
    script(train_fm, out=tmp_path, max_steps=6, save_every=3, refused="step 5 gave {'loss'")
    assert eval_kl.load_student(tmp_path).config.training["steps"] == 3


@pytest.mark.parametrize("size, step", [(20_000, 1), (900_000, 2)])
def test_full_disk_keeps_a_checkpoint_and_leaves_no_stale_model(script, tmp_path, monkeypatch, size, step):
    """The disk is full at step 2, for the checkpoint or, after it, for the student; --resume goes on."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = run.Run.save

    def save_on_a_full_disk(self, step):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))  # of each file
        try:
            save(self, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", save_on_a_full_disk)
        script(train_fm, out=tmp_path, save_every=1, refused="")
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == step
    if step == 2:
        script(eval_kl, tmp_path, refused="--resume")
    script(train_fm, out=tmp_path, resume=True)
    assert eval_kl.load_student(tmp_path).config.training["steps"] == 3


@pytest.mark.parametrize(
    "options, word",
    [
        ({"end": 7}, "6 layers"),
        ({"teacher": "no-such/model"}, "no-such/model"),
        ({"teacher": "gpt2"}, "gpt2"),
        ({"teacher": "shallow"}, "unexpected"),
        ({"data": "no-such/set"}, "--data no-such/set"),
        ({"seq_len": 65}, "64 positions"),
        ({"batch_size": 3, "accumulate": 2}, "multiple"),
        ({"out": "gpt2"}, "gpt2 is not empty"),
        ({"out": "gpt2", "resume": True}, "gpt2 is not empty"),
        ({"out": "gpt2/config.json"}, "config.json"),
        ({"init": "last"}, "--init last"),
        ({"k": 0}, "--k"),
    ],
)
def test_mistake_in_training_ends_in_one_sentence(script, tmp_path, monkeypatch, teacher_folder, options, word):
    """And changes no file."""
    monkeypatch.chdir(tmp_path)
    for name in ("shallow", "gpt2"):
        shutil.copytree(teacher_folder, name)
    config = Path("shallow/config.json")
    config.write_text(config.read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 5'))
    sizes = transformers.GPT2Config(vocab_size=4096, n_embd=32, n_head=4, n_layer=6)
    transformers.GPT2LMHeadModel(sizes).save_pretrained("gpt2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    script(train_fw, **options, refused=word)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
