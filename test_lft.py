"""Tests, each against an independent truth: a closed form, the library's own output or a loop by hand.

    python -m pytest -q test_lft.py    # with KILLS=50 before it, the killed run is killed that often (default 4)
"""
import contextlib, copy, functools, gzip, inspect, itertools, json, math, multiprocessing, os, random, re, resource
import shutil, signal, socket, subprocess, sys, sysconfig, textwrap, threading, time
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test waits for the network

import pytest, torch, transformers, zstandard
from safetensors.torch import load, load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM

import data, eval_kl, lft, train_fm, train_fw
from studies import crossing, frontier, results, spans, speed, walks

GQA = {"num_key_value_heads": 2}
FAMILIES = {
    "neox": ("GPTNeoX", {}), "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}), "qwen2": ("Qwen2", GQA),
    "llama": ("Llama", GQA | {"tie_word_embeddings": True}), "mistral": ("Mistral", GQA | {"sliding_window": 8}),
    "qwen3": ("Qwen3", GQA | {"head_dim": 16}), "phi3": ("Phi3", GQA), "olmo": ("Olmo", GQA), "starcoder2": ("Starcoder2", GQA)}
UNFIT = {  # each with the first of the layers 1, 2, 3 that does not fit
    "norms after branches": ("Gemma2", GQA | {"head_dim": 8}, 1), "scaled residual": ("Granite", {"residual_multiplier": 0.5}, 1),
    "experts by turns": ("Qwen3Moe", GQA | {"head_dim": 8, "decoder_sparse_step": 2, "num_experts_per_tok": 2}, 2)}

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
    torch.manual_seed(2)
    student = lft.LFTForCausalLM(lft.LFTConfig(teacher.config.to_dict(), start, end, solver, k, "a teacher"), teacher)
    randomize(student.flow.velocity)
    return student.eval().requires_grad_(False)

