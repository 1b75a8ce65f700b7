"""Tests of the five scripts, each against an independent truth: a closed form, the library's own output or a loop by hand.

    python -m pytest -q test_lft.py

KILLS=50 in the environment makes `test_killed_run_resumes_exactly` kill its run that often (default 4).
"""
import contextlib, copy, functools, gzip, inspect, itertools, json, math, multiprocessing, os, random, re, resource  # noqa: E401
import shutil, signal, socket, subprocess, sys, sysconfig, textwrap, threading, time  # noqa: E401
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test waits for the network

import pytest
import torch
import transformers
import zstandard
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import data
import eval_kl
import lft
import train_fm
import train_fw

HERE = Path(__file__).parent
GQA = {"num_key_value_heads": 2}
FAMILIES = {
    "neox": ("GPTNeoX", {}), "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}), "qwen2": ("Qwen2", GQA),
    "llama": ("Llama", GQA | {"tie_word_embeddings": True}), "mistral": ("Mistral", GQA | {"sliding_window": 8}),
    "qwen3": ("Qwen3", GQA | {"head_dim": 16}), "phi3": ("Phi3", GQA), "starcoder2": ("Starcoder2", GQA), "olmo": ("Olmo", GQA),
}  # fmt: skip
EXPERTS = GQA | {"head_dim": 8, "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2}
UNFIT = {  # each with the first of the layers 1, 2, 3 that does not fit
    "gemma2: norms after the branches": ("Gemma2", GQA | {"head_dim": 8}, 1),
    "granite: a scaled residual": ("Granite", {"residual_multiplier": 0.5}, 1),
    "qwen3-moe: experts in every other layer": ("Qwen3Moe", EXPERTS, 2),
}

def random_teacher(family="neox", **options):
    """A small model with random weights, large enough that every part of a layer matters."""
    name, more = (FAMILIES | UNFIT)[family][:2]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    others = {"max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes | others | more | options))
    for name, weight in teacher.eval().requires_grad_(False).named_parameters():
        if name.endswith("bias") or "norm" in name:  # the library starts them at 0 and 1, where mistakes do not show
            weight += 0.2 * torch.randn_like(weight)
    return teacher

@torch.no_grad()
def randomize(velocity):
    """Make all weights of a velocity matter: its gates and shifts start at zero."""
    torch.manual_seed(1)
    for weight in velocity.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return velocity.eval()

def student_of(teacher, start, end, solver="midpoint", k=1):
    """A student with a random flow."""
    torch.manual_seed(2)
    student = lft.LFTForCausalLM(lft.LFTConfig(teacher.config.to_dict(), start, end, solver, k, "a teacher"), teacher)
    randomize(student.flow.velocity)
    return student.eval().requires_grad_(False)

def layers_of(model):
    return model.get_decoder().layers

def call_of(layer, model, ids):
    """What the library calls a layer with, and what it returns: state, context, output."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, context, out: seen.append((args[0], context, out)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]

def double_kl(teacher_logits, logits):
    """KL(teacher || student) of each token, in double precision."""
    p, q = (each.double().softmax(-1) for each in (teacher_logits, logits))
    return (p * (p / q).log()).sum(-1)

def is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
SMALL = random_teacher()
TOKENIZER = lft.load_teacher("tiny_teacher")[1]
IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))

# ---- The velocity, the training pair, the solvers

@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_starts_as_the_layer(family):
    teacher = random_teacher(family)
    for number, t in ((0, 0.0), (2, 0.37), (5, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))):
        x, context, expected = call_of(layers_of(teacher)[number], teacher, IDS)
        close(x + lft.VelocityBlock(layers_of(teacher)[number])(x, t, **context), expected, atol=1e-5)

@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_velocity_is_the_formula(family):
    """α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2), with one time per sequence."""
    teacher, times = random_teacher(family), [0.1, 0.3, 0.9]
    layer = layers_of(teacher)[2]
    velocity = lft.VelocityBlock(layer)
    first, _, last = randomize(velocity.time_mlp)
    x, context, _ = call_of(layer, teacher, IDS)
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        angles = t * torch.tensor([1000 ** (i / 63) for i in range(64)])
        hidden = torch.nn.functional.silu(first.weight @ torch.cat([torch.sin(angles), torch.cos(angles)]) + first.bias)
        b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
        attention = a1 * layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
        y = x if family == "neox" else x + attention
        expected = attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(y) + b2)
        close(velocity(x, t, **context), expected, atol=1e-3, rtol=1e-3)  # sin(1000 t) in single precision
        close(together[i], expected[i], atol=1e-3, rtol=1e-3)
        assert (together[i - 1] - expected[i - 1]).abs().max() > 0.1  # time matters

@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_pair_equals_library_states(family):
    teacher = random_teacher(family)
    norm = getattr(teacher.get_decoder(), "final_layer_norm" if "neox" in family else "norm")
    states = teacher(IDS, output_hidden_states=True).hidden_states
    for start, end in ((0, 1), (1, 4), (2, 6), (0, 6)):
        x0, x1, _ = lft.hidden_pair(lft.trunk_of(teacher, end), IDS, start)
        assert torch.equal(x0, states[start])
        assert torch.equal(x1 if end < 6 else norm(x1), states[end])  # the library's last state is after the norm

@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solver_order(solver, order):
    velocity, errors = lambda x, t: (1 + 2 * t) * x, []  # solved by x(t) = x(0) exp(t + t²)
    for k in (64, 128, 256):
        x1 = lft.integrate(velocity, torch.ones(1, dtype=torch.float64), [i / k for i in range(k + 1)], solver)
        errors.append(abs(x1.item() - math.exp(2)))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)

# ---- The span replaced

@pytest.mark.parametrize("family", ["neox", "mistral", "qwen2"])
def test_skip_equals_rebuilt_model(family):
    teacher, how = random_teacher(family), {"max_new_tokens": 4, "do_sample": False}
    for start, end in ((0, 2), (2, 5), (4, 6)):
        rebuilt = random_teacher(family, num_hidden_layers=6 - (end - start))
        rebuilt.load_state_dict({name: w for name, w in teacher.state_dict().items() if ".layers." not in name}, strict=False)
        for new, old in enumerate([*range(start), *range(end, 6)]):
            layers_of(rebuilt)[new].load_state_dict(layers_of(teacher)[old].state_dict())
        skipping = lft.replace_span(teacher, start, end)
        assert torch.equal(skipping(IDS).logits, rebuilt(IDS).logits) and skipping.config.to_dict() == rebuilt.config.to_dict()
        assert torch.equal(skipping.generate(IDS, **how), rebuilt.generate(IDS, **how))

def test_teacher_is_shared_and_untouched():
    teacher = random_teacher()
    before, logits, layers = copy.deepcopy(teacher.state_dict()), teacher(IDS).logits, list(layers_of(teacher))
    student = student_of(teacher, 1, 4, "euler", 2)
    expected = student(IDS).logits
    assert is_equal(before, teacher.state_dict()) and torch.equal(teacher(IDS).logits, logits)
    assert [*layers_of(teacher)] == layers and teacher.config.num_hidden_layers == 6
    assert [layer.attention.layer_idx for layer in layers] == [*range(6)]
    theirs = {id(weight) for weight in teacher.parameters()}
    own = {id(weight) for weight in student.parameters()} - theirs
    assert own == {id(weight) for weight in student.flow.velocity.parameters()}
    teacher.set_attn_implementation("eager")  # its masks mean something else: a flow that followed would see the future
    assert torch.equal(student(IDS).logits, expected)

@pytest.mark.parametrize("end", [4, 6])
@pytest.mark.parametrize("solver, k", [("midpoint", 3), ("euler", 2)])
def test_student_equals_a_walk_by_hand(solver, k, end):
    """The flow in k equal steps, as its configuration says at the moment, then the layers after the span."""
    student = student_of(SMALL, 2, end)
    student.config.solver, student.config.k = solver, k
    x, context, _ = call_of(layers_of(SMALL)[2], SMALL, IDS)
    states = [*SMALL(IDS, output_hidden_states=True).hidden_states[:3]]
    for i in range(k):
        slope = student.flow.velocity(x, i / k, **context)
        if solver == "midpoint":
            slope = student.flow.velocity(x + slope / (2 * k), (i + 0.5) / k, **context)
        x = x + slope / k
    for layer in layers_of(SMALL)[end:]:
        states.append(x)
        x = layer(x, **context)
    states.append(SMALL.gpt_neox.final_layer_norm(x))
    output = student(IDS, output_hidden_states=True)
    close(output.logits, student.get_output_embeddings()(states[-1])), close(output.hidden_states, tuple(states))
    half = copy.deepcopy(student).to(torch.bfloat16)(IDS).logits
    assert half.dtype == torch.bfloat16 and (half - output.logits).norm() < 0.1 * output.logits.norm()

# ---- The KV cache

class TwoAttentions(lft.VelocityBlock):
    """A velocity of two blocks, one after the other."""

    def __init__(self, layer):
        super().__init__(layer)
        self.second = lft.VelocityBlock(layer)

    def forward(self, x, t, **context):
        first = super().forward(x, t, **context)
        return first + self.second(x + first, t, **context)

def cached_logits(model, cache):
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split([11, 1, 1, 7], dim=1)], 1)

@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached(family):
    teacher = random_teacher(family)
    for start, end, solver, k in ((1, 5, "midpoint", 2), (0, 1, "midpoint", 3), (4, 6, "euler", 8), (2, 6, "euler", 1)):
        student = student_of(teacher, start, end, solver, k)
        by_default, expected = student(IDS[:, :11]).past_key_values, student(IDS, use_cache=False).logits
        close(student(IDS[:, 11:], past_key_values=by_default).logits, expected[:, 11:])
        for cache in (DynamicCache(config=student.config.get_text_config()), DynamicCache()):
            close(cached_logits(student, cache), expected)
            for change in ({"k": k + 1}, {"solver": "euler" if solver == "midpoint" else "midpoint", "k": k}):
                vars(student.config).update(change)
                with pytest.raises(lft.InputError, match="start a new one"):
                    student(IDS, past_key_values=cache)
            vars(student.config).update(solver=solver, k=k)

@pytest.mark.parametrize("growing", [False, True])
def test_two_flows_and_two_attentions_cache_right(growing):
    velocities = [randomize(velocity(layers_of(SMALL)[4])) for velocity in (TwoAttentions, lft.VelocityBlock)]
    late, early = (lft.FlowLayer(velocity, "midpoint", 2) for velocity in velocities)
    model = lft.replace_span(lft.replace_span(SMALL, 3, 5, late), 0, 2, early).eval()
    cache = DynamicCache() if growing else DynamicCache(config=model.config)
    close(cached_logits(model, cache), model(IDS, use_cache=False).logits)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * (4 + 7 + 3)

@pytest.mark.parametrize("family, how", [
    ("neox", {"num_beams": 3}), *itertools.product(["neox", "mistral", "qwen3"], [{}, {"cache_implementation": "static"}]),
])  # fmt: skip
def test_generated_text_equals_uncached(family, how):
    """A padded batch with a cache, against each of its sequences alone, without padding and without a cache."""
    teacher, how = random_teacher(family), how | {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 4, "midpoint", 2, [20, 13, 5])):
        mask = torch.stack([torch.arange(20) >= 20 - n for n in lengths]).long()
        student, without = student_of(teacher, start, end, solver, k), how | {"use_cache": False, "cache_implementation": None}
        text = student.generate(IDS * mask, attention_mask=mask, **how)
        for row, n in enumerate(lengths):
            assert torch.equal(text[row, 20 - n :], student.generate(IDS[row : row + 1, 20 - n :], **without)[0])

@pytest.mark.parametrize("family", ["neox", "mistral"])  # Mistral's window of 8 tokens is full when drafting begins
def test_drafting_keeps_the_text(family):
    teacher, how = random_teacher(family), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for solver, k in (("euler", 1), ("midpoint", 2)):
        student = student_of(teacher, 2, 6, solver, k)
        close_to_it = lft.replace_span(student.model, 3, 3 + 0 + 0) if False else lft.replace_span(teacher, 4, 5)
        for row in IDS.split(1):
            assert torch.equal(teacher.generate(row, assistant_model=student, **how), teacher.generate(row, **how))
            assert torch.equal(student.generate(row, assistant_model=close_to_it, **how), student.generate(row, **how))

def test_two_threads_do_not_mix_their_caches():
    """Both threads are held at every evaluation of the velocity until the other arrives."""
    student, barrier, texts = student_of(SMALL, 1, 5, "midpoint", 2), threading.Barrier(2, timeout=60), {}
    generate = lambda row: student.generate(IDS[row : row + 1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = [generate(row) for row in (0, 1)]
    student.flow.velocity.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])
    threads = [threading.Thread(target=lambda row=row: texts.update({row: generate(row)})) for row in (0, 1)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(texts[row], expected[row]) for row in (0, 1)) and not torch.equal(*expected)

# ---- The teacher and the saved student

@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A small random teacher as a folder, with the tokenizer of tiny_teacher."""
    folder, teacher = tmp_path_factory.mktemp("teacher"), random_teacher(vocab_size=2048)
    teacher.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 5], repetition_penalty=1.3, max_new_tokens=9)
    teacher.save_pretrained(folder), TOKENIZER.save_pretrained(folder)
    return folder

