"supernet and importance: the laws on random architectures and sub-networks, what saving and loading keep, and that the teacher is never touched."
import hashlib
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel  # MATH is the only CPU kernel that the counter knows
from torch.utils.flop_counter import FlopCounterMode

from slm_begin.importance import KINDS, Importance, measure, measure_cost, orders
from slm_begin.supernet import AXES, Subnet, SubnetError, Supernet, load_model, mean_loss, save_student

# Every switch of the family: biases, parallel residual, tied embeddings, odd sizes, one of everything, all or a part of the head rotating
architectures = dict(
    plain=dict(), tied=dict(tie=True), no_bias=dict(attention_bias=False), sequential=dict(use_parallel_residual=False),
    odd=dict(vocab_size=131, hidden_size=30, num_attention_heads=5, intermediate_size=37, tie=True),
    single=dict(num_hidden_layers=1, num_attention_heads=1, hidden_size=16, intermediate_size=1),
    many_heads=dict(num_attention_heads=16, num_hidden_layers=4, rope_parameters=dict(rope_type='default', rope_theta=500., partial_rotary_factor=1.)),
    dropout=dict(attention_dropout=.5, hidden_dropout=.5, use_parallel_residual=False, attention_bias=False, tie=True))
every = pytest.mark.parametrize('name', architectures)


def supernet(name, **kw): return Supernet(tiny_model(**{**architectures[name], **kw}), name)

def some(rng, n): return rng.sample(range(n), rng.randint(1, n))

def random_subnet(net, rng):
    "Any layers, and unsorted indices of everything else, in each layer its own."
    s, layers = net.sizes, sorted(some(rng, net.sizes['layers']))
    return net.subnet(layers, some(rng, s['embd']), tuple(some(rng, s['heads']) for _ in layers), tuple(some(rng, s['ffn']) for _ in layers))

def checksum(model):
    "Of weights, gradients, buffers, hooks, mode and config."
    hooked = [n for n,m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    h = hashlib.sha256(repr((model.config.to_dict(), model.training, hooked)).encode())
    for n,t in [*model.named_parameters(), *model.named_buffers()]:
        h.update(f'{n} {t.shape} {t.requires_grad} {t.grad}'.encode() + t.detach().numpy().tobytes())
    return h.hexdigest()

def ids_for(net, shape=(2, 11), seed=0): return torch.randint(net.sizes['vocab'], shape, generator=torch.Generator().manual_seed(seed))


# The laws

@every
def test_the_full_subnet_is_the_teacher_bit_for_bit(name):
    net = supernet(name)
    copy, ids = net.extract(net.full).eval(), ids_for(net)
    assert torch.equal(copy(ids).logits, net.model(ids).logits) and net.expressible(net.full)
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in net.model.parameters()}
    assert copy.config.to_dict()==net.config.to_dict() and copy.config is not net.config


@every
@pytest.mark.parametrize('seed', range(3))
def test_a_count_is_the_truth(name, seed):
    net, rng = supernet(name), random.Random(seed)
    for _ in range(8):
        sub = random_subnet(net, rng)
        model = net.extract(sub)
        s = sub.sizes
        assert net.count(sub)==sum(p.numel() for p in model.parameters())==model.num_parameters()
        assert net.count(sub)==net.count_sizes(len(s['layers']), s['embd'], sum(s['heads']), sum(s['ffn']))
    assert net.count(net.full)==net.model.num_parameters()


@every
@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_flops_add_up(name, attention):
    net, rng, T, B = supernet(name, attn_implementation=attention), random.Random(0), 24, 2
    for sub in [net.full] + [random_subnet(net, rng) for _ in range(4)]:
        model = net.extract(sub).eval()
        assert model.config._attn_implementation==attention
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad(): model(ids_for(net, (B, T)), use_cache=False)
        assert abs(net.flops(sub, T) * B * T / counter.get_total_flops() - 1) < .01