def call_of(layer, model, ids):
    """What the library calls a layer with, and what it returns: state, context, output."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, context, out: seen.append((args[0], context, out)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]

def double_kl(teacher_logits, logits):
    p, q = (each.double().softmax(-1) for each in (teacher_logits, logits))
    return (p * (p / q).log()).sum(-1)

def is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

close, layers_of = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4), lambda model: model.get_decoder().layers
random_rows = lambda *shape, seed=3: torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))
SMALL = random_teacher()
TOKENIZER = lft.load_teacher("tiny_teacher")[1]
IDS = random_rows(3, 20, seed=2)

# ---- The velocity, the training pair, the solvers
@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_starts_as_the_layer(family):
    teacher = random_teacher(family)
    for number, t in ((0, 0.0), (2, 0.37), (5, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))):
        x, context, expected = call_of(layers_of(teacher)[number], teacher, IDS)
        close(x + lft.VelocityBlock(layers_of(teacher)[number])(x, t, **context), expected, atol=1e-5)
    lft.check_layers(teacher, [1, 2, 3, 5])  # accepts it

@pytest.mark.parametrize("family", UNFIT)
def test_layers_that_do_not_fit_are_refused_by_number(family):
    with pytest.raises(lft.InputError, match=f"layer {UNFIT[family][2]} of"):
        lft.check_layers(random_teacher(family), [1, 2, 3])

@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_velocity_is_the_formula(family):
    """α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2), with one time per sequence."""
    teacher, times = random_teacher(family), [0.1, 0.3, 0.9]
    layer = layers_of(teacher)[2]
    velocity, (x, context, _) = lft.VelocityBlock(layer), call_of(layer, teacher, IDS)
    first, _, last = randomize(velocity.time_mlp)
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        angles = t * torch.tensor([1000 ** (i / 63) for i in range(64)])
        hidden = torch.nn.functional.silu(first.weight @ torch.cat([torch.sin(angles), torch.cos(angles)]) + first.bias)
        b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
        attention = a1 * layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
        y = x if family == "neox" else x + attention
        expected = attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(y) + b2)
        close(together[i], expected[i], atol=1e-3, rtol=1e-3)  # sin(1000 t) in single precision
        assert (together[i - 1] - expected[i - 1]).abs().max() > 0.1  # time matters

@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_pair_equals_library_states(family):
    teacher = random_teacher(family)
    norm, states = getattr(teacher.get_decoder(), "norm", None), teacher(IDS, output_hidden_states=True).hidden_states
    for start, end in ((0, 1), (1, 4), (2, 6), (0, 6)):
        x0, x1, _ = lft.hidden_pair(lft.trunk_of(teacher, end), IDS, start)
        x1 = x1 if end < 6 else (norm or teacher.get_decoder().final_layer_norm)(x1)  # the library's last state is after the norm
        assert torch.equal(x0, states[start]) and torch.equal(x1, states[end])

@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solver_order(solver, order):
    velocity, errors = lambda x, t: (1 + 2 * t) * x, []  # solved by x(t) = x(0) exp(t + t²)
    for k in (64, 128, 256):
        x1 = lft.integrate(velocity, torch.ones(1, dtype=torch.float64), [i / k for i in range(k + 1)], solver)
        errors.append(abs(x1.item() - math.exp(2)))
    assert [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)] == pytest.approx([order] * 2, abs=0.06)

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

@pytest.mark.parametrize("solver, k, end", [("midpoint", 3, 4), ("euler", 2, 6)])
def test_flow_equals_a_walk_by_hand(solver, k, end):
    student = student_of(SMALL, 2, end)
    student.config.solver, student.config.k = solver, k
    x, context, flow = call_of(student.flow, student, IDS)
    assert torch.equal(x, SMALL(IDS, output_hidden_states=True).hidden_states[2])
    with pytest.raises(lft.InputError, match="hooks"):  # it would have no state for the flow
        student(IDS, output_hidden_states=True)
    for i in range(k):
        slope = student.flow.velocity(x, i / k, **context)
        if solver == "midpoint":
            slope = student.flow.velocity(x + slope / (2 * k), (i + 0.5) / k, **context)
        x = x + slope / k
    close(flow, x)

# ---- The KV cache
class TwoAttentions(lft.VelocityBlock):
    def __init__(self, layer):
        super().__init__(layer)
        self.second = lft.VelocityBlock(layer)
    def forward(self, x, t, **context):
        first = super().forward(x, t, **context)
        return first + self.second(x + first, t, **context)

def cached_logits(model, cache):
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split([11, 1, 1, 7], dim=1)], 1)

@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_reloaded_logits_equal_uncached(family, tmp_path):
    teacher = random_teacher(family)
    for start, end, solver, k in ((1, 5, "midpoint", 2), (0, 1, "midpoint", 3), (4, 6, "euler", 8), (2, 6, "euler", 1)):
        student = student_of(teacher, start, end, solver, k)
        by_default, expected = student(IDS[:, :11]).past_key_values, student(IDS, use_cache=False).logits
        close(student(IDS[:, 11:], past_key_values=by_default).logits, expected[:, 11:])
        student.save_pretrained(tmp_path), close(lft.LFTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
        for cache in (DynamicCache(config=student.config.get_text_config()), DynamicCache()):
            close(cached_logits(student, cache), expected)
            for change in ((solver, k + 1), ({"euler": "midpoint", "midpoint": "euler"}[solver], k)):
                student.config.solver, student.config.k = change
                with pytest.raises(lft.InputError, match="start a new one"):
                    student(IDS, past_key_values=cache)
            student.config.solver, student.config.k = solver, k

@pytest.mark.parametrize("growing", [False, True])
def test_two_flows_and_two_attentions_cache_right(growing):
    velocities = [randomize(velocity(layers_of(SMALL)[4])) for velocity in (TwoAttentions, lft.VelocityBlock)]
    late, early = (lft.FlowLayer(velocity, "midpoint", 2) for velocity in velocities)
    model = lft.replace_span(lft.replace_span(SMALL, 3, 5, late), 0, 2, early).eval()
    assert model.get_input_embeddings().weight is SMALL.get_input_embeddings().weight  # the weights are shared
    cache = DynamicCache() if growing else DynamicCache(config=model.config)
    close(cached_logits(model, cache), model(IDS, use_cache=False).logits)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * (4 + 7 + 3)

@pytest.mark.parametrize("family, how", [
    ("neox", {"num_beams": 3}), *itertools.product(["neox", "mistral", "qwen3"], [{}, {"cache_implementation": "static"}])])
def test_generated_text_equals_uncached(family, how):
    """A padded batch with a cache, against each of its sequences alone, without padding and without a cache."""
    teacher, beams, uncached = random_teacher(family), how.get("num_beams", 1), {"use_cache": False, "cache_implementation": None}
    how |= {"return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 4, "midpoint", 2, [20, 13, 5])):
        student, mask = student_of(teacher, start, end, solver, k), 1 * (torch.arange(20) >= 20 - torch.tensor(lengths)[:, None])
        generate = lambda ids, mask, **more: student.generate(ids, attention_mask=mask, output_logits=True, **how | more)
        batch = generate(IDS * mask, mask)
        for row, n in enumerate(lengths):
            alone = generate(IDS[row : row + 1, 20 - n :], mask[row : row + 1, 20 - n :], **uncached)
            assert torch.equal(batch.sequences[row, 20 - n :], alone.sequences[0])
            close(torch.stack(batch.logits)[:, row * beams : (row + 1) * beams], torch.stack(alone.logits))

@pytest.mark.parametrize("family", ["neox", "mistral"])  # Mistral's window of 8 tokens is full when drafting begins
def test_drafting_keeps_the_text(family):
    teacher, how = random_teacher(family), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    drafter, row = lft.replace_span(teacher, 4, 5), IDS[:1]
    for solver, k in (("euler", 1), ("midpoint", 2)):
        student = student_of(teacher, 2, 6, solver, k)
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
    folder, teacher = tmp_path_factory.mktemp("teacher"), random_teacher(vocab_size=4096)
    teacher.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 5], repetition_penalty=1.3, max_new_tokens=9)
    teacher.save_pretrained(folder), TOKENIZER.save_pretrained(folder)
    return folder

def edit_weights(folder, edit):
    weights = load((folder / "model.safetensors").read_bytes())  # not mapped, since the file is replaced
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

swap_two_tokens = lambda tokenizer: (ids := tokenizer["model"]["vocab"]).update({",": ids["("], "(": ids[","]})

def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))

@pytest.mark.parametrize("vocabulary, eos", [(4096, "<|endoftext|>"), (4095, "<|endoftext|>"), (4096, None)])
def test_teacher_is_loaded_frozen_if_its_tokenizer_fits(tmp_path, vocabulary, eos):
    random_teacher(vocab_size=vocabulary).half().save_pretrained(tmp_path), TOKENIZER.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(eos_token=eos))
    with contextlib.nullcontext() if eos and vocabulary == 4096 else pytest.raises(lft.InputError, match="tokenizer"):
        teacher, _ = lft.load_teacher(str(tmp_path))
        assert {(w.dtype, w.requires_grad) for w in teacher.parameters()} == {(torch.float32, False)} and not teacher.training

def test_integer_weights_are_refused_and_quantization_config_dropped(teacher_folder, monkeypatch):
    teacher, report = random_teacher(vocab_size=4096), {"missing_keys": set(), "unexpected_keys": set()}
    teacher.config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(lft.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (teacher, report))
    assert "quantization_config" not in lft.load_teacher(str(teacher_folder))[0].config.to_dict()
    layers_of(teacher)[3].mlp.dense_h_to_4h.weight.data = torch.ones(64, 32, dtype=torch.int8)
    with pytest.raises(lft.InputError, match="integers"):
        lft.load_teacher(str(teacher_folder))

# ---- The losses
recorder = lambda velocity, times: lambda x, t: times.append(t) or velocity(x, t)  # notes the times of its evaluations

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
    assert zero == 0 and (inner.diff(dim=0) > 0).all() and inner.mean(1).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    assert uniform(inner[torch.randint(3, (20_000,)), torch.arange(20_000)])  # one of the three, at random

@pytest.mark.parametrize("loss_of", [train_fm.flow_matching_loss, train_fw.flow_walking_loss])
def test_zero_state_gives_a_finite_loss(loss_of):
    (x0, x1), weight = torch.randn(2, 2, 5, 8), torch.ones(8, requires_grad=True)
    x1[0, 2] = 0
    loss = loss_of(lambda x, t: weight * x, x0, x1)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.isfinite() and gradient.isfinite().all() and eval_kl.token_errors(x0 - x1, x1, 2).isfinite().all()

@pytest.mark.parametrize("k, solver, alpha, logit_weight, token_power", [
    (1, "euler", 0.0, 0.0, 1.0), (3, "euler", 0.3, 0.0, 0.0), (1, "midpoint", 0.0, 2.0, 0.5), (4, "midpoint", 0.5, 0.1, 2.0)])
def test_flow_walking_equals_a_loop_by_hand(k, solver, alpha, logit_weight, token_power):
    torch.manual_seed(3)
    x0, x1, matrix, head = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    u, logits = lambda x, t: torch.sin(x @ matrix.requires_grad_() + 3 * t), lambda x: x @ head[0]
    given, times, per_step = {"logit_weight": logit_weight, "token_power": token_power}, [], 1 + (solver == "midpoint")
    loss = train_fw.flow_walking_loss(recorder(u, times), x0, x1, logits, k, solver, alpha, **given)
    assert len(times) == k * per_step + bool(alpha)
    squared, walked = lambda error: (error**2).mean(-1) / (x1**2).mean(-1).sqrt() ** token_power, []
    for i in range(3):
        x, u_i = x0[i], lambda x, t: torch.sin(x @ matrix[i] + 3 * t)
        for t, s in itertools.pairwise([0.0, *(t[i].item() for t in times[per_step : k * per_step : per_step]), 1.0]):
            x = x + (s - t) * (u_i(x, t) if solver == "euler" else u_i(x + (s - t) / 2 * u_i(x, t), (s + t) / 2))
        walked.append(x)
    by_hand = squared(torch.stack(walked) - x1).mean() + logit_weight * double_kl(logits(x1), logits(torch.stack(walked))).mean()
    if alpha:
        by_hand = by_hand + alpha * squared(u((1 - times[-1]) * x0 + times[-1] * x1, times[-1]) - (x1 - x0)).mean()
    close(loss, by_hand)  # the loss takes logits and times in single precision
    close(*(torch.autograd.grad(value, matrix)[0] for value in (loss, by_hand)))

def test_equal_times_are_those_of_the_students_walk():
    x0, x1, u = torch.randn(3, 4, 5), torch.randn(3, 4, 5), lambda x, t: torch.sin(x + 3 * t)
    loss = train_fw.flow_walking_loss(u, x0, x1, k=4, solver="euler", times="equal")
    close(loss, eval_kl.token_errors(lft.FlowLayer(None, "euler", 4).walk(u, x0) - x1, x1).mean())

# ---- Text
SOURCE, NOISE = inspect.getsource(textwrap), random.Random(0).randbytes(9999)  # a text that is quickly read, and no text

class Letters:
    eos_token_id = 0  # of a tokenizer that a test can read: one token per letter
    def __call__(self, texts, verbose=False):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

def letters(rows):
    """The text of rows, with | for the end of a document."""
    return "".join(chr(token) for row in rows for token in row["ids"]).replace("\0", "|")

text_at = lambda place, *args, **more: letters(data.token_rows(str(place), Letters(), 1, *args, **more))

def write_text(path, content):
    """Rows with a column "text", given as a list, or plain text; compressed if the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return data.Dataset.from_dict({"text": content}).to_parquet(path)
    if isinstance(content, list):
        content = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in content)
    path.write_bytes({".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix.lower(), bytes)(content.encode()))

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
    train, held_out = (data.documents("stdlib", part)[0] for part in (False, True))
    assert not set(train) & set(held_out) - {""} and 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    read = lambda *names: {Path(sysconfig.get_path("stdlib"), name).read_text() for name in names}
    assert read("argparse.py", "dataclasses.py", "heapq.py") < {*train} and read("codecs.py", "asyncio/events.py") < {*held_out}

A, B, C, D = "a" * 190, "b" * 10, "c" * 95, "d" * 5  # the last twentieth of each document is held out
PLAIN, ROWS, BOTH = {"1.txt": A + B, "2.md": C + D}, [A + B, None, C + D], (f"{A}|{C}|", f"{B}|{D}|")
PILE = {"train/1.jsonl.zst": ["ab", "cd"], "train/2.jsonl.zst": ["e"], "val.jsonl.zst": ["fg"], "test.jsonl.zst": ["h"]}

@pytest.mark.parametrize("files, place, train, held_out", [
    (PLAIN, "", *BOTH), (PLAIN, "*.*", *BOTH), (PLAIN, "2.md", f"{C}|", f"{D}|"), ({"train.py": A + B, "x.py": C + D}, "", *BOTH),
    ({"x.jsonl": ROWS, "b/n[1].txt": A + B, "b/c.PY": C + D}, "b", *BOTH), ({"n[1].txt": A + B}, "n[1].txt", f"{A}|", f"{B}|"),
    ({"n[1]/1.txt": A + B, "1.txt": C + D}, "n[1]", f"{A}|", f"{B}|"), ({"1.txt.gz": A + B, "2.txt.zst": C + D}, "", *BOTH),
    ({"1.TXT.GZ": A + B}, "1.TXT.GZ", f"{A}|", f"{B}|"), ({"x.JSONL": ROWS}, "x.JSONL", *BOTH), ({"x.jsonl.gz": ROWS}, "", *BOTH),
    ({"x[1].json": ROWS}, "x[1].json", *BOTH), ({"x.parquet": ROWS}, "x.parquet", *BOTH), ({"x.jsonl.zst": ROWS}, "*.zst", *BOTH),
    ({"train.jsonl": ROWS[:2], "test.jsonl": ROWS[2:], "dune.json": ROWS[:1]}, "", f"{A}|{A}|{C}|", f"{B}|{B}|{D}|"),
    ({"x.csv": f"id,text\n1,{A + B}\n2,\n3,{C + D}\n"}, "x.csv", *BOTH), (PILE, data.PILE, "ab|cd|e|", "fg|"),
    ({"train.json": ["ab"], "validation.json": ["cd"], "test.json": ["ef"]}, "a/set", "ab|", "cd|"),
    ({"train.json": ["ab"], "test.json": ["ef"]}, "a/set", "ab|", "ef|"), ({"train.json": [A + B]}, "a/set", f"{A}|", f"{B}|")])
def test_text_is_read_by_document_and_split(tmp_path, monkeypatch, files, place, train, held_out):
    for name, content in files.items():
        write_text(tmp_path / "text" / name, content)
    load_dataset, on_hub = data.load_dataset, dict.fromkeys(("a/set", data.PILE), str(tmp_path / "text"))
    monkeypatch.setattr(data, "load_dataset", lambda path, *args, **more: load_dataset(on_hub.get(path, path), *args, **more))
    if place not in on_hub:
        place = tmp_path / "text" / place
        (tmp_path / "text" / "loop").symlink_to(tmp_path / "text")  # each file counts once
    for part, expected in ((False, train), (True, held_out)):
        assert sorted(text_at(place, part).split("|")) == sorted(expected.split("|"))
    numbers = [number for number, _ in itertools.groupby(data.token_rows(str(place), Letters(), 1), lambda row: row["document"])]
    assert numbers == sorted(set(numbers)) and len(numbers) == train.count("|")

@pytest.mark.parametrize("name, content", [
    ("x.txt", b""), ("x.txt", NOISE), ("x.jsonl", b""), ("x.jsonl", NOISE), ("x.parquet", NOISE), ("x.json", b'{"no": "text"}'),
    ("x.rst", b"unknown suffix" * 99), ("x.ndjson", b'{"text": "unknown"}' * 99), ("x.jsonl.gz", gzip.compress(NOISE)[:5000]),
    ("x.jsonl.zst", zstandard.compress(b'{"text": "ab"}' * 99)[:-9]), ("x.txt.gz", gzip.compress(NOISE)[:5000]),
    ("x.txt.zst", zstandard.compress(b"abcd" * 99)[:-9]), ("mixed.json", b'{"text": "rows beside plain text"}'),
    ("mixed.rst", b"an unknown suffix beside plain text")], ids=lambda part: str(part)[:30])
def test_corrupt_unknown_or_mixed_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content), (tmp_path / "text.txt").write_text(A + B)
    place = tmp_path if "mixed" in name else tmp_path / name
    word = "one kind" if re.search("mixed|rst|ndjson", name) else "--data"
    with pytest.raises(lft.InputError, match="--data") as caught:
        data.token_rows(str(place), Letters(), 80)
    assert word in f"{caught.value} {caught.value.__cause__}"

@pytest.mark.parametrize("streamed", [False, True])
def test_training_rows_come_once_in_a_pass_and_keep_their_place(text, stream, streamed):
    place = stream if streamed else text
    rows_of = lambda *more_text, **more: data.training_rows([str(place), *map(str, more_text)], TOKENIZER, 32, **more)
    taken = lambda n, *more_text, **more: [row["ids"] for row in itertools.islice(rows_of(*more_text, **more), n)]
    everything, rows = [row["ids"] for row in data.token_rows(str(place), TOKENIZER, 32)], rows_of()
    one, n = taken(len(everything)), len(everything)
    assert n > 30 and sorted(one) == sorted(everything) and taken(2 * n) == one * 2
    assert streamed or (one != everything and taken(n, seed=1) != one)  # plain text is shuffled
    states = [json.dumps(rows.state_dict()) for _ in itertools.islice(rows, n + 21)]
    for after in (0, 1, 40, n - 2, n - 1, n, n + 20):
        again = rows_of()
        again.load_state_dict(json.loads(states[after]))
        assert [row["ids"] for row in itertools.islice(again, 60)] == (one * 3)[after + 1 : after + 61]
    other = text if streamed else stream  # two texts take turns
    turns, rows = taken(4 * n, other), rows_of(other)
    assert turns[::2] == one * 2 and turns[1::2] == [row["ids"] for row in itertools.islice(data.training_rows([str(other)], TOKENIZER, 32), 2 * n)]
    states = [json.dumps(rows.state_dict()) for _ in itertools.islice(rows, 3 * n)]
    for after in (0, 1, n, 2 * n - 1, 2 * n, 3 * n - 1):
        again = rows_of(other)
        again.load_state_dict(json.loads(states[after]))
        assert [row["ids"] for row in itertools.islice(again, n // 2)] == turns[after + 1 : after + 1 + n // 2]
    if streamed:  # of two files each process reads one
        parts = [text_at(place, rank=rank, world_size=2) for rank in (0, 1)]
        assert "".join(parts) == text_at(place) and min(map(len, parts)) > 1000
        place = stream / "1.jsonl.zst"
    shares = [taken(8, rank=rank, world_size=2) for rank in (0, 1)]  # of one file, every other row
    assert [*itertools.chain(*zip(*shares))] == taken(16)

@pytest.mark.parametrize("lengths", [[9], [1, 1], [5, 1, 6, 2, 2], [3] * 10])
def test_validation_and_test_share_at_most_one_document(monkeypatch, lengths):
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    found, n = {"ids": [[i, i, i, i] for i in range(len(numbers))], "document": numbers}, len(numbers)
    monkeypatch.setattr(data, "token_rows", lambda *_, **__: data.Dataset.from_dict(found))
    halves, owners = zip(*(data.held_out_rows(["a"], None, 4, 10**6, test=test) for test in (False, True)))
    assert torch.cat(halves).tolist() == found["ids"] and torch.cat(owners).tolist() == numbers and abs(len(halves[0]) - n / 2) < 1
    assert len({*owners[0].tolist()} & {*owners[1].tolist()}) <= 1
    two, of = data.held_out_rows(["a", "b"], None, 4, 10**6)
    assert torch.equal(two, torch.cat([halves[0]] * 2)) and len(of.unique()) == 2 * len(owners[0].unique())
    found |= {"ids": [[i] * 4 for i in range(200)], "document": [0] * 200}  # ten rows, spread over the half
    few, _ = data.held_out_rows(["a"], None, 4, 40, test=True)
    assert few[:, 0].tolist() == pytest.approx([100 + 11 * i for i in range(10)], abs=1) and few[-1, 0] == 199
    found |= {"ids": [[1]], "document": [0]}
    with pytest.raises(lft.InputError, match="two held-out rows"):
        data.held_out_rows(["a"], None, 1, 40)

def test_of_many_files_whole_ones_are_held_out(tmp_path):
    names = [f"{folder}/{number}" for folder in "abc" for number in range(40)]
    for name in names:
        write_text(tmp_path / f"{name}.txt", f"{name} is whole")
    train, held_out = ({*text_at(tmp_path, part).split("|")} - {""} for part in (False, True))
    assert train | held_out == {f"{name} is whole" for name in names} and not train & held_out and 1 <= len(held_out) <= 15

# ---- Evaluation
def linear_by_hand(teacher, rows, start, end, power):
    """Weighted least squares of x1 on [x0, 1] in double precision, over the library's own states; not for the last layer."""
    x0, x1 = (teacher(rows, output_hidden_states=True).hidden_states[i].flatten(0, 1).double() for i in (start, end))
    root = x1.square().mean(-1, keepdim=True).sqrt() ** (-power / 2)  # the square root of each token's weight
    solution = torch.linalg.lstsq(root * torch.cat([x0, torch.ones(len(x0), 1)], 1), root * x1).solution.float()
    linear = eval_kl.LinearLayer(32, 32).requires_grad_(False)
    linear.weight.data, linear.bias.data = solution[:-1].T.contiguous(), solution[-1]
    return linear

@pytest.mark.parametrize("start, end, power, n", [(1, 5, 2.0, 2), (0, 12, 1.0, 3), (4, 6, None, None)])
def test_table_rows_equal_their_models(start, end, power, n, capsys):
    teacher = random_teacher(num_hidden_layers=13)
    rows, documents, fit_rows = random_rows(60, 24), torch.arange(60) // 2, random_rows(399, 24)[200:]
    student = student_of(teacher, start, end, "midpoint", 5)
    student.config.training = {"token_power": power}
    table = {row["name"]: row for row in eval_kl.table(teacher, student, rows, documents, fit_rows if power else None)}
    teacher_logits, span, places, means = teacher(rows).logits, f"{start}..{end - 1}", {"teacher": "-"}, {}
    kl_by_row = lambda model: double_kl(teacher_logits, model(rows, use_cache=False).logits).mean(1)
    patched = lambda i, j: lft.replace_span(teacher, i, j, linear_by_hand(teacher, fit_rows, i, j, power))
    models = {f"LFT {solver} x{k}": student_of(teacher, start, end, solver, k) for solver in lft.SOLVERS for k in (1, 3, 5)}
    models |= {"teacher": teacher, "span dropped": lft.replace_span(teacher, start, end)}
    if power:
        skips = {i: lft.replace_span(teacher, i, i + n) for i in range(start, end - n + 1)}
        kls = {i: kl_by_row(model) for i, model in skips.items()}
        best, means[f"skip {n}, mean inside span"] = min(kls, key=lambda i: kls[i].mean()), sum(kls.values()) / len(kls)
        for where, i in (("best inside span", best), ("first of span", start), ("patched", best)):
            places[f"skip {n}, {where}"] = f"{i}..{i + n - 1}"
            models[f"skip {n}, {where}"] = patched(i, i + n) if where == "patched" else skips[i]
    models |= {"linear map": patched(start, end)} if power else {}
    assert table.keys() == models.keys() | means.keys() and [*table][:2] == ["teacher", "LFT euler x1"]
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, end), rows, start)
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
            model.flow.velocity.register_forward_hook(lambda *_: evaluations.append(1)), model(rows)
        assert row["evaluations"] == len(evaluations)
        if name.startswith("LFT") or name == "linear map":
            nmse = (layers_of(model)[start](x0, **context) - x1).double().square().sum(-1) / x1.double().square().sum(-1)
            assert row["nmse"] == pytest.approx(nmse.mean().item(), rel=1e-3)
        assert "patched" in name or (row["nmse"] is None) != (name.startswith("LFT") or name == "linear map")
    for name, kl in means.items():
        assert table[name]["kl"] == pytest.approx(kl.mean().item(), rel=1e-3) and table[name]["kl_stderr"] == stderr(kl)
        ratio = f"{table['LFT midpoint x5']['kl'] / table[name]['kl']:.2f} mean inside span"
        eval_kl.print_table([*table.values()], student.config, "title")
        assert ratio in (first := capsys.readouterr().out.split("\n")[0]) and ("Flow Walking: 0.79" in first) == (end == 12)
    assert table["teacher"]["kl"] == 0
    assert eval_kl.standard_error(random_rows(9).float(), torch.zeros(9)) is None  # of one document

def test_forward_time_on_a_fake_clock(monkeypatch):
    """The machine is twice as slow in every other batch, and a model's first forward pass takes a minute more."""
    clock, teacher, models = [0.0], lft.share(SMALL), {n: lft.replace_span(SMALL, n, n + 1) for n in (1, 2)}
    monkeypatch.setattr(eval_kl.time, "perf_counter", lambda: clock[0])
    for model, seconds in ((teacher, 1.0), (models[1], 0.5), (models[2], 3.0)):
        spend = lambda *_, s=seconds, n=itertools.count(): clock.__setitem__(0, clock[0] + s * (1 + (i := next(n)) % 2) + 60 * (not i))
        model.register_forward_hook(spend)
    scores = eval_kl.evaluate(teacher, models, random_rows(7 * 32, 32), 1, 4)
    assert [scores[n]["time"].median().item() for n in (1, 2)] == pytest.approx([0.5, 3.0])

# ---- Runs
checkpoint_of = lambda run: torch.load(run / "checkpoint.pt", weights_only=True)
listing = lambda folder: sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))