def edit_weights(folder, edit):
    weights = load((folder / "model.safetensors").read_bytes())  # not mapped, since the file is replaced
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))

@pytest.mark.parametrize("vocabulary, eos", [(2048, "<|endoftext|>"), (2047, "<|endoftext|>"), (2048, None)])
def test_teacher_is_loaded_frozen_or_its_tokenizer_refused(tmp_path, vocabulary, eos):
    random_teacher(vocab_size=vocabulary).half().save_pretrained(tmp_path), TOKENIZER.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(eos_token=eos))
    if vocabulary < 2048 or not eos:
        with pytest.raises(lft.InputError, match="tokenizer"):
            lft.load_teacher(str(tmp_path))
    else:
        teacher, _ = lft.load_teacher(str(tmp_path))
        assert {(w.dtype, w.requires_grad) for w in teacher.parameters()} == {(torch.float32, False)} and not teacher.training

def test_integer_weights_are_refused_and_quantization_config_dropped(teacher_folder, monkeypatch):
    teacher, report = random_teacher(vocab_size=2048), {"missing_keys": set(), "unexpected_keys": set()}
    teacher.config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(lft.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (teacher, report))
    assert "quantization_config" not in lft.load_teacher(str(teacher_folder))[0].config.to_dict()
    layers_of(teacher)[3].mlp.dense_h_to_4h.weight.data = torch.ones(64, 32, dtype=torch.int8)
    with pytest.raises(lft.InputError, match="integers"):
        lft.load_teacher(str(teacher_folder))