def zeroed(net, sub):
    "The teacher with all heads, neurons and layers that `sub` drops zeroed out; for parallel residuals and a whole width."
    model = net.extract(net.full).eval()
    d, at = net.head_size, {l: i for i,l in enumerate(sub.layers)}
    for l,layer in enumerate(model.get_submodule(net.layers_at)):
        out, down = layer.attention.dense, layer.mlp.dense_4h_to_h
        heads, ffn = (sub.heads[at[l]], sub.ffn[at[l]]) if l in at else ((), ())
        with torch.no_grad():
            for h in set(range(net.sizes['heads'])) - set(heads): out.weight[:, h*d:(h+1)*d] = 0
            for f in set(range(net.sizes['ffn'])) - set(ffn): down.weight[:, f] = 0
            if l not in at:
                down.bias.zero_()
                if out.bias is not None: out.bias.zero_()
    return model


@every
def test_dropping_is_zeroing(name):
    net, rng, ids = supernet(name), random.Random(1), ids_for(supernet(name))
    for _ in range(4):
        s = random_subnet(net, rng)
        sub = Subnet(s.layers, net.full.embd, s.heads, s.ffn)
        torch.testing.assert_close(net.extract(sub).eval()(ids).logits, zeroed(net, sub)(ids).logits, rtol=1e-3, atol=1e-4)


@every
def test_order_does_not_matter(name):
    net, rng, ids = supernet(name), random.Random(2), ids_for(supernet(name))
    mixed = lambda ids: tuple(rng.sample(ids, len(ids)))
    sub = random_subnet(net, rng)
    other = Subnet(sub.layers, mixed(sub.embd), tuple(map(mixed, sub.heads)), tuple(map(mixed, sub.ffn)))
    assert other.key!=sub.key or other==sub
    torch.testing.assert_close(net.extract(other).eval()(ids).logits, net.extract(sub).eval()(ids).logits, rtol=1e-3, atol=1e-3)


@every
def test_unsorted_width_is_taken_as_asked(name):
    "Every parameter, entry by entry, against plain indexing that knows nothing of axes tables."
    net = supernet(name)
    rng = random.Random(3)
    sub = random_subnet(net, rng)
    small, big, d = net.extract(sub).gpt_neox, net.model.gpt_neox, net.head_size
    assert torch.equal(small.embed_in.weight, big.embed_in.weight[:, sub.embd])
    for i,l in enumerate(sub.layers):
        a, b = small.layers[i], big.layers[l]
        qkv = [h*3*d + j for h in sub.heads[i] for j in range(3*d)]
        assert torch.equal(a.attention.query_key_value.weight, b.attention.query_key_value.weight[qkv][:, sub.embd])
        assert torch.equal(a.attention.dense.weight, b.attention.dense.weight[sub.embd, :][:, [h*d + j for h in sub.heads[i] for j in range(d)]])
        assert torch.equal(a.mlp.dense_4h_to_h.weight, b.mlp.dense_4h_to_h.weight[sub.embd, :][:, sub.ffn[i]])
        assert torch.equal(a.mlp.dense_h_to_4h.bias, b.mlp.dense_h_to_4h.bias[list(sub.ffn[i])])
        assert a.attention.layer_idx==i


# The teacher stays as it is, and students learn

@every
def test_the_teacher_is_never_touched(name):
    net, rng = supernet(name), random.Random(4)
    before, windows = checksum(net.model), ids_for(net, (3, 13))
    for _ in range(3):
        sub = random_subnet(net, rng)
        student = net.extract(sub)
        assert student.training and all(p.requires_grad and p.is_leaf for p in student.parameters())
        student(input_ids=windows, labels=windows).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
        torch.optim.SGD(student.parameters(), 1.).step()
        net.init(sub)
    mean_loss(net.extract(sub), windows)
    scores = measure(net, windows)
    for kind in KINDS: orders(kind, net, scores)
    assert checksum(net.model)==before