@pytest.fixture
def standard(teacher_folder, text):
    return {"teacher": teacher_folder, "data": text, "start": 1, "end": 4, "max_steps": 3, "device": "cpu"}

def as_flags(options):
    return [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value) if part is not True]

@pytest.fixture
def run(monkeypatch, capsys, standard):
    """Call a script's main as its command would, in float32. Returns what it printed, or checks that one sentence refuses it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train_fm, "autocast", lambda device: contextlib.nullcontext())
    def run(module, *args, refused=None, **options):
        options = options if module is eval_kl else standard | options
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args), *as_flags(options)])
        capsys.readouterr()
        with contextlib.nullcontext() if refused is None else pytest.raises(SystemExit, match="2"):
            lft.run_script(module.main)
        [signal.signal(number, handler) for number, handler in handlers.items()]
        printed, errors = capsys.readouterr()
        error = "".join(re.findall(r"error: [^\r]*", errors))
        assert printed.isascii() and error.isascii()  # a Windows console cannot show more
        assert error == "" if refused is None else refused in error and error.count("\n") == 1
        return printed
    return run

def record_times(setattr):
    """The times that the losses of the scripts draw from now on, one tensor for each micro-batch."""
    times, record = [], lambda loss_of: lambda u, *args, **more: loss_of(recorder(u, times), *args, **more)
    setattr(train_fm, "flow_matching_loss", record(train_fm.flow_matching_loss))
    return times

def logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("tokens_per_second") > 0 for line in lines)  # it depends on the clock
    return lines

def assert_equal_runs(one, two):
    checkpoints = [checkpoint_of(run) for run in (one, two)]
    assert all(is_equal(*(checkpoint[key] for checkpoint in checkpoints)) for key in ("options", "step", "trained"))
    for run in (one, two):
        assert is_equal(eval_kl.load_student(run).flow.velocity.state_dict(), checkpoints[0]["trained"][0])

def rows_by_hand(seq_len, part):
    """Training, validation or test rows of SOURCE, which is one document: cut without data.py."""
    cut = slice(0, int(0.95 * len(SOURCE))) if part == "training" else slice(int(0.95 * len(SOURCE)), None)
    tokens = TOKENIZER(SOURCE[cut])["input_ids"] + [0]
    rows = torch.tensor(tokens[: len(tokens) // seq_len * seq_len]).view(-1, seq_len)
    return {"training": rows, "validation": rows[: len(rows) // 2], "test": rows[len(rows) // 2 :]}[part]

def first_rows(text, n, seed=0):
    return torch.tensor([row["ids"] for _, row in zip(range(n), data.training_rows([str(text)], TOKENIZER, 32, seed))])

ELSEWHERE = """
import importlib.util, torch, transformers
assert importlib.util.find_spec("lft") is None
student = transformers.AutoModelForCausalLM.from_pretrained("../run", trust_remote_code=True)
ids, logits, text = torch.load("../expected")
torch.testing.assert_close(student(ids).logits, logits, atol=1e-5, rtol=1e-5)
assert torch.equal(student.generate(ids, do_sample=False), text)
assert student.generation_config.eos_token_id == [0, 5] and student.generation_config.repetition_penalty == 1.3
assert transformers.AutoTokenizer.from_pretrained("../run").eos_token_id == 0
"""

def test_run_is_a_model_and_its_scores_are_true(run, tmp_path, teacher_folder, text):
    """And in a fresh process, in another folder, transformers alone finds the same logits, text and generation settings."""
    out, table = tmp_path / "run", tmp_path / "table.json"
    printed = run(train_fw, out=out, solver="euler", k=2, seq_len=16)
    assert "layers 1..3" in printed and str(out) in printed.splitlines()[-1] and not any(path.is_dir() for path in out.iterdir())
    student, teacher = eval_kl.load_student(out), random_teacher(vocab_size=4096)
    config, training = student.config, student.config.training
    assert (config.start, config.end, config.solver, config.k, config.teacher) == (1, 4, "euler", 2, str(teacher_folder))
    assert (training["tokens"], training["max_steps"], training["data"]) == (3 * 8 * 16, 3, [str(text)])
    kl_on = lambda part: double_kl(*(model(rows_by_hand(16, part)).logits for model in (teacher, student))).mean().item()
    assert logged(out)[-1]["held_out_kl"] == pytest.approx(kl_on("validation"), rel=1e-4)
    printed = run(eval_kl, out, json=table, no_baselines=True)
    found, n = json.loads(table.read_text()), rows_by_hand(16, "test").numel()
    assert [found[key] for key in ("start", "end", "seq_len", "tokens", "data")] == [1, 4, 16, n, [str(text)]]
    for row in found["rows"]:
        shown = [row["kl"], row["perplexity"], row["top1_agreement"], row["parameters"] / 1e6]
        assert re.search("^{} .*{:.4f}.*{:.2f}.*{:.1%}.*{:.2f}".format(re.escape(row["name"]), *shown), printed, re.M)
        assert row["name"] != "LFT euler x2" or row["kl"] == pytest.approx(kl_on("test"), rel=1e-4)
    torch.save((IDS, student(IDS).logits, student.generate(IDS, do_sample=False)), tmp_path / "expected")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path / "elsewhere", env=environment, check=True)

def test_eval_scores_the_right_text_and_fits_on_the_runs_own(run, tmp_path, monkeypatch, teacher_folder):
    out, other, called = tmp_path / "run", tmp_path / "other.txt", []
    run(train_fw, out=out, seq_len=16, token_power=0.5), other.write_text("".join(f"sentence {n} of this\n" for n in range(2000)))
    monkeypatch.setattr(eval_kl, "table", lambda *args: called.append(args) or [])
    for more in ({}, {"data": other, "tokens": 64, "teacher": teacher_folder}):
        run(eval_kl, out, **more)
        teacher, student, rows, documents, fit_rows = called.pop()
        assert (student.config.start, student.config.end, student.config.training["token_power"]) == (1, 4, 0.5)
        assert {*map(tuple, fit_rows.tolist())} == {*map(tuple, rows_by_hand(16, "training").tolist())}
        numbers = [int(number) for number in re.findall(r"sentence (\d{4}) ", TOKENIZER.decode(rows.flatten()))]
        assert rows.numel() == 64 and min(numbers) > 1945 if more else torch.equal(rows, rows_by_hand(16, "test"))

def test_readme_fork_trains_and_resumes(run, tmp_path):
    readme, fork = Path(lft.__file__).with_name("README.md").read_text(), ModuleType("fork")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(next(block for block in blocks if "_loss(" in block and "def main(" in block), fork.__dict__)
    run(fork, out=tmp_path), run(fork, out=tmp_path, resume=True, max_steps=4)
    assert checkpoint_of(tmp_path)["step"] == 4 and eval_kl.load_student(tmp_path).config.training["method"] not in ("fm", "fw")

def test_loop_takes_the_steps_by_hand(run, tmp_path, monkeypatch, text):
    monkeypatch.setattr(lft.LFTForCausalLM, "velocity_class", TwoAttentions)
    options = {"batch_size": 3, "seed": 5, "accumulate": 3, "max_steps": 4}
    run(train_fm, out=tmp_path / "start", lr=0, token_power=0, **options)
    drawn = record_times(monkeypatch.setattr)
    run(train_fm, out=tmp_path / "run", lr=0.005, **options)
    start, trained = (eval_kl.load_student(tmp_path / name).flow.velocity for name in ("start", "run"))
    velocity, trunk, losses, kinds = copy.deepcopy(start).requires_grad_(), lft.trunk_of(random_teacher(vocab_size=4096), 4), [], {}
    for name, weight in velocity.named_parameters():
        kinds.setdefault("vectors" if weight.ndim < 2 else "time_mlp" if "time_mlp" in name else "matrices", {})[name] = weight
    optimizers = [torch.optim.Muon(kinds["matrices"].values(), momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]
    for kind, decay in (("time_mlp", 0.01), ("vectors", 0.0)):
        optimizers.append(torch.optim.AdamW(kinds[kind].values(), betas=(0.9, 0.95), weight_decay=decay))
    for step, times, ids in zip((1, 2, 3, 4), torch.cat(drawn).split(3), first_rows(text, 12, seed=5).split(3)):
        x0, x1, context = lft.hidden_pair(trunk, ids, 1)
        error = velocity((1 - times) * x0 + times * x1, times, **context) - (x1 - x0)
        loss = (error.square().mean(-1) / x1.square().mean(-1).sqrt()).mean()
        loss.backward()
        norm = sum(w.grad.square().sum() for w in velocity.parameters()).sqrt()
        for w in velocity.parameters():
            w.grad /= max(norm, 1)  # clipped at norm 1
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.005 * (5 - step) / 4
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    (line,), (_, *states) = logged(tmp_path / "run"), checkpoint_of(tmp_path / "run")["trained"]
    groups = [(group["weight_decay"], len(group["params"])) for state in states for group in state["param_groups"]]
    assert groups == [(decay, len(kinds[kind])) for kind, decay in (("matrices", 0.01), ("time_mlp", 0.01), ("vectors", 0.0))]
    assert [line["gradient_norm"], line["loss"]] == pytest.approx([norm.item(), sum(losses) / 4], rel=1e-3)
    for kind in kinds.values():  # not each weight: where the true gradient is 0, as of a bias of the keys, AdamW follows rounding
        apart = lambda other: sum((weight - other.state_dict()[name]).square().sum() for name, weight in kind.items())
        assert apart(trained) < 0.001 * apart(start)

def test_seeds_steps_and_micro_batches_draw_their_own_times(run, monkeypatch, tmp_path):
    drawn = record_times(monkeypatch.setattr)
    for name, seed in enumerate((0, 1, 2, 1)):
        run(train_fm, seed=seed, out=tmp_path / str(name), accumulate=2, max_steps=4)
    times = torch.cat(drawn).flatten()
    assert len(set(times.tolist())) == 3 * 4 * 8 and uniform(times[:96]) and torch.equal(times[96:], times[32:64])

OWN = {"k": 2, "solver": "euler", "times": "equal", "alpha": 0.5, "logit_weight": 2.0, "token_power": 0.0}
@pytest.mark.parametrize("module, options, expected", [
    (train_fm, {}, ("fm", 6, 12, "first", "midpoint", 1)), (train_fm, {"token_power": 0}, ("fm", 6, 12, "first", "midpoint", 1)),
    (train_fw, {}, ("fw", 6, 18, "middle", "midpoint", 3)), (train_fw, OWN, ("fw", 6, 18, "middle", "euler", 2))])
def test_options_reach_the_loss_and_default_to_its_own(monkeypatch, module, options, expected):
    called, loss_of = [], module.flow_matching_loss if module is train_fm else module.flow_walking_loss
    monkeypatch.setattr(module, "train", lambda args, loss, solver, k: called.append((args, loss, solver, k)))
    monkeypatch.setattr(sys, "argv", ["script", *as_flags(options)]), module.main()
    ((args, loss, solver, k),) = called
    assert (args.method, args.start, args.end, args.init, solver, k) == expected and loss.func is loss_of
    assert (args.batch_size, args.lr, args.seed, args.resume, args.accumulate) == (8, 1 / 64, 0, False, 1)
    defaults = inspect.signature(loss_of).parameters
    assert loss.keywords == {name: defaults[name].default for name in loss.keywords} | options

def test_loss_gets_the_teachers_logits(run, tmp_path, monkeypatch, text):
    seen, loss_of = [], train_fw.flow_walking_loss
    spy = lambda u, x0, x1, logits, **own: seen.append(logits(x1)) or loss_of(u, x0, x1, **own)
    monkeypatch.setattr(train_fw, "flow_walking_loss", spy), run(train_fw, max_steps=1, out=tmp_path)
    close(seen[0], random_teacher(vocab_size=4096)(first_rows(text, 8)).logits)

@pytest.mark.parametrize("init, start, end, layer", [("first", 0, 3, 0), ("middle", 1, 6, 3), (5, 1, 4, 5), (0, 2, 4, 0)])
def test_init_names_the_layer_to_start_from(run, tmp_path, init, start, end, layer):
    run(train_fm, start=start, end=end, init=init, max_steps=1, lr=0, out=tmp_path)
    found = eval_kl.load_student(tmp_path).flow.velocity.mlp.dense_h_to_4h.weight
    weights = [each.mlp.dense_h_to_4h.weight for each in layers_of(random_teacher(vocab_size=4096))]
    assert [number for number, weight in enumerate(weights) if torch.equal(weight, found)] == [layer]

def test_log_grows_while_training(run, tmp_path, monkeypatch):
    seen, evaluate = [], train_fm.evaluate
    monkeypatch.setattr(train_fm, "evaluate", lambda *args: seen.append(len(logged(tmp_path))) or evaluate(*args))
    run(train_fm, out=tmp_path, max_steps=25, save_every=22)
    lines = logged(tmp_path)
    assert [(line["step"], line["tokens"]) for line in lines] == [(n, n * 8 * 32) for n in (10, 20, 22, 25)] and seen == [2, 3]
    assert ["held_out_kl" in line for line in lines] == ["held_out_nmse" in line for line in lines] == [False, False, True, True]

@pytest.mark.parametrize("steps", [1, 10, 50, 2000, 320_000])
def test_learning_rate_rises_shortly_and_falls_to_nothing(steps):
    lr = torch.tensor([train_fm.learning_rate(step, SimpleNamespace(lr=0.5, max_steps=steps)) for step in range(1, steps + 1)])
    assert (peak := lr.argmax()) <= steps / 10 and 0.45 <= lr[peak] <= 0.5 and (lr[: peak + 1].diff() > 0).all()
    close(lr[steps // 10 :], 0.5 * torch.arange(steps - steps // 10, 0, -1) / steps, atol=1e-6)
    assert steps < 2000 or lr[9] == pytest.approx(10 * lr[0].item(), rel=0.01)

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_trains_the_same(run, tmp_path):
    for name, more in (("plain", {}), ("fast", {"compile": True})):
        run(train_fm, start=0, end=1, init=4, max_steps=40, out=tmp_path / name, **more)
    plain, fast = ([line["loss"] for line in logged(tmp_path / name)] for name in ("plain", "fast"))
    assert plain[-1] < 0.9 * plain[0] and fast == pytest.approx(plain, rel=0.01)

# ---- Runs that stop and resume
@pytest.mark.parametrize("module, streamed, parts, number", [*zip(
    (train_fm, train_fm, train_fw, train_fw), (False, True, False, True), (1, 2, 2, 1), 2 * (signal.SIGINT, signal.SIGTERM))])
def test_interrupted_run_resumes_exactly(run, tmp_path, monkeypatch, module, streamed, parts, number, stream, teacher_folder):
    """Bit for bit, over the end of a pass through the streamed text, and with the teacher moved."""
    options = {"max_steps": 14, "save_every": 4, "accumulate": parts} | ({"data": stream} if streamed else {})
    whole, part, teacher = (tmp_path / name for name in ("whole", "part", "teacher"))
    run(module, out=whole, **options)
    name, calls = "flow_matching_loss" if module is train_fm else "flow_walking_loss", itertools.count(1)
    loss_of, stop = getattr(module, name), lambda: signal.raise_signal(number) if next(calls) == 6 * parts + 1 else None
    monkeypatch.setattr(module, name, lambda *args, **more: stop() or loss_of(*args, **more))
    run(module, out=part, **options)
    assert checkpoint_of(part)["step"] == 7 and eval_kl.load_student(part).config.training["tokens"] == 7 * 8 * 32
    with open(part / "log.jsonl", "a") as log:  # as of a run that was killed while it wrote what comes after the checkpoint
        log.write('{"step": 8, "tokens": 0}\n{"step": 9, "tok')
    shutil.copytree(teacher_folder, teacher), run(module, out=part, resume=True, **options | {"teacher": teacher})
    assert_equal_runs(whole, part)
    assert [line["step"] for line in logged(part)] == [4, 7, 8, 10, 12, 14]
    assert [line for line in logged(part) if line["step"] not in (7, 8)] == [line for line in logged(whole) if line["step"] != 8]

def test_changed_options_are_refused_on_resume(run, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "copy.txt")
    options = {"k": 2, "solver": "euler", "alpha": 0.5, "token_power": 0, "out": "run"}
    run(train_fw, **options)
    before = listing(tmp_path)
    changed = {"start": 2, "end": 3, "init": "first", "k": 3, "solver": "midpoint", "alpha": 0.3, "token_power": 1, "seed": 1,
               "logit_weight": 1, "data": "copy.txt", "lr": 0.01, "batch_size": 4, "accumulate": 2, "seq_len": 16, "max_steps": 2}
    for name, value in changed.items():
        run(train_fw, **options | {"resume": True, name: value}, refused="max-steps" if name == "max_steps" else f"with {name} ")
    run(train_fm, out="run", resume=True, token_power=0, init="middle", refused="run was trained with ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(train_fw, **options, resume=True, refused="with world_size 1")
    assert listing(tmp_path) == before

@pytest.mark.parametrize("word, change", [
    ("teacher_sha256", lambda folder: edit_weights(folder, lambda w: w["gpt_neox.layers.5.mlp.dense_h_to_4h.bias"].add_(1e-4))),
    ("teacher_sha256", lambda folder: edit_json(folder / "config.json", lambda config: config.update(hidden_act="relu"))),
    ("validation_sha256", lambda folder: edit_json(folder / "tokenizer.json", swap_two_tokens)),
    ("validation_sha256", lambda folder: (folder / "text.txt").write_text(SOURCE[:-500]))])
def test_changed_teacher_tokenizer_or_text_is_refused(run, tmp_path, teacher_folder, word, change):
    folder, out = shutil.copytree(teacher_folder, tmp_path / "teacher"), tmp_path / "run"
    (folder / "text.txt").write_text(SOURCE)
    run(train_fm, out=out, teacher=folder, data=folder / "text.txt")
    change(folder)
    run(train_fm, out=out, teacher=folder, data=folder / "text.txt", resume=True, refused=word), run(eval_kl, out, refused=word)

def in_process(module, options, environment, interrupt, times):
    """What a process of its own does: a script's main, with a Ctrl-C at some losses; the times that it draws are saved."""
    os.environ.update(environment), torch.set_num_threads(1)
    train_fm.tqdm.set_lock(threading.RLock())  # tqdm's own is shared between processes, and one that is killed may hold it
    drawn, calls = record_times(setattr), itertools.count(1)
    loss_of, stop = train_fm.flow_matching_loss, lambda: signal.raise_signal(signal.SIGINT) if next(calls) in interrupt else None
    train_fm.flow_matching_loss = lambda *args, **more: stop() or loss_of(*args, **more)
    train_fm.autocast = lambda device: contextlib.nullcontext()
    sys.argv = [module, *as_flags(options)]
    lft.run_script(globals()[module].main)
    torch.save(drawn, times) if times else None