def test_layers_that_do_not_fit_are_refused_by_number():
    for family in FAMILIES:
        lft.check_layers(random_teacher(family), [1, 2, 3, 5])
    for family, (_, _, number) in UNFIT.items():
        with pytest.raises(lft.InputError, match=f"layer {number} of"):
            lft.check_layers(random_teacher(family), [1, 2, 3])

@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_loads_the_same(family, tmp_path):
    student = student_of(random_teacher(family), 1, 5, "midpoint", 2)
    student.save_pretrained(tmp_path)
    again = lft.LFTForCausalLM.from_pretrained(tmp_path)
    close(again(IDS).logits, student(IDS).logits, atol=1e-5)
    assert is_equal(student.state_dict(), again.state_dict())
    if family == "llama":  # its embeddings are tied: stored once, and one tensor again after loading
        assert sum(weight.shape[0] == 97 for weight in load_file(tmp_path / "model.safetensors").values()) == 1
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

# ---- The losses

def recorder(velocity, times):
    """The velocity, noting the times that it is evaluated at."""
    return lambda x, t: times.append(t) or velocity(x, t)

def uniform(times):
    """Kolmogorov's test that times are uniform on [0, 1], at a level of 1 %."""
    return (times.sort().values - torch.arange(1, len(times) + 1) / len(times)).abs().max() < 1.63 / len(times) ** 0.5