def test_an_interrupted_measurement_leaves_no_hooks():
    net = supernet('plain')
    before = checksum(net.model)
    def stop(line): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): measure(net, ids_for(net, (8, 9)), batch=2, say=stop)
    assert checksum(net.model)==before


@every
def test_importance_has_the_teachers_shape(name, tmp_path):
    net = supernet(name)
    windows = ids_for(net, (5, 9))
    got, s = measure(net, windows, batch=2), net.sizes
    assert (got.layers.shape, got.embd.shape)==((s['layers'],), (s['embd'],))
    assert (got.heads.shape, got.ffn.shape)==((s['layers'], s['heads']), (s['layers'], s['ffn']))
    assert (got.tokens, got.flops)==measure_cost(net, 5, 8) and got.tokens==40 and abs(got.embd.sum() - 1) < 1e-4
    for other in measure(net, windows, batch=5), measure(net, windows[[4, 1, 0, 3, 2]], batch=3):
        for k in 'layers', 'embd', 'heads', 'ffn': torch.testing.assert_close(getattr(got, k), getattr(other, k), rtol=1e-4, atol=1e-6)
    got.save(tmp_path/'i.safetensors')
    again = Importance.load(tmp_path/'i.safetensors')
    assert (again.tokens, again.flops, again.seconds)==(got.tokens, got.flops, got.seconds) and torch.equal(again.heads, got.heads)
    for kind in KINDS:
        o = orders(kind, net, got, seed=3)
        assert sorted(o.layers)==list(range(s['layers'])) and sorted(o.embd)==list(range(s['embd']))
        assert len(o.heads)==len(o.ffn)==s['layers'] and all(sorted(h)==list(range(s['heads'])) for h in o.heads)
    assert orders('random', net, seed=3)==orders('random', net, seed=3)!=orders('random', net, seed=4) or name=='single'


# Generation

@every
def test_the_cache_changes_nothing(name):
    net, rng = supernet(name), random.Random(5)
    for sub in net.full, random_subnet(net, rng), random_subnet(net, rng):
        model, ids = net.extract(sub).eval(), ids_for(net, (2, 7))
        made = [model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=c, pad_token_id=0, eos_token_id=None) for c in (True, False)]
        assert torch.equal(*made) and made[0].shape==(2, 19)
        step = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=step.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([step.logits, rest.logits], 1), model(ids).logits, rtol=1e-4, atol=1e-4)


# A random start

@every
def test_a_random_start_is_the_architectures_own(name):
    net = supernet(name)
    sub, ids = random_subnet(net, random.Random(6)), ids_for(net)
    state = torch.random.get_rng_state()
    a, b, c = net.init(sub, 0), net.init(sub, 0), net.init(sub, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.shape for p in a.parameters()]==[p.shape for p in net.extract(sub).parameters()]
    for (n,p),q,r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q) and torch.isfinite(p).all(), n
        if p.ndim > 1: assert not torch.equal(p, r) and p.std() < 3*net.config.initializer_range, n
        else: assert p.unique().tolist()==[float('layernorm' in n or 'layer_norm' in n) * n.endswith('weight')], n
    assert (a.lm_head.weight is a.gpt_neox.embed_in.weight)==net.config.tie_word_embeddings
    with torch.no_grad(): assert torch.isfinite(a.eval()(ids).logits).all()


def test_a_random_start_of_a_loaded_teacher(tmp_path):
    "Weights that `from_pretrained` has marked as initialised must be drawn anew all the same."
    tiny_model().save_pretrained(tmp_path)
    net = Supernet(load_model(tmp_path))
    for (n,p),q in zip(net.init(net.full).named_parameters(), net.model.parameters(), strict=True): assert not torch.equal(p, q), n
    net = Supernet(load_model(tmp_path, torch.bfloat16))
    assert net.init(net.full).dtype==net.extract(net.full).dtype==torch.bfloat16


# Saving and loading

def shapes(net): return dict(plain=net.subnet(2, 2*net.head_size, 2, 24), layerwise=random_subnet(net, random.Random(7)))