def start(module, options, environment={}, interrupt=(), times=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lft"])  # so that each process has loaded the libraries already
    process = context.Process(target=in_process, args=(module.__name__, options, environment, interrupt, times))
    process.start()
    return process

def exit_codes(*processes):
    for process in processes:
        process.join(300), process.kill()  # one that hangs has no exit code
    return [process.exitcode for process in processes]

def test_second_ctrl_c_ends_at_once(standard, tmp_path):
    assert exit_codes(start(train_fm, standard | {"accumulate": 2, "out": tmp_path}, interrupt=(1, 2))) == [-signal.SIGINT]
    assert not (tmp_path / "checkpoint.pt").exists()

def test_one_of_two_runs_in_one_folder_fails(standard, tmp_path):
    both = [start(train_fm, standard | {"out": tmp_path}) for _ in (1, 2)]
    assert sorted(exit_codes(*both)) == [0, 2] and checkpoint_of(tmp_path)["step"] == 3

def test_killed_run_resumes_exactly(standard, tmp_path):
    """kill -9 at random moments, while saving too, ends in the run that nobody killed."""
    kills, out, whole, chance = int(os.environ.get("KILLS", 4)), tmp_path / "run", tmp_path / "whole", random.Random(0)
    options, checkpoint = standard | {"batch_size": 1, "max_steps": 20 + 20 * kills, "save_every": 1}, out / "checkpoint.pt"
    saved = lambda: checkpoint.exists() and checkpoint.read_bytes()
    for kill in range(kills + 1):
        before = saved() or shutil.rmtree(out, ignore_errors=True)
        process = start(train_fm, options | {"out": out} | ({"resume": True} if before else {}))
        while kill < kills and process.is_alive() and kill % 3 and saved() in (before, False):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1 if kill % 3 else 1.0))  # two of three while it trains, one at any time
        kill == kills or process.kill()
        assert exit_codes(process) == [-signal.SIGKILL if kill < kills else 0]
    assert exit_codes(start(train_fm, options | {"out": whole})) == [0]
    assert_equal_runs(whole, out)
    assert logged(whole) == logged(out) and [line["step"] for line in logged(out)] == [*range(1, 21 + 20 * kills)]

