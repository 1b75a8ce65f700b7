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
    teacher, beams = random_teacher(family), how.get("num_beams", 1)
    how |= {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 4, "midpoint", 2, [20, 13, 5])):
        mask, student = torch.stack([torch.arange(20) >= 20 - n for n in lengths]).long(), student_of(teacher, start, end, solver, k)
        generate = lambda ids, mask, **more: student.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how | more)
        batch = generate(IDS * mask, mask)
        for row, n in enumerate(lengths):
            alone = generate(IDS[row : row + 1, 20 - n :], mask[row : row + 1, 20 - n :], use_cache=False, cache_implementation=None)
            assert torch.equal(batch.sequences[row, 20 - n :], alone.sequences[0])
            for one, two in zip(batch.logits, alone.logits):
                close(one[row * beams : (row + 1) * beams], two)

@pytest.mark.parametrize("family", ["neox", "mistral"])  # Mistral's window of 8 tokens is full when drafting begins
def test_drafting_keeps_the_text(family):
    teacher, how = random_teacher(family), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for solver, k in (("euler", 1), ("midpoint", 2)):
        student = student_of(teacher, 2, 6, solver, k)
        drafter = lft.replace_span(teacher, 4, 5)
        for row in IDS.split(1):
            assert torch.equal(teacher.generate(row, assistant_model=student, **how), teacher.generate(row, **how))
            assert torch.equal(student.generate(row, assistant_model=drafter, **how), student.generate(row, **how))

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

# ---- Runs

@pytest.fixture
def options(teacher_folder, text):
    return ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--max-steps", 3, "--device", "cpu"]

@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script's main as its command would, in float32; returns exit status, standard output and the error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train_fm, "autocast", lambda device: contextlib.nullcontext())

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
        capsys.readouterr()
        try:
            status = lft.run_script(module.main) or 0
        except SystemExit as stop:
            status = stop.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        printed, errors = capsys.readouterr()
        assert printed.isascii()  # a Windows console cannot show more
        return status, printed, "".join(re.findall(r"error: [^\r]*", errors))

    return run

def record_times(setattr):
    """The times that the losses of the scripts draw from now on, one tensor for each micro-batch."""
    times, hybrid = [], train_fw.flow_matching_loss
    record = lambda loss_of: lambda u, *args, **more: loss_of(recorder(u, times), *args, **more)
    setattr(train_fm, "flow_matching_loss", record(hybrid)), setattr(train_fw, "flow_walking_loss", record(train_fw.flow_walking_loss))
    return times

def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)

def logged(run):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("tokens_per_second") > 0 for line in lines)
    return lines

def listing(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))

def assert_equal_runs(one, two):
    """The same weights and optimizers, bit for bit, in the checkpoints and in the models."""
    checkpoints = [checkpoint_of(run) for run in (one, two)]
    for key in ("options", "step", "trained", "text"):
        assert is_equal(*(checkpoint[key] for checkpoint in checkpoints)), key
    for run in (one, two):
        assert is_equal(eval_kl.load_student(run).flow.velocity.state_dict(), checkpoints[0]["trained"][0])