def test_flow_matching_where_paths_cross_learns_the_conditional_mean():
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 400_000, 1, 1, dtype=torch.float64)  # independent: x_t tells little of where it came from
    # Given x_t, x1 - x0 has mean (2t-1) x_t / (t²+(1-t)²) and variance 1 / (t²+(1-t)²): on average π/2.
    loss = train_fm.flow_matching_loss(lambda x, t: (2 * t - 1) * x / (t**2 + (1 - t) ** 2), x0, x1, token_power=0)
    assert loss.item() == pytest.approx(math.pi / 2, rel=0.01)

def test_times_are_uniform_and_one_per_sequence():
    x0, seen, times = torch.zeros(20_000, 2, 1), [], []
    torch.manual_seed(0)
    train_fm.flow_matching_loss(lambda x, t: seen.append((x, t)) or x, x0, x0 + 1)
    ((x, t),) = seen
    assert torch.equal(x, t.expand_as(x)) and uniform(t.flatten())  # x_t on the path from 0 to 1 is t itself
    train_fw.flow_walking_loss(recorder(lambda x, t: x, times), x0, x0 + 1, k=4, solver="euler")
    zero, inner = times[0], torch.cat([t.view(1, 20_000) for t in times[1:]])
    assert zero == 0 and (inner.diff(dim=0) > 0).all() and inner.mean(dim=1).tolist() == pytest.approx([1 / 4, 1 / 2, 3 / 4], abs=0.01)
    assert uniform(inner[torch.randint(3, (20_000,)), torch.arange(20_000)])  # one of the three, at random

@pytest.mark.parametrize("loss_of", [train_fm.flow_matching_loss, train_fw.flow_walking_loss])
def test_zero_state_gives_a_finite_loss(loss_of):
    x0, x1 = torch.randn(2, 2, 5, 8)
    x1[0, 2] = 0
    weight = torch.ones(8, requires_grad=True)
    loss = loss_of(lambda x, t: weight * x, x0, x1)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and eval_kl.token_errors(x0 - x1, x1, 2).isfinite().all()

@pytest.mark.parametrize("k, solver, alpha, logit_weight, power", [
    (1, "euler", 0.0, 0.0, 1.0), (3, "euler", 0.3, 0.0, 0.0), (1, "midpoint", 0.0, 2.0, 0.5), (4, "midpoint", 0.5, 0.1, 2.0),
])  # fmt: skip
def test_flow_walking_equals_a_loop_by_hand(k, solver, alpha, logit_weight, power):
    """Value and gradient in double precision, one sequence after another, at the times that the loss drew."""
    torch.manual_seed(3)
    x0, x1, matrix, head = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    matrix.requires_grad_(True)
    velocity, logits, times = lambda x, t: torch.sin(x @ matrix + 3 * t), lambda x: x @ head[0], []
    given = {"k": k, "solver": solver, "alpha": alpha, "logit_weight": logit_weight, "token_power": power}
    loss, by_hand = train_fw.flow_walking_loss(recorder(velocity, times), x0, x1, logits, **given), 0
    per_step = 1 + (solver == "midpoint")
    assert len(times) == k * per_step + bool(alpha)
    squared = lambda error: (error**2).mean(-1) / (x1**2).mean(-1).sqrt() ** power
    walked = []
    for i in range(3):
        x, ends = x0[i], [0.0, *(t[i].item() for t in times[per_step : k * per_step : per_step]), 1.0]
        for t, s in itertools.pairwise(ends):
            slope = torch.sin(x @ matrix[i] + 3 * t)
            if solver == "midpoint":
                slope = torch.sin((x + (s - t) / 2 * slope) @ matrix[i] + 3 * (s + t) / 2)
            x = x + (s - t) * slope
        walked.append(x)
    by_hand = squared(torch.stack(walked) - x1).mean() + logit_weight * double_kl(logits(x1), logits(torch.stack(walked))).mean()
    if alpha:
        by_hand = by_hand + alpha * squared(velocity((1 - times[-1]) * x0 + times[-1] * x1, times[-1]) - (x1 - x0)).mean()
    close(loss, by_hand)  # the loss takes logits and times in single precision
    close(*(torch.autograd.grad(value, matrix)[0] for value in (loss, by_hand)))