def run_two(module, options, interrupt=(), times=(None, None)):
    """Run a script in two processes, as torchrun starts them; the second may get a Ctrl-C."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [start(module, options, shared | {"RANK": str(rank)}, interrupt * rank, times[rank]) for rank in (0, 1)]
    assert exit_codes(*processes) == [0, 0]

def test_processes_and_micro_batches_equal_the_joint_batch(run, standard, tmp_path):
    """With one Euler step Flow Walking draws no times, so all of these take the same steps."""
    options, (one, parts, both) = {"k": 1, "solver": "euler", "max_steps": 4, "lr": 0.001}, (tmp_path / name for name in "abc")
    run(train_fw, out=one, **options), run(train_fw, out=parts, accumulate=4, **options)
    run_two(train_fw, standard | options | {"out": both, "accumulate": 2})
    for out in (parts, both):
        assert logged(out)[-1] == {name: pytest.approx(value, rel=1e-4) for name, value in logged(one)[-1].items()}
        for name, weight in load_file(one / "model.safetensors").items():
            assert (weight - load_file(out / "model.safetensors")[name]).norm() <= 1e-4 * weight.norm() + 1e-4

def test_two_processes_draw_their_own_times_and_resume_exactly(standard, tmp_path, stream):
    """One of them is interrupted, where one of the files has ended and the other has not."""
    options, files = standard | {"data": stream, "batch_size": 16, "max_steps": 8}, (tmp_path / "0", tmp_path / "1")
    whole, half = options | {"out": tmp_path / "whole"}, options | {"out": tmp_path / "half"}
    run_two(train_fm, whole, times=files)
    times = torch.cat([each for file in files for each in torch.load(file)]).flatten()
    assert len(times) == 8 * 16 == len(set(times.tolist())) and uniform(times)
    run_two(train_fm, half, interrupt=(4,))
    places = checkpoint_of(half["out"])["text"]
    assert checkpoint_of(half["out"])["step"] == 4 and places[0] != places[1]
    run_two(train_fm, half | {"resume": True}), assert_equal_runs(whole["out"], half["out"])

# ---- Mistakes and accidents
@pytest.mark.parametrize("kind, name, call, spoil", [
    ("loss", "flow_matching_loss", 5, lambda loss: loss + math.inf),
    ("gradient_norm", "flow_matching_loss", 5, lambda loss: loss + (loss - loss.detach()).abs().sqrt()),  # 0, its gradient 0/0
    ("held_out_kl", "evaluate", 2, lambda scores: {"student": scores["student"] | {"kl": torch.ones(1) / 0}})])
def test_non_finite_numbers_stop_the_run(run, tmp_path, monkeypatch, kind, name, call, spoil):
    calls, real = itertools.count(1), getattr(train_fm, name)
    choose = lambda value: spoil(value) if next(calls) == call else value
    monkeypatch.setattr(train_fm, name, lambda *args, **more: choose(real(*args, **more)))
    run(train_fm, out=tmp_path, max_steps=6, save_every=3, refused=kind)
    assert checkpoint_of(tmp_path)["step"] == 3 and not (tmp_path / "model.safetensors").exists() and len(logged(tmp_path)) == 1

def test_full_disk_keeps_the_earlier_checkpoint(run, tmp_path, monkeypatch):
    limit, save_checkpoint = resource.getrlimit(resource.RLIMIT_FSIZE), train_fm.save_checkpoint
    def on_a_full_disk(folder, **state):
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if state["step"] == 2 else limit[0], limit[1]))  # of each file
            save_checkpoint(folder, **state)
    monkeypatch.setattr(train_fm, "save_checkpoint", on_a_full_disk), run(train_fm, out=tmp_path, save_every=1, refused="")
    assert checkpoint_of(tmp_path)["step"] == 1

def test_interrupted_save_leaves_no_stale_model(run, tmp_path, monkeypatch):
    run(train_fm, out=tmp_path)
    save = lft.LFTForCausalLM.save_pretrained
    def fail(student, folder, **options):
        if Path(folder) == tmp_path:
            raise OSError("disk full")
        save(student, folder, **options)
    monkeypatch.setattr(lft.LFTForCausalLM, "save_pretrained", fail)
    run(train_fm, out=tmp_path, resume=True, max_steps=4, refused="disk full"), run(eval_kl, tmp_path, refused="--resume")

def test_closed_stdout_keeps_checkpoint(standard, tmp_path):
    command = [sys.executable, train_fm.__file__, *as_flags(standard | {"save_every": 1, "out": tmp_path})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert b"layers 1..3" in process.stdout.readline()
    process.stdout.close()
    assert process.wait() != 0 and checkpoint_of(tmp_path)["step"] >= 1

@pytest.mark.parametrize("options, word", [
    ({"start": 4}, "6 layers"), ({"start": -1}, "layer"), ({"end": 7}, "layer"), ({"teacher": "no-such/model"}, "no-such/model"),
    ({"teacher": "no_tokenizer"}, "no_tokenizer"), ({"teacher": "headless"}, "missing"), ({"teacher": "shallow"}, "unexpected"),
    ({"data": "no-such/data-set"}, "--data"), ({"data": "no/such/*.txt"}, "--data"), ({"data": "short.txt"}, "training row"),
    ({"seq_len": 65}, "up to 64"), ({"batch_size": 3, "accumulate": 2}, "multiples"), ({"out": "taken"}, "taken holds a run"),
    ({"out": "short.txt"}, "short.txt"), ({"out": "missing", "resume": True}, "missing"), ({"out": "cut", "resume": True}, "cut"),
    ({"out": "other", "resume": True}, "other"), ({"init": 6}, "layer 6"), ({"init": -1}, "layer"),
    ({"device": "nonsense"}, "--device")])
def test_mistake_in_training_ends_in_one_sentence(run, tmp_path, monkeypatch, teacher_folder, options, word):
    monkeypatch.chdir(tmp_path)
    [(tmp_path / folder).mkdir() for folder in ("taken", "cut", "other")]
    Path("taken/log.jsonl").write_text(""), Path("short.txt").write_text("short"), Path("other/checkpoint.pt").write_text("text")
    torch.save({"options": {}, "weights": torch.zeros(999)}, "cut/checkpoint.pt"), os.truncate("cut/checkpoint.pt", 999)
    [shutil.copytree(teacher_folder, folder) for folder in ("no_tokenizer", "headless", "shallow")]
    [path.unlink() for path in Path("no_tokenizer").glob("tokenizer*")]
    edit_weights(tmp_path / "headless", lambda weights: weights.pop("gpt_neox.final_layer_norm.bias"))
    edit_json(tmp_path / "shallow" / "config.json", lambda config: config.update(num_hidden_layers=5))
    before, _ = listing(tmp_path), run(train_fw, **options, refused=word)
    assert listing(tmp_path) == before

def test_mistake_in_evaluation_ends_in_one_sentence(run, tmp_path, monkeypatch):
    out, nowhere = tmp_path / "run", tmp_path / "nowhere"
    run(train_fm, out=out, max_steps=1)
    weights = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(eval_kl, "table", lambda *_: []), run(eval_kl, out, json=nowhere / "table.json", refused="nowhere")
    monkeypatch.setattr(eval_kl, "table", lambda *_: pytest.fail("scored")), run(eval_kl, nowhere, refused="nowhere")
    run(eval_kl, out, teacher=nowhere, refused="nowhere"), run(eval_kl, out, data=nowhere, refused="nowhere")
    lost = ("model.gpt_neox.layers.1.velocity.norm1.weight", "model.gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
    edits = [(name, lambda name=name: edit_weights(out, lambda weights: weights.pop(name))) for name in lost]
    edits += [("more is", lambda: edit_weights(out, lambda weights: weights.update(more=torch.zeros(1))))]
    edits += [("--resume", (out / "model.safetensors").unlink), ("--resume", lambda: os.truncate(out / "model.safetensors", 99))]
    edits += [("unexpected", lambda: monkeypatch.setattr(lft.LFTForCausalLM, "velocity_class", TwoAttentions))]
    for word, edit in edits:
        edit(), run(eval_kl, out, refused=word), (out / "model.safetensors").write_bytes(weights)

# ---- The studies
def call(module, *options):
    sys.argv = [module.__name__, *map(str, options)]
    module.main()

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a random teacher, a text, and a run of flow matching with its table."""
    folder = tmp_path_factory.mktemp("study")
    config = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**config, max_position_embeddings=128, eos_token_id=0)).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(Path(lft.__file__).parent / "tiny_teacher").save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("\n".join(f"line {i} of a text of {i * i} tokens" for i in range(3000)))
    text, run = ["--teacher", folder / "teacher", "--data", folder / "text.txt", "--device", "cpu"], folder / "run"
    options = [*text, "--seq-len", 32, "--max-steps", 3, "--start", 1, "--end", 4, "--lr", 0.001]
    call(train_fm, *options, "--out", run)
    call(eval_kl, run, "--tokens", 128, "--device", "cpu", "--json", run / "table.json")
    teacher, _ = lft.load_teacher(str(folder / "teacher"))
    return SimpleNamespace(folder=folder, run=run, text=text, options=options, teacher=teacher)