def rows_by_hand(seq_len, part):
    """Training, validation or test rows of SOURCE, which is one document: cut without data.py."""
    cut = int(0.95 * len(SOURCE))
    tokens = TOKENIZER(SOURCE[:cut] if part == "training" else SOURCE[cut:])["input_ids"] + [0]
    rows = torch.tensor(tokens[: len(tokens) // seq_len * seq_len]).view(-1, seq_len)
    return {"training": rows, "validation": rows[: len(rows) // 2], "test": rows[len(rows) // 2 :]}[part]

def first_rows(text, n, seed=0):
    return torch.tensor([row["ids"] for row in itertools.islice(data.training_rows(str(text), TOKENIZER, 32, seed), n)])

def kl_of(teacher, student, rows):
    return double_kl(teacher(rows).logits, student(rows, use_cache=False).logits).mean().item()

@pytest.mark.parametrize("module, solver, k", [(train_fm, "midpoint", 1), (train_fw, "euler", 2)])
def test_run_is_a_model_and_its_scores_are_true(script, options, tmp_path, module, solver, k, teacher_folder, text):
    run, more = tmp_path / "run", ["--solver", solver, "--k", k] if module is train_fw else []
    status, printed, _ = script(module, *options, *more, "--out", run, "--seq-len", 16)
    assert status == 0 and "layers 1..3" in printed and str(run) in printed.splitlines()[-1]
    made = {"checkpoint.pt", "log.jsonl", "config.json", "model.safetensors", "lft.py", "tokenizer.json"}
    assert made <= {path.name for path in run.iterdir()} and not any(path.is_dir() for path in run.iterdir())
    student, (teacher, _) = eval_kl.load_student(run), lft.load_teacher(str(teacher_folder))
    config, training = student.config, student.config.training
    assert (config.start, config.end, config.solver, config.k, config.teacher) == (1, 4, solver, k, str(teacher_folder))
    assert (training["tokens"], training["max_steps"], training["data"]) == (3 * 8 * 16, 3, str(text))
    assert logged(run)[-1]["held_out_kl"] == pytest.approx(kl_of(teacher, student, rows_by_hand(16, "validation")), rel=1e-4)
    status, printed, _ = script(eval_kl, run, "--no-baselines", "--json", tmp_path / "table.json")
    table, rows = json.loads((tmp_path / "table.json").read_text()), rows_by_hand(16, "test")
    assert (table["start"], table["end"], table["seq_len"], table["tokens"], table["data"]) == (1, 4, 16, rows.numel(), str(text))
    found = {row["name"]: row["kl"] for row in table["rows"]}
    assert found[f"LFT {solver} x{k}"] == pytest.approx(kl_of(teacher, student, rows), rel=1e-4) and status == 0
    for row in table["rows"]:
        shown = [row["kl"], row["perplexity"], row["top1_agreement"], row["parameters"] / 1e6]
        assert re.search("^{} .*{:.4f}.*{:.2f}.*{:.1%}.*{:.2f}".format(re.escape(row["name"]), *shown), printed, re.M)

def test_eval_scores_the_right_text_and_fits_on_the_runs_own(script, options, tmp_path, monkeypatch, teacher_folder):
    script(train_fw, *options, "--seq-len", 16, "--token-power", 0.5, "--k", 2, "--out", tmp_path / "run")
    (tmp_path / "other.txt").write_text("".join(f"sentence {n} of another text\n" for n in range(2000)))
    called = []
    monkeypatch.setattr(eval_kl, "table", lambda *args: called.append(args) or [])
    for more in ([], ["--data", tmp_path / "other.txt", "--tokens", 64, "--teacher", teacher_folder]):
        assert script(eval_kl, tmp_path / "run", *more)[0] == 0
        teacher, student, rows, documents, fit_rows = called.pop()
        assert (student.config.start, student.config.end, student.config.training["token_power"]) == (1, 4, 0.5)
        assert {*map(tuple, fit_rows.tolist())} == {*map(tuple, rows_by_hand(16, "training").tolist())}
        if more:
            assert rows.numel() == 64 and all(int(n) > 1945 for n in re.findall(r"sentence (\d{4}) ", TOKENIZER.decode(rows.flatten())))
        else:
            assert torch.equal(rows, rows_by_hand(16, "test")) and len(documents) == len(rows)

def test_saved_run_loads_elsewhere(script, options, tmp_path):
    """In a fresh process, in another folder, by transformers alone: the same logits, text, generation settings and tokenizer."""
    assert script(train_fw, *options, "--out", tmp_path / "run")[0] == 0
    student = eval_kl.load_student(tmp_path / "run")
    torch.save((IDS, student(IDS).logits, student.generate(IDS, do_sample=False)), tmp_path / "expected")
    code = """
import importlib.util, torch, transformers
assert importlib.util.find_spec("lft") is None
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    load("../run")
    raise AssertionError("ran code that nobody trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error)
student, (ids, logits, text) = load("../run", trust_remote_code=True), torch.load("../expected")
torch.testing.assert_close(student(ids).logits, logits, atol=1e-5, rtol=1e-5)
assert torch.equal(student.generate(ids, do_sample=False), text)
assert student.generation_config.eos_token_id == [0, 5] and student.generation_config.repetition_penalty == 1.3
assert transformers.AutoTokenizer.from_pretrained("../run").eos_token_id == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_readme_fork_trains_and_resumes(script, options, tmp_path):
    blocks, fork = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S), ModuleType("fork")
    exec(next(block for block in blocks if "def main(" in block and "_loss(" in block), fork.__dict__)
    assert script(fork, *options, "--out", tmp_path)[0] == 0
    assert script(fork, *options, "--out", tmp_path, "--resume", "--max-steps", 4)[0] == 0 and checkpoint_of(tmp_path)["step"] == 4
    assert eval_kl.load_student(tmp_path).config.training["method"] not in ("fm", "fw")

def test_training_brings_the_student_nearer(script, tmp_path, text):
    """A short run on tiny_teacher leaves less than half of the KL of the dropped span."""
    options = ["--teacher", "tiny_teacher", "--data", text, "--start", 4, "--end", 8, "--batch-size", 4, "--seq-len", 32]
    assert script(train_fm, *options, "--out", tmp_path, "--max-steps", 40, "--device", "cpu")[0] == 0
    teacher = lft.load_teacher("tiny_teacher")[0]
    dropped = kl_of(teacher, lft.replace_span(teacher, 4, 8), rows_by_hand(32, "validation"))
    assert logged(tmp_path)[-1]["held_out_kl"] < 0.5 * dropped

def test_loop_takes_the_steps_by_hand(script, options, tmp_path, monkeypatch, text):
    options += ["--batch-size", 3, "--seed", 5, "--accumulate", 3, "--max-steps", 4]
    script(train_fm, *options, "--out", tmp_path / "start", "--lr", 0, "--token-power", 0)
    drawn = record_times(monkeypatch.setattr)
    script(train_fm, *options, "--out", tmp_path / "run", "--lr", 0.005)
    start, trained = (eval_kl.load_student(tmp_path / run).flow.velocity for run in ("start", "run"))
    teacher, velocity = random_teacher(vocab_size=2048), copy.deepcopy(start)
    matrices, vectors = ([w for w in velocity.parameters() if (w.ndim > 1) == matrix] for matrix in (True, False))
    in_adamw = [w for name, w in velocity.named_parameters() if "time_mlp" in name and w.ndim > 1]
    in_muon = [w for w in matrices if all(w is not other for other in in_adamw)]
    optimizers = [
        torch.optim.Muon(in_muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        *(torch.optim.AdamW(part, betas=(0.9, 0.95), weight_decay=decay) for part, decay in ((in_adamw, 0.01), (vectors, 0.0))),
    ]  # fmt: skip
    losses, trunk = [], lft.trunk_of(teacher, 4)
    for step, times, ids in zip((1, 2, 3, 4), torch.cat(drawn).split(3), first_rows(text, 12, seed=5).split(3)):
        x0, x1, context = lft.hidden_pair(trunk, ids, 1)
        x_t = (1 - times) * x0 + times * x1
        loss = ((velocity(x_t, times, **context) - (x1 - x0)).square().mean(-1) / x1.square().mean(-1).sqrt()).mean()
        loss.backward()
        norm = sum(w.grad.square().sum() for w in velocity.parameters()).sqrt()
        for w in velocity.parameters():
            w.grad /= max(norm, 1)  # clipped at norm 1
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.005 * (5 - step) / 4
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    (line,) = logged(tmp_path / "run")
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3) and line["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    # Where the true gradient is 0, as of a bias of the keys, AdamW follows rounding: so groups are compared, not weights.
    names = {id(w): name for name, w in velocity.named_parameters()}
    for group in (in_muon, in_adamw, vectors):
        apart = lambda other: sum((w - other.state_dict()[names[id(w)]]).square().sum() for w in group)
        assert apart(trained) < 0.001 * apart(start) > 0

def test_seeds_steps_and_micro_batches_draw_their_own_times(script, options, monkeypatch, tmp_path):
    drawn, options = record_times(monkeypatch.setattr), [*options, "--accumulate", 2, "--max-steps", 4]
    for seed in (0, 1, 2):
        script(train_fm, *options, "--seed", seed, "--out", tmp_path / str(seed))
    times = torch.cat(drawn).flatten()
    assert len(times) == 3 * 4 * 8 == len(set(times.tolist())) and uniform(times)
    script(train_fm, *options, "--seed", 1, "--out", tmp_path / "again")
    assert torch.equal(torch.cat(drawn)[96:].flatten(), times[32:64])

@pytest.mark.parametrize("module, flags, method", [
    (train_fm, {}, ("fm", 6, 12, "first", "midpoint", 1)), (train_fm, {"token_power": 0.5}, ("fm", 6, 12, "first", "midpoint", 1)),
    (train_fw, {}, ("fw", 6, 18, "middle", "midpoint", 3)),
    (train_fw, {"k": 2, "solver": "euler", "alpha": 0.5, "logit_weight": 2.0, "token_power": 0.0}, ("fw", 6, 18, "middle", "euler", 2)),
])  # fmt: skip
def test_options_reach_loss_and_student_and_default_to_the_losss_own(script, monkeypatch, module, flags, method):
    called, loss_of = [], module.flow_matching_loss if module is train_fm else module.flow_walking_loss
    monkeypatch.setattr(module, "train", lambda args, loss, solver, k: called.append((args, loss, solver, k)))
    script(module, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()))
    ((args, loss, solver, k),) = called
    assert (args.method, args.start, args.end, args.init, solver, k) == method and loss.func is loss_of
    assert (args.batch_size, args.lr, args.seed, args.resume, args.accumulate) == (8, 1 / 64, 0, False, 1)
    own = {name: each.default for name, each in inspect.signature(loss_of).parameters.items()}
    assert {name: own[name] for name in loss.keywords} | flags == loss.keywords

def test_loss_gets_the_teachers_logits(script, options, tmp_path, monkeypatch, text):
    seen, loss_of = [], train_fw.flow_walking_loss
    monkeypatch.setattr(train_fw, "flow_walking_loss", lambda u, x0, x1, logits, **own: seen.append(logits(x1)) or loss_of(u, x0, x1, **own))
    script(train_fw, *options, "--max-steps", 1, "--out", tmp_path)
    close(seen[0], random_teacher(vocab_size=2048)(first_rows(text, 8)).logits)

@pytest.mark.parametrize("module, init, start, end, layer", [
    (train_fm, "first", 0, 3, 0), (train_fw, "middle", 1, 6, 3), (train_fm, "middle", 0, 1, 0), (train_fw, "5", 1, 4, 5), (train_fm, "0", 2, 4, 0),
])  # fmt: skip
def test_init_names_the_layer_to_start_from(script, options, tmp_path, module, init, start, end, layer):
    options += ["--start", start, "--end", end, "--init", init, "--max-steps", 1, "--lr", 0, "--out", tmp_path]
    assert script(module, *options)[0] == 0
    found = eval_kl.load_student(tmp_path).flow.velocity.mlp.dense_h_to_4h.weight
    weights = [each.mlp.dense_h_to_4h.weight for each in layers_of(random_teacher(vocab_size=2048))]
    assert [number for number, weight in enumerate(weights) if torch.equal(weight, found)] == [layer]

def test_log_grows_while_training(script, options, tmp_path, monkeypatch):
    seen, evaluate = [], train_fm.evaluate
    monkeypatch.setattr(train_fm, "evaluate", lambda *args: seen.append(len(logged(tmp_path))) or evaluate(*args))
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 25, "--save-every", 22)
    lines = logged(tmp_path)
    assert [(line["step"], line["tokens"]) for line in lines] == [(n, n * 8 * 32) for n in (10, 20, 22, 25)] and seen == [2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([1 / 64 * (26 - n) / 25 for n in (10, 20, 22, 25)])
    assert ["held_out_kl" in line for line in lines] == ["held_out_nmse" in line for line in lines] == [False, False, True, True]

@pytest.mark.parametrize("steps", [1, 10, 50, 2000, 320_000])
def test_learning_rate_rises_shortly_and_falls_to_nothing(steps):
    lr = torch.tensor([train_fm.learning_rate(step, SimpleNamespace(lr=0.5, max_steps=steps)) for step in range(1, steps + 1)])
    peak = lr.argmax()
    assert peak <= steps / 10 and 0.45 <= lr[peak] <= 0.5 and (lr[: peak + 1].diff() > 0).all()
    close(lr[steps // 10 :], 0.5 * torch.arange(steps - steps // 10, 0, -1) / steps, atol=1e-6)
    assert steps < 2000 or lr[9] == pytest.approx(10 * lr[0].item(), rel=0.01)

def test_only_matrices_decay_and_time_networks_go_to_adamw():
    """With gradients of zero, decay is all that a step does."""
    velocity = randomize(TwoAttentions(layers_of(SMALL)[2]))
    before, optimizers = copy.deepcopy(velocity.state_dict()), train_fm.make_optimizers(velocity)
    in_muon = {id(weight) for group in optimizers[0].param_groups for weight in group["params"]}
    for name, weight in velocity.named_parameters():
        assert (id(weight) in in_muon) == (weight.ndim == 2 and "time_mlp" not in name)
        weight.grad = torch.zeros_like(weight)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.step()
    for name, weight in velocity.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (0.995 if weight.ndim > 1 else 1))

@pytest.mark.parametrize("has", [False, True])
def test_autocast_follows_the_hardware(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False})
    with train_fm.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if has else torch.float32)

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_trains_the_same(script, options, tmp_path):
    options += ["--start", 0, "--end", 1, "--init", 4, "--max-steps", 40]
    assert script(train_fm, *options, "--out", tmp_path / "plain")[0] == script(train_fm, *options, "--out", tmp_path / "fast", "--compile")[0]
    plain, fast = ([line["loss"] for line in logged(tmp_path / run)] for run in ("plain", "fast"))
    assert plain[-1] < 0.9 * plain[0] and fast == pytest.approx(plain, rel=0.01)

# ---- Runs that stop and resume

@pytest.mark.parametrize("module, streamed, parts, number", [
    (train_fm, False, 1, signal.SIGINT), (train_fm, True, 2, signal.SIGTERM), (train_fw, False, 2, signal.SIGTERM), (train_fw, True, 1, signal.SIGINT),
])  # fmt: skip
def test_interrupted_run_resumes_exactly(script, options, tmp_path, monkeypatch, module, streamed, parts, number, stream, teacher_folder):
    """Bit for bit, over the end of a pass through the streamed text, and with the run and its teacher moved."""
    options += ["--max-steps", 14, "--save-every", 4, "--accumulate", parts, *(["--data", stream] if streamed else [])]
    whole, part, moved = (tmp_path / name for name in ("whole", "part", "moved"))
    assert script(module, *options, "--out", whole)[0] == 0
    name = "flow_matching_loss" if module is train_fm else "flow_walking_loss"
    calls, loss_of = itertools.count(1), getattr(module, name)
    stop = lambda: signal.raise_signal(number) if next(calls) == 7 * parts - parts + 1 else None  # in step 7, which is finished
    monkeypatch.setattr(module, name, lambda *args, **more: stop() or loss_of(*args, **more))
    assert script(module, *options, "--out", part)[0] == 0 and checkpoint_of(part)["step"] == 7
    assert eval_kl.load_student(part).config.training["tokens"] == 7 * 8 * 32
    with open(part / "log.jsonl", "a") as log:  # as of a run that was killed while it wrote what comes after the checkpoint
        log.write('{"step": 8, "tokens": 0}\n{"step": 9, "tok')
    shutil.copytree(teacher_folder, tmp_path / "teacher"), part.rename(moved)
    assert script(module, *options, "--out", moved, "--resume", "--teacher", tmp_path / "teacher")[0] == 0
    assert_equal_runs(whole, moved)
    assert [line for line in logged(moved) if line["step"] not in (7, 8)] == [line for line in logged(whole) if line["step"] != 8]
    assert script(module, *options, "--out", moved, "--resume", "--max-steps", 15)[0] == 0 and checkpoint_of(moved)["step"] == 15
    assert [line["step"] for line in logged(moved)] == [4, 7, 8, 10, 12, 14, 15] and logged(moved)[-1]["lr"] == pytest.approx(1 / 64 / 15)

CHANGED = {
    "start": 2, "end": 3, "init": "first", "k": 3, "solver": "midpoint", "alpha": 0.3, "logit-weight": 1, "token-power": 1,
    "data": "copy.txt", "seed": 1, "lr": 0.01, "batch-size": 4, "accumulate": 2, "seq-len": 16, "max-steps": 2,
}  # fmt: skip

def test_changed_options_are_refused_on_resume(script, options, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "copy.txt")
    options += ["--k", 2, "--solver", "euler", "--alpha", 0.5, "--token-power", 0, "--out", "run"]
    script(train_fw, *options)
    before = listing(tmp_path)

    def refused(word, *more):
        status, _, error = script(train_fw, *options, "--resume", *more)
        assert status == 2 and word in error and error.count("\n") == 1 and listing(tmp_path) == before, word

    for name, value in CHANGED.items():
        refused(name if name == "max-steps" else f"with {name.replace('-', '_')} ", f"--{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("with world_size 1")
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.setattr(train_fw, "make_parser", lambda *_, **__: train_fm.make_parser("", "fork", 6, 18, "middle"))
    refused("with method fw")

def swap_ids(tokens):
    ids = tokens["model"]["vocab"]
    ids["e"], ids["t"] = ids["t"], ids["e"]

def shift_weight(weights):
    weights["gpt_neox.layers.5.mlp.dense_h_to_4h.bias"][3] += 1e-3  # of a layer that the flow never sees

@pytest.mark.parametrize("word, change", [
    ("teacher_sha256", lambda folder: edit_weights(folder / "teacher", shift_weight)),
    ("teacher_sha256", lambda folder: edit_json(folder / "teacher" / "config.json", lambda config: config.update(hidden_act="relu"))),
    ("held_out_sha256", lambda folder: edit_json(folder / "teacher" / "tokenizer.json", swap_ids)),
    ("held_out_sha256", lambda folder: (folder / "text.txt").write_text(SOURCE[:-500])),
])  # fmt: skip
def test_changed_teacher_tokenizer_or_text_is_refused(script, tmp_path, teacher_folder, word, change):
    shutil.copytree(teacher_folder, tmp_path / "teacher"), (tmp_path / "text.txt").write_text(SOURCE)
    options = ["--teacher", tmp_path / "teacher", "--data", tmp_path / "text.txt", "--start", 1, "--end", 4, "--max-steps", 1]
    assert script(train_fm, *options, "--out", tmp_path / "run")[0] == 0
    change(tmp_path)
    for module, more in ((train_fm, [*options, "--out", tmp_path / "run", "--resume"]), (eval_kl, [tmp_path / "run"])):
        status, _, error = script(module, *more)
        assert status == 2 and word in error and error.count("\n") == 1

def in_process(module, options, environment, interrupt, times):
    """What a process of its own does: a script's main, with a Ctrl-C at some losses; the times that it draws are saved."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    drawn, calls = record_times(setattr), itertools.count(1)
    loss_of, stop = train_fm.flow_matching_loss, lambda: signal.raise_signal(signal.SIGINT) if next(calls) in interrupt else None
    train_fm.flow_matching_loss = lambda *args, **more: stop() or loss_of(*args, **more)
    train_fm.autocast = lambda device: contextlib.nullcontext()
    sys.argv = [module.__name__, *map(str, options)]
    lft.run_script(module.main)
    torch.save(drawn, times) if times else None

@pytest.fixture(scope="session")
def start_process():
    """A way to start processes that have loaded the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lft"])

    def start(module, *options, environment={}, interrupt=(), times=None):
        process = context.Process(target=in_process_by_name, args=(module.__name__, options, environment, interrupt, times))
        process.start()
        return process

    return start

def in_process_by_name(name, *args):
    in_process({"train_fm": train_fm, "train_fw": train_fw}[name], *args)

def test_second_ctrl_c_ends_at_once(start_process, options, tmp_path):
    process = start_process(train_fm, *options, "--accumulate", 2, "--out", tmp_path / "run", interrupt=(1, 2))
    process.join()
    assert process.exitcode == -signal.SIGINT and not (tmp_path / "run" / "checkpoint.pt").exists()

def test_one_of_two_runs_in_one_folder_fails(start_process, options, tmp_path):
    processes = [start_process(train_fm, *options, "--out", tmp_path / "run") for _ in (1, 2)]
    [process.join() for process in processes]
    assert sorted(process.exitcode for process in processes) == [0, 2] and checkpoint_of(tmp_path / "run")["step"] == 3

KILLS = int(os.environ.get("KILLS", 4))

def test_killed_run_resumes_exactly(start_process, options, tmp_path):
    """kill -9 at random moments, while saving too, ends in the run that nobody killed."""
    options += ["--batch-size", 1, "--max-steps", 20 + 20 * KILLS, "--save-every", 1]
    run, whole, chance = tmp_path / "killed", tmp_path / "whole", random.Random(0)
    checkpoint = run / "checkpoint.pt"

    def start():
        if not checkpoint.exists():
            shutil.rmtree(run, ignore_errors=True)
        return start_process(train_fm, *options, "--out", run, *(["--resume"] if checkpoint.exists() else []))

    for kill in range(KILLS):
        process, before = start(), checkpoint.read_bytes() if checkpoint.exists() else None
        while process.is_alive() and kill % 3 and (not checkpoint.exists() or checkpoint.read_bytes() == before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1 if kill % 3 else 1.0))  # two of three while it trains, one at any time
        process.kill(), process.join()
        assert process.exitcode == -signal.SIGKILL
    for process in [start(), start_process(train_fm, *options, "--out", whole)]:
        process.join()
        assert process.exitcode == 0
    assert_equal_runs(whole, run)
    assert logged(whole) == logged(run) and [line["step"] for line in logged(run)] == [*range(1, 21 + 20 * KILLS)]

def run_two(start_process, module, *options, interrupt=(), times=(None, None)):
    """Run a script in two processes, as torchrun starts them; the second may get a Ctrl-C."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        start_process(module, *options, environment=shared | {"RANK": str(rank)}, interrupt=interrupt * rank, times=times[rank])
        for rank in (0, 1)
    ]
    for process in started:
        process.join(120)
        process.kill()  # one that hangs has no exit code yet, and fails
    assert [process.exitcode for process in started] == [0, 0]

def test_processes_and_micro_batches_equal_the_joint_batch(script, options, start_process, tmp_path):
    """With one Euler step Flow Walking draws no times, so all of these take the same steps."""
    options += ["--k", 1, "--solver", "euler", "--max-steps", 4, "--lr", 0.001]
    one, parts, both = (tmp_path / name for name in ("one", "parts", "both"))
    script(train_fw, *options, "--out", one), script(train_fw, *options, "--out", parts, "--accumulate", 4)
    run_two(start_process, train_fw, *options, "--out", both, "--accumulate", 2)
    for run in (parts, both):
        assert logged(run)[-1] == {name: pytest.approx(value, rel=1e-4) for name, value in logged(one)[-1].items()}
        for name, weight in load_file(one / "model.safetensors").items():
            assert (weight - load_file(run / "model.safetensors")[name]).norm() <= 1e-4 * weight.norm() + 1e-4

def test_two_processes_draw_their_own_times_and_resume_exactly(start_process, options, tmp_path, stream):
    """One of them is interrupted, where one of the files has ended and the other has not."""
    options += ["--data", stream, "--batch-size", 16, "--max-steps", 8]
    run_two(start_process, train_fm, *options, "--out", tmp_path / "whole", times=(tmp_path / "0", tmp_path / "1"))
    times = torch.cat([each for rank in "01" for each in torch.load(tmp_path / rank)]).flatten()
    assert len(times) == 8 * 16 == len(set(times.tolist())) and uniform(times)
    run_two(start_process, train_fm, *options, "--out", tmp_path / "half", interrupt=(4,))
    places = checkpoint_of(tmp_path / "half")["text"]
    assert checkpoint_of(tmp_path / "half")["step"] == 4 and places[0] != places[1]
    run_two(start_process, train_fm, *options, "--out", tmp_path / "half", "--resume")
    assert_equal_runs(tmp_path / "whole", tmp_path / "half")

# ---- Mistakes and accidents

@pytest.mark.parametrize("kind", ["loss", "gradient_norm", "held_out_kl"])
def test_non_finite_numbers_stop_the_run(script, options, tmp_path, monkeypatch, kind):
    """In step 5, or in the score of step 6; the checkpoint of step 3 stays, and no model is written."""
    losses, scores, loss_of, evaluate = itertools.count(1), itertools.count(1), train_fm.flow_matching_loss, train_fm.evaluate

    def spoiled_loss(*args, **more):
        loss = loss_of(*args, **more)
        no_number = math.inf if kind == "loss" else (loss - loss.detach()).abs().sqrt()  # 0, with a gradient of 0/0
        return loss + no_number * (next(losses) == 5 and kind != "held_out_kl" or 0.0) if kind != "loss" else loss + (math.inf if next(losses) == 5 else 0)

    spoiled_score = lambda *args: {"student": evaluate(*args)["student"] | ({"kl": torch.tensor([math.nan])} if next(scores) == 2 else {})}
    monkeypatch.setattr(train_fm, *(("evaluate", spoiled_score) if kind == "held_out_kl" else ("flow_matching_loss", spoiled_loss)))
    status, _, error = script(train_fm, *options, "--out", tmp_path, "--max-steps", 6, "--save-every", 3)
    assert status == 2 and kind in error and "lower --lr" in error and error.count("\n") == 1
    assert checkpoint_of(tmp_path)["step"] == 3 and not (tmp_path / "model.safetensors").exists() and len(logged(tmp_path)) == 1

def test_full_disk_keeps_the_earlier_checkpoint(script, options, tmp_path, monkeypatch):
    limit, save_checkpoint = resource.getrlimit(resource.RLIMIT_FSIZE), train_fm.save_checkpoint

    def on_a_full_disk(folder, **state):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if state["step"] == 2 else limit[0], limit[1]))  # larger files cannot be written
        try:
            save_checkpoint(folder, **state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(train_fm, "save_checkpoint", on_a_full_disk)
    status, _, error = script(train_fm, *options, "--out", tmp_path, "--save-every", 1)
    assert status == 2 and error.count("\n") == 1 and checkpoint_of(tmp_path)["step"] == 1

def test_closed_stdout_keeps_checkpoint(options, tmp_path):
    """As of `train_fm.py ... | head -1`."""
    command = map(str, [sys.executable, HERE / "train_fm.py", *options, "--save-every", 1, "--out", tmp_path])
    process = subprocess.Popen([*command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert b"layers 1..3" in process.stdout.readline()
    process.stdout.close()
    assert process.wait() != 0 and checkpoint_of(tmp_path)["step"] >= 1

@pytest.mark.parametrize("options, word", [
    (["--start", 4, "--end", 4], "6 layers"), (["--start", -1], "6 layers"), (["--end", 7], "6 layers"),
    (["--teacher", "no-such/model"], "no-such/model"), (["--teacher", "no_tokenizer"], "no_tokenizer"),
    (["--teacher", "headless"], "missing or unexpected"), (["--teacher", "shallow"], "missing or unexpected"),
    (["--data", "no-such/data-set"], "--data"), (["--data", "no/such/*.txt"], "--data"), (["--data", "short.txt"], "no training row"),
    (["--seq-len", 65], "up to 64"), (["--batch-size", 3, "--accumulate", 2], "multiples of 1"), (["--out", "taken"], "taken holds a run"),
    (["--out", "short.txt"], "short.txt"), (["--out", "missing", "--resume"], "missing"), (["--out", "cut", "--resume"], "cut"),
    (["--out", "other", "--resume"], "other"), (["--init", "last"], "layer last"), (["--init", 6], "layer 6"), (["--init", -1], "layer -1"),
    (["--lr", "nan"], "--lr"), (["--max-steps", 0], "--max-steps"), (["--k", 0], "--k"), (["--alpha", "inf"], "--alpha"),
    (["--logit-weight", "-1"], "--logit-weight"), (["--seed", -1], "--seed"), (["--device", "nonsense"], "--device cpu"),
    pytest.param(["--device", "cuda"], "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
])  # fmt: skip
def test_mistake_in_training_ends_in_one_sentence(script, tmp_path, monkeypatch, teacher_folder, text, options, word):
    monkeypatch.chdir(tmp_path)
    [(tmp_path / folder).mkdir() for folder in ("taken", "cut", "other")]
    Path("taken/log.jsonl").write_text(""), Path("short.txt").write_text("too short"), Path("other/checkpoint.pt").write_text("text")
    torch.save({"options": {}, "weights": torch.zeros(999)}, "cut/checkpoint.pt"), os.truncate("cut/checkpoint.pt", 999)
    [shutil.copytree(teacher_folder, folder) for folder in ("no_tokenizer", "headless", "shallow")]
    [path.unlink() for path in Path("no_tokenizer").glob("tokenizer*")]
    edit_weights(tmp_path / "headless", lambda weights: weights.pop("gpt_neox.final_layer_norm.bias"))
    edit_json(tmp_path / "shallow" / "config.json", lambda config: config.update(num_hidden_layers=5))
    before, standard = listing(tmp_path), ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--max-steps", 1]
    status, _, error = script(train_fw, *standard, *options)
    assert status == 2 and word in error and error.count("\n") == 1 and listing(tmp_path) == before

def test_mistake_in_evaluation_ends_in_one_sentence(script, options, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert script(train_fm, *options, "--out", run, "--max-steps", 1)[0] == 0
    weights = (run / "model.safetensors").read_bytes()
    monkeypatch.setattr(eval_kl, "table", lambda *_: pytest.fail("scored"))

    def refused(word, *arguments):
        status, printed, error = script(eval_kl, *arguments, "--device", "cpu")
        assert status == 2 and word in error and error.count("\n") == 1 and printed == ""
        (run / "model.safetensors").write_bytes(weights)

    refused("missing", run, "--json", tmp_path / "missing" / "table.json")
    for arguments in ([tmp_path / "nowhere"], [run, "--teacher", tmp_path / "nowhere"], [run, "--data", tmp_path / "nowhere"]):
        refused("nowhere", *arguments)
    (run / "model.safetensors").unlink(), refused("--resume", run)
    (run / "model.safetensors").write_bytes(weights[:9999]), refused("trained student", run)
    for lost in ("model.gpt_neox.layers.1.velocity.norm1.weight", "model.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"):
        edit_weights(run, lambda weights: weights.pop(lost)), refused(lost, run)
    edit_weights(run, lambda weights: weights.update(more=torch.zeros(1))), refused("more is missing or unexpected", run)
    monkeypatch.setattr(lft.LFTForCausalLM, "velocity_class", TwoAttentions)
    refused("missing or unexpected", run)

@pytest.mark.parametrize("module", [train_fm, train_fw, eval_kl])
def test_help_is_ascii(script, module):
    assert script(module, "--help")[0] == 0

# ---- studies