loads = '''
import sys, torch
sys.modules["slm_begin"] = None                                     # whoever imports it fails
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    want = torch.load(folder + "/expected.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=(folder.split("/")[-1] != "plain")).eval()
    assert torch.equal(model(want["ids"]).logits, want["logits"]), folder
    assert torch.equal(model.generate(want["ids"], max_new_tokens=9, do_sample=False, pad_token_id=0), want["text"]), folder
    assert sum(p.numel() for p in model.parameters()) == want["parameters"] and model.dtype == want["logits"].dtype
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    assert torch.equal(again(want["ids"]).logits, want["logits"]), folder + "-again"
'''


@pytest.mark.slow
def test_what_is_saved_is_what_was_without_slm_begin(tmp_path):
    folders = []
    for name,dtype in dict(plain=torch.float32, tied=torch.bfloat16, odd=torch.float32).items():
        net = supernet(name)
        for shape,sub in shapes(net).items():
            at, model, ids = tmp_path/name/shape, net.extract(sub).eval(), ids_for(net)
            save_student(model, at, dtype=dtype)
            if dtype!=torch.float32: model = load_model(at, dtype).eval()
            with torch.no_grad(): out = dict(logits=model(ids).logits, ids=ids, parameters=net.count(sub))
            out['text'] = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
            torch.save(out, at/'expected.pt')
            folders.append(str(at))
    r = subprocess.run([sys.executable, '-c', loads, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    for folder in folders:                                          # and what plain transformers saved again, we load too
        want = torch.load(f'{folder}/expected.pt', weights_only=True)
        assert torch.equal(load_model(f'{folder}-again', want['logits'].dtype).eval()(want['ids']).logits, want['logits'])


@pytest.mark.parametrize('name', ['plain', 'tied', 'odd', 'sequential'])
@pytest.mark.parametrize('shape', ['plain', 'layerwise'])
def test_saving_and_loading(tmp_path, name, shape):
    net = supernet(name)
    sub, ids = shapes(net)[shape], ids_for(net)
    model = net.extract(sub).eval()
    want = model(ids).logits
    for turn in range(3):                                           # saved, loaded, saved again
        save_student(model, tmp_path/str(turn))
        model = load_model(tmp_path/str(turn)).eval()
        assert torch.equal(model(ids).logits, want) and model.num_parameters()==net.count(sub)
        assert (model.lm_head.weight is model.gpt_neox.embed_in.weight)==net.config.tie_word_embeddings
        for m in model.modules():
            if isinstance(m, torch.nn.Linear): assert (m.out_features, m.in_features)==m.weight.shape
        assert json.loads((tmp_path/str(turn)/'config.json').read_text())['dtype']=='float32'
    assert (tmp_path/'0'/'modeling_subnet.py').exists()==(shape=='layerwise')==('auto_map' in json.loads((tmp_path/'2'/'config.json').read_text()))


@pytest.mark.parametrize('shape', ['plain', 'layerwise'])
def test_bfloat16_is_written_and_the_student_stays_as_it_is(tmp_path, shape):
    from safetensors.torch import load_file
    net = supernet('tied')
    model = net.extract(shapes(net)[shape])
    before = checksum(model)
    save_student(model, tmp_path, dtype=torch.bfloat16, card='# a card\n')
    assert checksum(model)==before and model.training
    assert {t.dtype for t in load_file(tmp_path/'model.safetensors').values()}=={torch.bfloat16}
    assert json.loads((tmp_path/'config.json').read_text())['dtype']=='bfloat16' and (tmp_path/'README.md').read_text()=='# a card\n'
    assert load_model(tmp_path).dtype==torch.float32 and load_model(tmp_path, torch.bfloat16).dtype==torch.bfloat16
    a, b = (m.eval()(ids_for(net)).logits.float() for m in (model, load_model(tmp_path)))
    assert (a - b).abs().max() < .05 * a.abs().max()


def test_a_trained_student_is_saved_with_its_tokenizer(tmp_path, tok):
    net = Supernet(tiny_model(vocab_size=len(tok)), tokenizer=tok)
    for heads in 2, (2, 1):
        save_student(net.extract(net.subnet(2, 16, heads, 8)), tmp_path/str(heads), tok)
        again = Supernet.from_pretrained(str(tmp_path/str(heads)))
        assert again.tokenizer.eos_token_id==tok.eos_token_id and again.sizes==dict(layers=2, embd=16, heads=2, ffn=8, vocab=len(tok))
        assert again.full.sizes['heads']==[2, 2 if heads==2 else 1]


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for name in 'someone/model', 'no_such_model', 'bad name!':
        with pytest.raises(ConnectionError, match=f'the model `{name}`.*ships in the package: `embedded`'): load_model(name)
    for name in './x', '/no/such', '~/none', 'a/b/c':
        with pytest.raises(FileNotFoundError, match='no such folder'): load_model(name)


@pytest.mark.parametrize('what', ['no config', 'cut weights', 'other architecture', 'a layer without weights', 'quantised'])
def test_unreadable_models(tmp_path, what):
    net = supernet('plain')
    save_student(net.extract(net.subnet(2, 20, (2, 1), 8)), tmp_path)
    config = tmp_path/'config.json'
    if what=='no config': config.unlink()
    if what=='cut weights': (tmp_path/'model.safetensors').write_bytes((tmp_path/'model.safetensors').read_bytes()[:500])
    if what=='other architecture': config.write_text(config.read_text().replace('"gpt_neox"', '"no_such"'))
    if what=='a layer without weights': config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    if what=='quantised': config.write_text(config.read_text().replace('{', '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1))
    with pytest.raises(ValueError, match=f'no model can be read from `{tmp_path}`' + '.*quantised' * (what=='quantised')): load_model(tmp_path)


# Descriptions

def test_subnets_survive_json_and_are_told_apart():
    net, rng, seen = supernet('many_heads'), random.Random(8), {}
    for _ in range(200):
        sub = random_subnet(net, rng)
        again = Subnet.from_json(json.loads(json.dumps(sub.to_json())))
        assert again==sub and hash(again)==hash(sub) and again.key==sub.key and again.sizes==sub.sizes
        assert seen.setdefault(sub.key, sub)==sub
    assert len(seen) > 190


@pytest.mark.parametrize('kw,message', [
    (dict(layers=0), '`layers`: cannot keep 0; the teacher has 3, so give a number from 1 to 3 or different indices from 0 to 2'),
    (dict(layers=[]), '`layers`: cannot keep \\[\\] .that is nothing.'), (dict(layers=[0, 0]), '`layers`: .* there twice'),
    (dict(layers=[3]), '3 is not there.*indices from 0 to 2'), (dict(layers=[2, 0]), '`layers` must be ascending, got .2, 0.: sort them'),
    (dict(embd=-1), '`embd`: cannot keep -1'), (dict(embd=[5, 5]), '`embd`'), (dict(embd=[3, -2]), '-2 is negative'), (dict(embd=2.), 'a float is no list'),
    (dict(embd=[1, 2.5]), '2.5 is no whole number'), (dict(embd='12'), 'a str is no list'), (dict(embd=True), 'a bool is no list'),
    (dict(embd=[False, True]), 'False is no whole number'), (dict(embd=torch.arange(4)), 'a Tensor is no list'), (dict(embd={1, 2}), 'a set is no list'),
    (dict(heads=5), '`heads` of layer 0: cannot keep 5; the teacher has 4'), (dict(heads=[-1]), '`heads` of layer 0'),
    (dict(layers=[0, 2], heads=(1, 7)), '`heads` of layer 2: cannot keep 7'), (dict(ffn=(1, 2)), '`ffn` is given for 2 layers, but 3 are kept'),
    (dict(ffn=[[1], [2], []]), '`ffn` of layer 2'), (dict(depth=2), 'no axis `depth`; choose of layers, embd, heads, ffn')])
def test_impossible_subnets(kw, message):
    with pytest.raises(SubnetError, match=message): supernet('plain').subnet(**kw)


def test_numpy_numbers_are_numbers():
    net = supernet('plain')
    got = net.subnet(np.int64(2), np.arange(0, 32, 2), [np.int32(1), np.uint8(3)], (np.int16(5), np.array([7, 2])))
    assert got==net.subnet(2, range(0, 32, 2), [1, 3], (5, [7, 2]))
    assert {type(i) for i in net.subnet(embd=np.arange(3)).embd}=={int}


# Any description at all: a right model or a SubnetError

def rotated(x, n, theta=10000.):
    "The first `n` of the last dimension turned by their position, as rotary embeddings do; (B, T, D)."
    angle = torch.arange(x.shape[1])[:, None] / theta**(torch.arange(0, n, 2) / n)
    a, b, rest = x[..., :n//2], x[..., n//2:n], x[..., n:]
    return torch.cat([a*angle.cos() - b*angle.sin(), b*angle.cos() + a*angle.sin(), rest], -1)

def attended(q, k, v):
    "Causal attention of one head; (B, T, D)."
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1) @ v

@torch.no_grad()
def neox(model, sub, ids):
    "A GPT-NeoX written out head by head and neuron by neuron, with only what `sub` keeps."
    w, cfg, E = dict(model.named_parameters()), model.config, list(sub.embd)
    d = cfg.hidden_size // cfg.num_attention_heads
    turns = int(d * cfg.rope_parameters['partial_rotary_factor'])
    norm = lambda x, at: F.layer_norm(x, [len(E)], w[f'{at}.weight'][E], w[f'{at}.bias'][E], cfg.layer_norm_eps)
    x = w['gpt_neox.embed_in.weight'][ids][..., E]
    for l, heads, neurons in zip(sub.layers, sub.heads, sub.ffn):
        at = f'gpt_neox.layers.{l}'
        h, attention = norm(x, f'{at}.input_layernorm'), w[f'{at}.attention.dense.bias'][E]
        for head in heads:
            rows = [slice((3*head + j) * d, (3*head + j + 1) * d) for j in range(3)]
            q, k, v = (h @ w[f'{at}.attention.query_key_value.weight'][r][:, E].T + w[f'{at}.attention.query_key_value.bias'][r] for r in rows)
            attention = attention + attended(rotated(q, turns), rotated(k, turns), v) @ w[f'{at}.attention.dense.weight'][E][:, head*d:(head+1)*d].T
        h, mlp = norm(x, f'{at}.post_attention_layernorm'), w[f'{at}.mlp.dense_4h_to_h.bias'][E]
        for n in neurons:
            read = h @ w[f'{at}.mlp.dense_h_to_4h.weight'][n, E] + w[f'{at}.mlp.dense_h_to_4h.bias'][n]
            mlp = mlp + F.gelu(read)[..., None] * w[f'{at}.mlp.dense_4h_to_h.weight'][E, n]
        x = x + attention + mlp
    return norm(x, 'gpt_neox.final_layer_norm') @ w['lm_head.weight'][:, E].T

@torch.no_grad()
def llama(model, sub, ids):
    "The same for Llama with grouped queries."
    w, cfg, E, d = dict(model.named_parameters()), model.config, list(sub.embd), model.config.head_dim
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    norm = lambda x, at: x * (x.pow(2).mean(-1, keepdim=True) + cfg.rms_norm_eps).rsqrt() * w[f'{at}.weight'][E]
    part = lambda h, at, i: h @ w[f'{at}.weight'][i*d:(i+1)*d, E].T
    x = w['model.embed_tokens.weight'][ids][..., E]
    for l, heads, neurons in zip(sub.layers, sub.heads, sub.ffn):
        at = f'model.layers.{l}'
        h = norm(x, f'{at}.input_layernorm')
        for head in heads:
            k, v = rotated(part(h, f'{at}.self_attn.k_proj', head), d), part(h, f'{at}.self_attn.v_proj', head)
            for i in range(head*group, (head+1)*group):
                x = x + attended(rotated(part(h, f'{at}.self_attn.q_proj', i), d), k, v) @ w[f'{at}.self_attn.o_proj.weight'][E][:, i*d:(i+1)*d].T
        h = norm(x, f'{at}.post_attention_layernorm')
        for n in neurons:
            read = F.silu(h @ w[f'{at}.mlp.gate_proj.weight'][n, E]) * (h @ w[f'{at}.mlp.up_proj.weight'][n, E])
            x = x + read[..., None] * w[f'{at}.mlp.down_proj.weight'][E, n]
    return norm(x, 'model.norm') @ w['lm_head.weight'][:, E].T

def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=4, intermediate_size=7, vocab_size=31)
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
    for p in model.parameters(): p.data += .2 * torch.randn_like(p)
    return Supernet(model)

small = dict(hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=7, vocab_size=31)
by_hand = [(Supernet(tiny_model(**small, rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.5))), neox), (tiny_llama(), llama)]
whatever = settings(max_examples=100, deadline=None, derandomize=True, database=None)

def is_right(net, naive, sub):
    model, ids = net.extract(sub).eval(), ids_for(net, (2, 6))
    assert net.count(sub)==model.num_parameters()==net.init(sub).num_parameters()
    with torch.no_grad(): torch.testing.assert_close(model(ids).logits, naive(net.model, sub, ids), rtol=1e-3, atol=1e-3)

def kept(size, v):
    "The indices that `v` should keep of an axis, worked out anew; None if it should be refused."
    if v is None: return list(range(size))
    if isinstance(v, (bool, np.bool_)): return None
    if isinstance(v, (int, np.integer)): return list(range(v)) if 0 < v <= size else None
    if not isinstance(v, (list, tuple, range, np.ndarray)) or np.ndim(v)==0: return None
    v = list(v)
    if not v or any(isinstance(i, (bool, np.bool_)) or not isinstance(i, (int, np.integer)) for i in v): return None
    return [int(i) for i in v] if min(v) >= 0 and max(v) < size and len(set(v))==len(v) else None

odd = st.sampled_from([None, 1., '1', 'all', b'1', True, False, {}, {1, 2}, object, torch.tensor(1), torch.arange(2), np.float64(1), np.array(1),
                       np.array([.5]), np.array([[0, 1]]), [1.], ['0'], [True], [None], [[0]], (0,), range(2), range(0), range(3, 0, -1), math.nan,
                       [math.inf], 10**30, [10**30]])

def choices(size, rare=odd):
    "What may be given for an axis of this size: mostly good, or nearly."
    good = st.permutations(range(size)).flatmap(lambda ids: st.integers(1, size).map(lambda n: ids[:n]))
    return st.integers(0, 11).flatmap(lambda i: rare if i==0 else st.integers(-1, size + 1) if i==1 else st.lists(st.integers(-1, size), max_size=3) if i==2
                                      else st.integers(1, size) if i < 5 else good.map(np.array) if i < 7 else good)

@pytest.mark.parametrize('net, naive', by_hand)
@given(data=st.data())
@whatever
def test_whatever_is_asked_for_is_a_right_model_or_refused(net, naive, data):
    s = net.sizes
    spec = {axis: data.draw(choices(s[axis])) for axis in ('layers', 'embd') if data.draw(st.booleans())}
    want = {axis: kept(s[axis], spec.get(axis)) for axis in ('layers', 'embd')}
    n = len(want['layers']) if want['layers'] else 2
    for axis in 'heads', 'ffn':
        some = choices(s[axis])
        each = data.draw(st.one_of(some, st.tuples(*[some] * n), st.lists(some.filter(lambda v: isinstance(v, list)), min_size=n, max_size=n)))
        spec[axis] = each
        alike = not isinstance(each, tuple) and not (isinstance(each, list) and each and (each[0] is None or isinstance(each[0], list)))
        want[axis] = [kept(s[axis], v) for v in ([each] * n if alike else each)]
        if len(want[axis])!=n or None in want[axis]: want[axis] = None
    if None in want.values() or want['layers']!=sorted(want['layers']):
        with pytest.raises(SubnetError): net.subnet(**spec)
    else:
        sub = net.subnet(**spec)
        assert {axis: [*map(list, v)] if axis in ('heads', 'ffn') else list(v) for axis in AXES for v in [getattr(sub, axis)]}==want
        is_right(net, naive, sub)


def ids_up_to(n): return st.integers(0, 14).flatmap(lambda i: odd if i==0 else st.lists(st.integers(0, n - (i > 2)), unique=True, min_size=1).map(tuple))

@pytest.mark.parametrize('net, naive', by_hand)
@given(data=st.data())
@whatever
def test_a_description_written_by_hand_fits_everywhere_or_nowhere(net, naive, data):
    s = net.sizes
    layers, embd = data.draw(ids_up_to(s['layers']).map(lambda v: tuple(sorted(v)) if isinstance(v, tuple) else v)), data.draw(ids_up_to(s['embd']))
    n = len(layers) if isinstance(layers, tuple) else 1
    each = data.draw(st.lists(st.tuples(ids_up_to(s['heads']), ids_up_to(s['ffn'])), min_size=n, max_size=n + data.draw(st.sampled_from([0, 0, 0, 1]))))
    try: sub = Subnet(layers, embd, tuple(h for h, _ in each), tuple(f for _, f in each))
    except SubnetError: return
    if max(sub.layers) < s['layers'] and max(sub.embd) < s['embd'] and all(max(h) < s['heads'] and max(f) < s['ffn'] for h, f in zip(sub.heads, sub.ffn)):
        is_right(net, naive, sub)
        assert net.expressible(sub) in (True, False) and net.flops(sub, 8) > 0
    else:
        for use in net.count, net.extract, net.init, net.expressible, net.student_config, lambda o: net.flops(o, 8):
            with pytest.raises(SubnetError, match='the teacher has'): use(sub)

def test_only_subnets_are_cut_out():
    net = supernet('plain')
    for wrong in None, {}, net.full.to_json(), 3:
        for use in net.count, net.extract, net.init:
            with pytest.raises(SubnetError, match='is no sub-network; give a `Subnet`'): use(wrong)


runs = st.text('0123456789-, x', max_size=6)

nearly = dict(layers='0', embd='0', heads=['0'], ffn=['0'])
wrong = [None, [], 'x', 3, {}, dict(layers='0'), *({**nearly, **change} for change in (
    dict(embd=1), dict(heads='0'), dict(heads=None), dict(ffn=[0]), dict(embd='0-5-9'), dict(embd='3-1'), dict(embd=''), dict(size='1'), dict(layers='0,1')))]

each_layer = st.lists(runs, max_size=2)

@given(d=st.fixed_dictionaries(dict(layers=runs, embd=runs, heads=each_layer, ffn=each_layer)) | st.sampled_from([nearly, *wrong]))
@settings(whatever, max_examples=400)
def test_json_of_any_kind_is_read_as_it_stands_or_refused(d):
    try: sub = Subnet.from_json(d)
    except SubnetError: assert d!=nearly
    else:
        ends = [[int(i) for i in run.split('-')] for run in d['embd'].split(',')]
        assert d not in wrong and [*sub.embd]==[i for e in ends for i in range(e[0], e[-1] + 1)] and Subnet.from_json(sub.to_json())==sub


def test_a_loss_is_a_mean_over_tokens():
    net = supernet('dropout')
    windows = ids_for(net, (7, 20))
    student = net.extract(net.full)
    losses = [mean_loss(student, windows, b) for b in (1, 3, 7, 100)] + [mean_loss(net.model, windows)]
    assert max(losses) - min(losses) < 1e-4 and student.training and not net.model.training