def like(run, target, kl, made={}, **training):
    """A copy of the run with other options, its table's KLs raised by `kl`."""
    shutil.copytree(run, target)
    config, table = (json.loads((run / name).read_text()) for name in ("config.json", "table.json"))
    (target / "config.json").write_text(json.dumps(config | {"training": config["training"] | training}))
    rows = [row | {"kl": row["kl"] + kl} for row in table["rows"]]
    (target / "table.json").write_text(json.dumps(table | {"rows": rows} | made))
    return target

def test_recoupling_ratio_is_that_of_the_best_of_all_pairings():
    pairings = torch.tensor([*itertools.permutations(range(6))])
    for seed, copies in itertools.product(range(6), ([0, 1, 2, 3, 4, 5], [0, 0, 2, 3, 4, 4], [0, 0, 0, 0, 4, 5])):
        x0, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x0, x1 = (x0[copies], x0 + 1.5 * noise)[:: 1 if seed % 2 else -1]  # equal states before the span, or after it
        cost = (x0 - x1[pairings]).square().sum(dim=(1, 2))
        own = (pairings == torch.arange(6)).sum(dim=1)[cost < cost.min() + 1e-9].max().item()
        assert spans.recoupling_ratio(x0, x1) == pytest.approx(1 - own / 6)