# ---- Text

class Letters:
    """A tokenizer that a test can read: one token per letter."""

    eos_token_id = 0

    def __call__(self, texts, verbose=False):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

def letters(rows):
    """The text of rows, with | for the end of a document."""
    return "".join(chr(token) for row in rows for token in row["ids"]).replace("\0", "|")

def text_at(place, held_out=False, **more):
    return letters(data.token_rows(str(place), Letters(), 1, held_out, **more))

def write_text(path, content):
    """Rows with a column "text", given as a list, or plain text; compressed if the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return data.Dataset.from_dict({"text": content}).to_parquet(path)
    if isinstance(content, list):
        content = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in content)
    path.write_bytes({".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix.lower(), bytes)(content.encode()))

SOURCE = inspect.getsource(textwrap)  # a text that is quickly read

@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SOURCE)
    return path

@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    """A folder of streamed rows: two files of different sizes, with documents of different lengths."""
    folder, words, places = tmp_path_factory.mktemp("stream"), SOURCE.split(), [n * n for n in range(6, 40)]
    texts = [" ".join(words[low:high]) for low, high in itertools.pairwise(places)]
    write_text(folder / "0.jsonl.zst", texts[:16]), write_text(folder / "1.jsonl.zst", texts[16:])
    return folder

def test_documents_are_joined_by_end_of_text_and_cut():
    rows = data.pack({"text": ["abc", None, "", "defgh", "ij"]}, [5, 6, 7, 8, 9], Letters(), 4, (0, 1))
    assert letters({"ids": ids} for ids in rows["ids"]) == "abc|defgh|ij" and rows["document"] == [5, 8, 8]

def test_stdlib_split_stays_the_same():
    """tiny_teacher has never seen the held-out files: another split would score it on what it was trained on."""
    train, held_out = (list(data.stdlib_texts(part)) for part in (False, True))
    assert not set(train) & set(held_out) - {""} and 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    assert not any("class TestCase(unittest.TestCase" in text for text in train + held_out)
    in_held_out = lambda name: Path(sysconfig.get_path("stdlib"), name).read_text() in held_out
    names = ("argparse.py", "dataclasses.py", "heapq.py", "asyncio/events.py", "codecs.py", "email/parser.py")
    assert [*map(in_held_out, names)] == [False] * 3 + [True] * 3

A, B, C, D = "a" * 190, "b" * 10, "c" * 95, "d" * 5  # the last twentieth of each document is held out
PLAIN, ROWS, BOTH = {"1.txt": A + B, "2.md": C + D}, [A + B, None, C + D], (f"{A}|{C}|", f"{B}|{D}|")

@pytest.mark.parametrize("files, place, train, held_out", [
    (PLAIN, "", *BOTH), (PLAIN, "*.*", *BOTH), (PLAIN, "2.md", f"{C}|", f"{D}|"), ({"train.py": A + B, "test.py": C + D}, "", *BOTH),
    ({"x.jsonl": ROWS, "b/notes[1].txt": A + B, "b/c.PY": C + D}, "b", *BOTH), ({"n[1].txt": A + B}, "n[1].txt", f"{A}|", f"{B}|"),
    ({"n[1]/1.txt": A + B, "1.txt": C + D}, "n[1]", f"{A}|", f"{B}|"), ({"1.txt.gz": A + B, "2.txt.zst": C + D}, "", *BOTH),
    ({"1.TXT.GZ": A + B}, "1.TXT.GZ", f"{A}|", f"{B}|"), ({"x.JSONL": ROWS}, "x.JSONL", *BOTH), ({"x.jsonl.gz": ROWS}, "", *BOTH),
    ({"x[1].jsonl": ROWS}, "x[1].jsonl", *BOTH), ({"x.parquet": ROWS}, "x.parquet", *BOTH), ({"x.jsonl.zst": ROWS}, "*.zst", *BOTH),
    ({"train.jsonl": ROWS[:2], "test.jsonl": ROWS[2:], "dune.json": ROWS[:1]}, "", f"{A}|{A}|{C}|", f"{B}|{B}|{D}|"),
    ({"x.csv": f"id,text\n1,{A + B}\n2,\n3,{C + D}\n"}, "x.csv", *BOTH),
    ({"train/1.jsonl.zst": ["ab", "cd"], "train/2.jsonl.zst": ["e"], "val.jsonl.zst": ["fg"], "test.jsonl.zst": ["h"]}, data.PILE,
     "ab|cd|e|", "fg|"),
    ({"train.jsonl": ["ab"], "validation.jsonl": ["cd"], "test.jsonl": ["ef"]}, "hub/set", "ab|", "cd|"),
    ({"train.jsonl": ["ab"], "test.jsonl": ["ef"]}, "hub/set", "ab|", "ef|"), ({"train.jsonl": [A + B]}, "hub/set", f"{A}|", f"{B}|"),
])  # fmt: skip
def test_text_is_read_by_document_and_split(tmp_path, monkeypatch, files, place, train, held_out):
    for name, content in files.items():
        write_text(tmp_path / name, content)
    load_dataset, on_hub = data.load_dataset, {data.PILE: str(tmp_path), "hub/set": str(tmp_path)}
    monkeypatch.setattr(data, "load_dataset", lambda path, *args, **more: load_dataset(on_hub.get(path, path), *args, **more))
    place = place if place in on_hub else tmp_path / place
    for part, expected in ((False, train), (True, held_out)):
        assert sorted(text_at(place, part).split("|")) == sorted(expected.split("|"))
    numbers = [number for number, _ in itertools.groupby(data.token_rows(str(place), Letters(), 1), lambda row: row["document"])]
    assert numbers == sorted(set(numbers)) and len(numbers) == train.count("|")

def test_symlinked_files_count_once(tmp_path):
    write_text(tmp_path / "folder" / "1.txt", A + B)
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder"), (tmp_path / "folder" / "2.txt").symlink_to("1.txt")
    assert text_at(tmp_path / "folder") == text_at(tmp_path / "folder" / "**") == f"{A}|"

NOISE = b"\x89PNG\xff\xfe\x00" * 999

@pytest.mark.parametrize("name, content", [
    ("x.txt", b""), ("x.txt", NOISE), ("x.jsonl", b""), ("x.jsonl", NOISE), ("x.jsonl", b'{"content": "no column text"}'),
    ("x.rst", b"unknown suffix" * 99), ("x.ndjson", b'{"text": "unknown suffix"}' * 99), ("x.parquet", b"PAR1" * 9),
    ("x.jsonl.gz", gzip.compress(os.urandom(9999))[:5000]), ("x.jsonl.zst", zstandard.compress(b'{"text": "ab"}' * 99)[:-9]),
    ("x.txt.gz", gzip.compress(os.urandom(9999))[:5000]), ("x.txt.zst", zstandard.compress(b"abcd" * 99)[:-9]),
    ("*", b"text of one kind, beside a file of another"), ("*/README.rst", b"text beside a file of an unknown kind"),
])  # fmt: skip
def test_corrupt_unknown_or_mixed_text_is_refused(tmp_path, name, content):
    if "*" in name:
        write_text(tmp_path / "1.txt", A + B), write_text(tmp_path / name.replace("*", "2.json"), "{}")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(lft.InputError, match="one kind" if "*" in name else "--data"):
        data.token_rows(str(tmp_path if "*" in name else tmp_path / name), Letters(), 80)

@pytest.mark.parametrize("streamed", [False, True])
def test_training_rows_come_once_in_a_pass(text, stream, streamed):
    rows_of = lambda place, seed=0, **more: (row["ids"] for row in data.training_rows(str(place), TOKENIZER, 32, seed, **more))
    taken = lambda n, *args, **more: [*itertools.islice(rows_of(*args, **more), n)]
    place = stream if streamed else text
    everything = [row["ids"] for row in data.token_rows(str(place), TOKENIZER, 32)]
    one, n = taken(len(everything), place), len(everything)
    assert n > 30 and sorted(one) == sorted(everything) and taken(2 * n, place) == one * 2
    assert streamed or (one != everything and taken(n, place, seed=1) != one)  # plain text is shuffled
    if streamed:  # of two files each process reads one
        parts = [text_at(place, rank=rank, world_size=2) for rank in (0, 1)]
        assert "".join(parts) == text_at(place) and min(map(len, parts)) > 1000
        place, one = stream / "1.jsonl.zst", taken(n, stream / "1.jsonl.zst")
    shares = [taken(n // 8, place, rank=rank, world_size=2) for rank in (0, 1)]  # every other row
    assert [*itertools.chain(*zip(*shares))] == one[: n // 8 * 2]

@pytest.mark.parametrize("streamed", [False, True])
def test_place_in_the_text_is_kept(text, stream, streamed):
    place = str(stream if streamed else text)
    n, rows = len([*data.token_rows(place, TOKENIZER, 32)]), data.training_rows(place, TOKENIZER, 32)
    taken, states = zip(*((row["ids"], json.dumps(rows.state_dict())) for row in itertools.islice(rows, n + 90)))
    for after in (0, 1, 40, n - 2, n - 1, n, n + 20):
        again = data.training_rows(place, TOKENIZER, 32)
        again.load_state_dict(json.loads(states[after]))
        assert tuple(row["ids"] for row in itertools.islice(again, 60)) == taken[after + 1 : after + 61]

@pytest.mark.parametrize("lengths", [[9], [1, 1], [5, 1, 6, 2, 2], [3] * 10])
def test_validation_and_test_share_at_most_one_document(lengths):
    n, documents = sum(lengths), torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    halves = [data.split_half(torch.arange(n * 4).view(n, 4), documents, 10**6, test=test) for test in (False, True)]
    assert torch.equal(torch.cat([ids for ids, _ in halves]), torch.arange(n * 4).view(n, 4)) and abs(len(halves[0][0]) * 2 - n) < 2
    assert len(set(halves[0][1].tolist()) & set(halves[1][1].tolist())) <= 1
    few, _ = data.split_half(torch.arange(800).view(200, 4), torch.arange(200), 40, test=True)  # ten rows, spread over the half
    assert few[:, 0].tolist() == pytest.approx([400 + 44 * i for i in range(10)], abs=4) and few[-1, 0] == 796
    with pytest.raises(lft.InputError, match="two held-out rows"):
        data.split_half(torch.zeros(1, 4), torch.zeros(1), 10)

# ---- Evaluation

def linear_by_hand(teacher, rows, start, end, power):
    """Weighted least squares of x1 on [x0, 1] in double precision, over the library's own states; not for the last layer."""
    x0, x1 = (teacher(rows, output_hidden_states=True).hidden_states[i].flatten(0, 1).double() for i in (start, end))
    root = x1.square().mean(-1, keepdim=True).sqrt() ** (-power / 2)  # the square root of each token's weight
    solution = torch.linalg.lstsq(root * torch.cat([x0, torch.ones(len(x0), 1)], 1), root * x1).solution.float()
    linear = eval_kl.LinearLayer(32, 32).requires_grad_(False)
    linear.weight.data, linear.bias.data = solution[:-1].T.contiguous(), solution[-1]
    return linear