def test_spans_are_measured_between_the_librarys_states(study, capsys):
    ids = torch.randint(20, (2, 16))
    states = list(study.teacher(ids, output_hidden_states=True).hidden_states)
    _, _, context = lft.hidden_pair(study.teacher.gpt_neox, ids, 5)
    states[6] = study.teacher.gpt_neox.layers[5](states[5], **context)  # the library's own last state comes after the norm
    found = spans.ratios(study.teacher, ids)
    for start, end in itertools.combinations(range(7), 2):
        pairs = [*zip(states[start], states[end])]
        far = [(x1 - x0).norm(dim=1) ** 2 for x0, x1 in pairs]
        share = [(f / x1.norm(dim=1) ** 2).sort().values[7] for f, (_, x1) in zip(far, pairs)]  # torch's median of 16
        expected = sum(spans.recoupling_ratio(*pair) for pair in pairs), sum(share), sum(f.max() / f.sum() for f in far)
        torch.testing.assert_close(2 * found[:, start, end], torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert found[0].isfinite().equal(torch.ones(6, 7).triu(1).bool())
    call(spans, *study.text, "--length", 3, "--rows", 2, "--picture", study.folder / "map.png")
    assert capsys.readouterr().out.count("1..3") == 1 and (study.folder / "map.png").exists()

@pytest.mark.parametrize("name", speed.METHODS)
def test_floor_of_speed_is_what_training_multiplies(name):
    args, cpu = SimpleNamespace(width=128, end=4, batch_size=3, seq_len=64, compile=False), torch.device("cpu")
    loss_of, evaluations = speed.METHODS[name]
    trunk, u, _ = speed.start_training(args, cpu)
    trunk.config._attn_implementation = u.attention.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted:
        speed.step(trunk, u, [], loss_of, torch.randint(50304, (3, 64)))
    floor = sum(2 * a.numel() * b.shape[-1] for a, b in speed.matrix_products(args, trunk.layers[0], evaluations, cpu))
    assert 1 < counted.get_total_flops() / floor < 1.03  # the rest is the time embedding

def test_results_are_means_over_seeds_and_refuse_what_cannot_be_compared(study, tmp_path, capsys):
    run, kl = study.run, {row["name"]: row["kl"] for row in json.loads((study.run / "table.json").read_text())["rows"]}
    runs = [run, like(run, tmp_path / "b", 0.3, seed=1, out="b"), like(run, tmp_path / "c", 0.7, lr=0.1)]
    call(results, *(run / "table.json" for run in runs), "--pictures", tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["time.png", "tokens.png"]
    rows = {line.split(" | ")[2]: line.split(" | ")[3:6] for line in capsys.readouterr().out.splitlines()[2:]}
    base, words = kl["LFT midpoint x1"], "flow matching, 0.000768M, lr {}; midpoint ×1"
    assert rows[words.format(0.001)] == ["2", f"{base + 0.15:.4f} ± {0.3 / 2**0.5:.4f}", "2"]
    assert rows[words.format(0.1)] == ["2", f"{base + 0.7:.4f}", "1"]
    assert len(rows) == 2 * 4 + sum("LFT" not in name for name in kl) - 1
    wrong = {name: like(run, tmp_path / name, 0.0, {name: "another"}, seed=2) for name in ("fingerprint", "tokens", "seq_len", "flow")}
    wrong |= {"table.json": like(run, tmp_path / "none", 0.0, seed=2), "same options and seed": like(run, tmp_path / "twin", 0.0)}
    (tmp_path / "none/table.json").unlink()
    for message, other in wrong.items():
        with pytest.raises(lft.InputError, match=message):
            call(results, run / "table.json", other / "table.json", "--pictures", tmp_path / "q")
    assert not (tmp_path / "q").exists()

def test_rivals_are_the_best_cuts_of_the_span(study):
    """The best place on validation text is found again by hand, and scored on test text."""
    file, reading = study.folder / "rivals.json", {"data": [str(study.folder / "text.txt")], "seq_len": 32}
    call(frontier, file, *study.text, "--start", 1, "--end", 3, 5, "--seq-len", 32, "--longest", 2, "--tokens", 256)
    teacher, reading["tokenizer"] = lft.load_teacher(str(study.folder / "teacher"))
    validation, test = (data.held_out_rows(tokens=n, test=test, **reading)[0] for n, test in ((2048, False), (256, True)))
    fit_rows = torch.tensor([row["ids"] for row in itertools.islice(data.training_rows(**reading), 1024)])
    patch = lambda model, i, n: lft.replace_span(model, i, i + n, eval_kl.fit_linear(teacher, fit_rows, i, i + n))
    kl_on = lambda model, ids: double_kl(teacher(ids).logits, model(ids).logits).mean().item()
    rows = json.loads(file.read_text())
    assert [row["kind"] for row in rows] == ["skip", "patch", "two patches", "skip", "patch"] + 2 * ["skip", "patch", "two patches"]
    for row in rows:
        kind, n, places = row["kind"], row["n"], range(1, row["end"] - row["n"] + 1)
        models = {i: lft.replace_span(teacher, i, i + n) if kind == "skip" else patch(teacher, i, n) for i in places}
        best = models[min(models, key=lambda i: kl_on(models[i], validation))]
        if kind == "two patches":
            i, j = (int(place.split("..")[0]) for place in row["layers"].split(" and "))
            best = patch(models[j], i, n)
            assert i + n <= j
        assert row["kl"] == pytest.approx(kl_on(best, test), rel=1e-3)

@pytest.mark.parametrize("variant", ["timeless", "waypoints", "linear"])
def test_variants_of_walking_train(study, tmp_path, monkeypatch, variant):
    for name in ("make_student", "hidden_pair", "trunk_of"):
        monkeypatch.setattr(train_fm, name, getattr(train_fm, name))  # put back at the end of the test
    call(walks, variant, *study.options, "--end", 5, "--out", tmp_path / variant)
    weights, before = checkpoint_of(tmp_path / variant)["trained"][0], lft.VelocityBlock(study.teacher.gpt_neox.layers[3])
    assert not torch.equal(weights["mlp.dense_h_to_4h.weight"], before.mlp.dense_h_to_4h.weight)
    assert bool(weights["time_mlp.2.weight"].any()) != (variant == "timeless")

def test_crossing_paths_need_flow_walking():
    x0 = crossing.starts(50)
    velocities = (crossing.trained(loss_of, steps=300) for loss_of in (train_fm.flow_matching_loss, train_fw.flow_walking_loss))
    matching, walking = ((crossing.walk(u, x0, 3, 6)[-1] + x0[:, 0]).norm(dim=-1).mean() for u in velocities)
    assert x0.shape == (100, 1, 2) and walking < 0.3 and matching > 2 * walking