def random_rows(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(3))

def test_kl_in_double_precision():
    torch.manual_seed(0)
    teacher, student = 10 * torch.randn(2, 4, 7, 500)
    kl = eval_kl.kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(kl.double(), double_kl(teacher, student), rtol=1e-5, atol=1e-6)

def test_standard_error_is_that_of_documents():
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    means = values.view(30, 2).mean(1)  # of documents of two rows each
    assert eval_kl.standard_error(values, torch.arange(60)) == pytest.approx((values.std() / 60**0.5).item())
    assert eval_kl.standard_error(values, torch.arange(60) // 2) == pytest.approx((means.std() / 30**0.5).item())
    assert eval_kl.standard_error(values, torch.zeros(60)) is None
    # Documents of different lengths, all rows of one equal, against a bootstrap over documents.
    torch.manual_seed(0)
    effects, lengths, draws = torch.randn(200).double(), torch.arange(200) % 5 + 1, torch.randint(200, (4000, 200))
    spread = ((effects * lengths)[draws].sum(1) / lengths[draws].sum(1)).std().item()
    documents = torch.arange(200).repeat_interleave(lengths)
    assert eval_kl.standard_error(effects[documents], documents) == pytest.approx(spread, rel=0.06)

def test_forward_times_on_a_fake_clock(monkeypatch):
    """The machine is twice as slow in every other round, three times in the first, and one model stumbles in three rounds."""
    clock, turns = [0.0], []
    monkeypatch.setattr(eval_kl.time, "perf_counter", lambda: clock[0])

    def model(number, ids, use_cache, logits_to_keep):
        turns.append(number)
        slow = 3 if len(turns) <= 3 else 1 + (len(turns) - 1) // 3 % 2
        clock[0] += 9.0 * (len(turns) in (2, 5, 8)) + slow * (1.0, 0.5, 3.0)[number]
        return SimpleNamespace(logits=torch.zeros(1))

    assert eval_kl.forward_times([functools.partial(model, n) for n in range(3)], None, 5) == pytest.approx([1, 0.5, 3])
    assert turns == [0, 1, 2] * 6

@pytest.mark.parametrize("start, end, power", [(0, 5, 0.0), (1, 4, 1.0), (2, 3, 2.0)])
def test_linear_map_is_weighted_least_squares(start, end, power):
    rows = random_rows(300, 24)  # in more than one batch
    linear, expected = eval_kl.fit_linear(SMALL, rows, start, end, power), linear_by_hand(SMALL, rows, start, end, power)
    close(linear.weight, expected.weight), close(linear.bias, expected.bias)

@pytest.mark.parametrize("start, end", [(1, 4), (0, 5), (5, 6)])
def test_table_rows_equal_their_models(start, end):
    """Each row against a whole model in double precision; the best skips by brute force."""
    rows, documents, fit_rows, power = random_rows(60, 24), torch.arange(60) // 2, random_rows(99, 24)[:40], 2.0
    student = student_of(SMALL, start, end, "midpoint", 5)
    student.config.training = {"token_power": power}
    table = {row["name"]: row for row in eval_kl.table(SMALL, student, rows, documents, fit_rows if end < 6 else None)}
    teacher_logits, span, places, means = SMALL(rows).logits, f"{start}..{end - 1}", {"teacher": "-"}, {}
    kl_by_row = lambda model: double_kl(teacher_logits, model(rows, use_cache=False).logits).mean(1)
    patched = lambda i, j: lft.replace_span(SMALL, i, j, linear_by_hand(SMALL, fit_rows, i, j, power))
    models = {"teacher": SMALL}
    for solver, k in itertools.product(lft.SOLVERS, (1, 2, 3, 5, 8)):
        models[f"LFT {solver} x{k}"] = student_of(SMALL, start, end, solver, k)
    models["span dropped"] = lft.replace_span(SMALL, start, end)
    if end < 6:
        models["linear map"] = patched(start, end)
        for n in (2, 3):
            skips = {i: lft.replace_span(SMALL, i, i + n) for i in range(start, end - n + 1)}
            kls = {i: kl_by_row(model) for i, model in skips.items()}
            best = min(kls, key=lambda i: kls[i].mean())
            models[f"skip {n}, best inside span"], models[f"skip {n}, first of span"] = skips[best], skips[start]
            models[f"skip {n}, patched"], means[f"skip {n}, mean inside span"] = patched(best, best + n), sum(kls.values()) / len(kls)
            for where, i in (("best inside span", best), ("first of span", start), ("patched", best)):
                places[f"skip {n}, {where}"] = f"{i}..{i + n - 1}"
    assert table.keys() == models.keys() | means.keys() and [*table][:2] == ["teacher", "LFT euler x1"]
    x0, x1, context = lft.hidden_pair(lft.trunk_of(SMALL, end), rows, start)
    stderr = lambda kl: pytest.approx((kl.view(30, 2).mean(1).std() / 30**0.5).item(), rel=1e-2, abs=1e-6)
    for name, model in models.items():
        row, kl, logits, evaluations = table[name], kl_by_row(model), model(rows, use_cache=False).logits.double(), []
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()
        agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean().item()
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-6) and row["kl_stderr"] == stderr(kl)
        assert row["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-3) and row["layers_replaced"] == places.get(name, span)
        assert row["top1_agreement"] == pytest.approx(agreement, abs=0.005) and row["tokens"] == rows.numel()
        assert row["parameters"] == sum(weight.numel() for weight in model.parameters()) and row["prefill_time"] > 0
        if name.startswith("LFT"):
            model.flow.velocity.register_forward_hook(lambda *_: evaluations.append(1))
            model(rows)
        assert row["evaluations"] == len(evaluations)
        if name.startswith("LFT") or name == "linear map":
            nmse = (layers_of(model)[start](x0, **context) - x1).double().square().sum(-1) / x1.double().square().sum(-1)
            assert row["nmse"] == pytest.approx(nmse.mean().item(), rel=1e-3)
        elif "patched" not in name:
            assert row["nmse"] is None
    for name, kl in means.items():
        assert table[name]["kl"] == pytest.approx(kl.mean().item(), rel=1e-3) and table[name]["kl_stderr"] == stderr(kl)
    assert table["teacher"]["kl"] == 0 and table["teacher"]["prefill_time"] == 1

@pytest.mark.parametrize("length, n, paper", [(6, 2, "0.77"), (12, 3, "0.79"), (5, 2, None)])
def test_printed_ratio_is_the_one_of_the_spans_length(capsys, length, n, paper):
    keys = ("layers_replaced", "evaluations", "nmse", "perplexity", "top1_agreement", "parameters", "prefill_time")
    kls = {"LFT euler x2": 0.3} | {f"skip {n}, {where}": n / 10 * (1 + (where == "patched")) for n in (2, 3) for where in ("best", "patched")}
    rows = [dict.fromkeys(keys, 1) | {"name": name, "kl": kl, "kl_stderr": None} for name, kl in kls.items()]
    eval_kl.print_table(rows, SimpleNamespace(solver="euler", k=2, start=4, end=4 + length))
    printed = capsys.readouterr().out
    assert printed.isascii() and ("paper" in printed) == bool(paper)
    assert not paper or re.search(rf"skip {n}: {3 / n:.2f} best, {1.5 / n:.2f} patched \(paper.*{paper}\)", printed)
