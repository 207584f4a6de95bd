"importance: every score on every axis against naive loops, for several families; provenance, the untouched teacher, and bad input."
import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_families import FAMILIES as EVERY, tiny
from test_supernet import checksum
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm_begin.importance import DEFAULT, SCORES, Importance, measure, measure_cost, orders, scores_by_axis
from slm_begin.supernet import AXES, Supernet, is_matrix, mean_loss

# Attention fused or not, with grouped queries or not, transposed matrices, extra norms, fused gates, windows joined before the MLP
FAMILIES = 'gpt_neox', 'gpt2', 'llama', 'phi3', 'qwen3', 'gemma2', 'opt'
family = pytest.mark.parametrize('family', FAMILIES)
score = pytest.mark.parametrize('score', SCORES)

# What reads heads, neurons and the width in a layer, written down by hand; the second holds what reads one and the same input
HEADS = dict(gpt_neox='attention.dense', gpt2='attn.c_proj', opt='self_attn.out_proj')
FFN = dict(gpt_neox='mlp.dense_4h_to_h', gpt2='mlp.c_proj', opt='fc2')
EMBD = dict(gpt_neox=[['attention.query_key_value'], ['mlp.dense_h_to_4h']], gpt2=[['attn.c_attn'], ['mlp.c_fc']],
            phi3=[['self_attn.qkv_proj'], ['mlp.gate_up_proj']], opt=[['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], ['fc1']])
QKV_GATE_UP = [['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], ['mlp.gate_proj', 'mlp.up_proj']]


def double(family): return Supernet(tiny(family).model.double(), family)

def some_windows(n=5, T=11): return torch.randint(1, 96, (n, T + 1), generator=torch.Generator().manual_seed(1))

def by(axis, score): return {**dict.fromkeys(AXES, 'weight'), axis: score}

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def matrices(net, axis): # Lists of readers of one input, by layer
    at = net.layers_at
    if axis != 'embd':
        name = (HEADS if axis == 'heads' else FFN).get(net.name, 'self_attn.o_proj' if axis == 'heads' else 'mlp.down_proj')
        return [[f'{at}.{i}.{name}'] for i in range(3)]
    return [[f'{at}.{i}.{n}' for n in group] for i in range(3) for group in EMBD.get(net.name, QKV_GATE_UP)] + [['lm_head']]

def columns(net, name): # (inputs, outputs)
    m = net.model.get_submodule(name)
    return m.weight.detach().T if isinstance(m, torch.nn.Linear) else m.weight.detach()

def inputs_and_gradients(net, row):
    "What every matrix reads of one window, (T, inputs), and the gradient of what it makes of it: by a copy with gradients everywhere."
    model, read = copy.deepcopy(net.model).requires_grad_(True), {}
    for n, m in model.named_modules():
        if is_matrix(m): m.register_forward_hook(lambda m, a, out, n=n: read.update({n: (a[0], out)}))
    logits = model(input_ids=row[None, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits[0], row[1:], reduction='sum')
    gradients = torch.autograd.grad(loss, [out for _, out in read.values()])
    flat = lambda x: x.detach().reshape(len(row) - 1, -1)
    return {n: (flat(x), flat(g)) for (n, (x, _)), g in zip(read.items(), gradients, strict=True)}

def naive(net, windows, axis, score):
    "The definitions, window by window and entry by entry."
    size, n, rows = net.sizes[axis], windows[:, 1:].numel(), []
    seen = [inputs_and_gradients(net, row) for row in windows]
    for group in matrices(net, axis):
        for name in group[:1] if score == 'activation' else group:
            W = columns(net, name)
            of = torch.arange(len(W)).reshape(size, -1)
            out = torch.zeros(size, dtype=torch.float64)
            for j in range(size):
                total = 0.
                for window in seen:
                    x, g = window[name]
                    read, g = x[:, of[j]], (g @ W.T)[:, of[j]]
                    if score == 'wanda': total += sum((read[:, k, None] * W[of[j][k]]).pow(2).sum() for k in range(len(of[j])))
                    if score == 'activation': total += sum(t.pow(2).sum().sqrt() for t in read).div(len(read)) ** 2
                    if score == 'taylor': total += abs((read * g).sum())
                    if score == 'fisher': total += sum((a * b).sum() ** 2 for a, b in zip(read, g, strict=True))
                out[j] = total ** .5 if score == 'activation' else total / n
            rows.append(out)
    if axis != 'embd': return torch.stack(rows)
    return torch.stack([r / r.sum() for r in rows]).mean(0) if score == 'wanda' else torch.stack(rows).sum(0)


# Right

@family
@pytest.mark.parametrize('axis', ['embd', 'heads', 'ffn'])
def test_scores_are_their_definitions(family, axis):
    net, windows = double(family), some_windows(3, 7)
    for score in 'wanda', 'activation', 'taylor', 'fisher':
        close(getattr(measure(net, windows, by(axis, score), batch=2), axis), naive(net, windows, axis, score))

@family
def test_taylor_is_gradient_times_weight(family):
    "Of each column of a reader, by the gradients of weights; those of a copy."
    net, windows = double(family), some_windows(3, 7)
    got = measure(net, windows, by('ffn', 'taylor'))
    for i, [name] in enumerate(matrices(net, 'ffn')):
        model, want = copy.deepcopy(net.model), 0
        w = model.get_submodule(name).weight.requires_grad_(True)
        for row in windows:
            loss = F.cross_entropy(model(input_ids=row[None, :-1], use_cache=False).logits[0], row[1:], reduction='sum')
            gw = torch.autograd.grad(loss, w)[0] * w
            want += gw.sum(0 if isinstance(model.get_submodule(name), torch.nn.Linear) else 1).abs().detach()
        close(got.ffn[i], want / 21)

@family
def test_layers_are_their_definitions(family):
    net, windows, L = double(family), some_windows(), 3
    got = {s: measure(net, windows, by('layers', s), batch=2).layers for s in ('cosine', 'taylor', 'fisher', 'loss')}
    want, n, whole = {s: torch.zeros(L, dtype=torch.float64) for s in ('cosine', 'taylor', 'fisher')}, windows[:, 1:].numel(), mean_loss(net.model, windows)
    for row in windows:
        model, flow = copy.deepcopy(net.model).requires_grad_(True), []
        def hook(m, args, kwargs, out, flow=flow): flow.append((args[0] if args else kwargs['hidden_states'], out[0] if isinstance(out, tuple) else out))
        for layer in model.get_submodule(net.layers_at): layer.register_forward_hook(hook, with_kwargs=True)
        loss = F.cross_entropy(model(input_ids=row[None, :-1], use_cache=False).logits[0], row[1:], reduction='sum')
        for i, ((x, out), g) in enumerate(zip(flow, torch.autograd.grad(loss, [out for _, out in flow]), strict=True)):
            for a, b, d in zip(x[0].detach(), out[0].detach(), g[0], strict=True):
                want['cosine'][i] += (1 - a @ b / (a.norm() * b.norm())) / n
                want['fisher'][i] += ((b - a) @ d) ** 2 / n
            want['taylor'][i] += ((out - x).detach() * g).sum().abs() / n
    for s in want: close(got[s], want[s])
    without = [mean_loss(net.extract(net.subnet([j for j in range(L) if j != i])).eval(), windows) - whole for i in range(L)]
    torch.testing.assert_close(got['loss'], torch.tensor(without, dtype=torch.float64), rtol=1e-4, atol=1e-5)

@family
def test_weight_is_what_extraction_leaves_out(family):
    net = double(family)
    got, squares = measure(net, some_windows(), 'weight'), lambda model: sum(p.pow(2).sum().item() for p in model.parameters())
    whole, but = squares(net.model), lambda n, i: [j for j in range(n) if j != i]
    for i in 0, 2: assert abs(whole - squares(net.extract(net.subnet(but(3, i)))) - got.layers[i]) < 1e-8
    for axis in 'embd', 'heads', 'ffn':
        size = net.sizes[axis]
        for i in 0, size - 1:
            lost = whole - squares(net.extract(net.subnet(**{axis: but(size, i) if axis == 'embd' else tuple([but(size, i)] + [list(range(size))] * 2)})))
            assert abs(lost - (got.embd[i] if axis == 'embd' else getattr(got, axis)[0, i])) < 1e-8

@family
@score
def test_shapes_and_windows(family, score):
    "Finite, of the teacher's shape, and the same however windows are batched and ordered."
    net, windows = double(family), some_windows()
    got, s = measure(net, windows, score, batch=2), net.sizes
    assert got.layers.shape==(3,) and got.embd.shape==(s['embd'],) and got.heads.shape==(3, s['heads']) and got.ffn.shape==(3, s['ffn'])
    assert (got.tokens, got.flops)==measure_cost(net, 5, 11, score)
    for other in measure(net, windows, score, batch=5), measure(net, windows[[4, 1, 0, 3, 2]], score, batch=3):
        for axis in AXES:
            assert getattr(got, axis).isfinite().all() and (axis == 'layers' or (getattr(got, axis) >= 0).all())
            torch.testing.assert_close(getattr(got, axis), getattr(other, axis), rtol=1e-8, atol=1e-10)

@family
@pytest.mark.parametrize('score', [s for s in SCORES if s != 'random'])
def test_scores_move_with_their_entries(family, score):
    net, windows, g = double(family), some_windows(), torch.Generator().manual_seed(2)
    embd, heads, ffn = (torch.stack([torch.randperm(net.sizes[axis], generator=g) for _ in range(3)]) for axis in ('embd', 'heads', 'ffn'))
    mixed = Supernet(net.extract(net.subnet(embd=embd[0].tolist(), heads=tuple(heads.tolist()), ffn=tuple(ffn.tolist()))), family)
    a, b = measure(net, windows, score), measure(mixed, windows, score)
    for got, want in (b.layers, a.layers), (b.embd, a.embd[embd[0]]), (b.heads, a.heads.gather(1, heads)), (b.ffn, a.ffn.gather(1, ffn)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)             # families keep their norms in float32

@pytest.mark.parametrize('score', ['wanda', 'fisher', 'loss', 'weight'])
def test_flops_add_up(score):
    net, windows = tiny('llama'), some_windows(4, 24)
    net = Supernet(type(net.model)._from_config(net.config, attn_implementation='eager').eval())
    axis = 'layers' if score == 'loss' else 'ffn'
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: got = measure(net, windows, by(axis, score))
    assert got.flops==0==counter.get_total_flops() if score == 'weight' else abs(got.flops / counter.get_total_flops() - 1) < .01

@pytest.mark.parametrize('family', EVERY)
def test_every_family_can_be_scored(family):
    net = tiny(family)
    for score in 'default', dict(layers='taylor', embd='activation', heads='taylor', ffn='fisher'):
        got = measure(net, some_windows(2), score)
        got.check(net)
        assert all((getattr(got, axis) >= 0).all() and getattr(got, axis).std() > 0 for axis in AXES)

def test_gradients_also_in_inference_mode():
    net, windows = tiny('llama'), some_windows()
    want = measure(net, windows)
    with torch.inference_mode(): assert measure(net, windows).heads.equal(want.heads)

def test_half_precision_is_summed_in_full():
    net = tiny('llama')
    want, got = measure(net, some_windows()), measure(Supernet(copy.deepcopy(net.model).bfloat16()), some_windows())
    for axis in AXES: assert torch.corrcoef(torch.stack([getattr(want, axis).flatten(), getattr(got, axis).flatten()]))[0, 1] > .98, axis

def test_random_is_seeded():
    one, same, other = (measure(tiny('llama'), some_windows(), 'random', seed=s) for s in (1, 1, 2))
    assert one.ffn.equal(same.ffn) and not one.ffn.equal(other.ffn) and len(one.ffn.unique())==one.ffn.numel()


# The teacher stays as it is

@score
@pytest.mark.parametrize('trainable', [False, True])
def test_the_teacher_is_never_touched(score, trainable):
    net = tiny('gpt_neox')
    net.model.requires_grad_(trainable)
    before = checksum(net.model)
    measure(net, some_windows(), score)
    assert checksum(net.model)==before

@score
def test_an_interruption_leaves_no_trace(score):
    net = tiny('gpt_neox')
    net.model.requires_grad_(True)
    before, said = checksum(net.model), []
    def stop(line):
        said.append(line)
        if len(said) == 2: raise KeyboardInterrupt
    if score in ('weight', 'random'): score = {**dict.fromkeys(AXES, score), 'embd': 'taylor'}
    with pytest.raises(KeyboardInterrupt): measure(net, some_windows(), score, batch=1, say=stop)
    assert checksum(net.model)==before

def test_an_interruption_in_the_backward_pass_leaves_no_trace(monkeypatch):
    net = tiny('llama')
    net.model.requires_grad_(True)
    before = checksum(net.model)
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr('slm_begin.importance.fisher', stop)
    with pytest.raises(KeyboardInterrupt): measure(net, some_windows(), 'fisher')
    assert checksum(net.model)==before


# Files

def test_files_know_where_they_come_from(tmp_path):
    net, windows = tiny('llama'), some_windows()
    got = measure(net, windows, dict(layers='loss', ffn='random'), seed=7)
    got.save(tmp_path/'i.safetensors')
    again = Importance.load(tmp_path/'i.safetensors')
    assert again.source==got.source and (again.tokens, again.flops, again.seconds)==(got.tokens, got.flops, got.seconds)
    assert all(getattr(again, axis).equal(getattr(got, axis)) for axis in AXES)
    s = again.source
    assert s['teacher']=='llama' and s['parameters']==net.model.num_parameters() and s['score']=={**DEFAULT, 'layers': 'loss', 'ffn': 'random'} and s['seed']==7
    assert s['windows']['shape']==[5, 12] and s['versions'].keys()=={'slm_begin', 'torch', 'transformers'} and s['date'].endswith('+00:00')
    hashes = {measure(net, w).source['windows']['sha256'] for w in (windows, windows.int(), windows.flip(0), windows[:4])}
    assert len(hashes)==3 and s['windows']['sha256'] in hashes

def test_a_file_of_the_first_version_still_works(tmp_path):
    net = tiny('llama')
    got = measure(net, some_windows())
    old = {axis: getattr(got, axis).float() for axis in AXES}
    save_file(old, tmp_path/'old.safetensors', metadata=dict(tokens='55', flops='1234', seconds=repr(8.4e-05)))
    again = Importance.load(tmp_path/'old.safetensors')
    assert (again.tokens, again.flops, again.seconds, again.source)==(55, 1234, 8.4e-05, {}) and 'scores; 55 tokens' in repr(again)
    orders('importance', net, again)

def test_damaged_and_foreign_files(tmp_path):
    good = tmp_path/'good.safetensors'
    measure(tiny('llama'), some_windows()).save(good)
    tensors, whole = load_file(good), good.read_bytes()
    def file(name, tensors=None, raw=None):
        if raw is None: save_file(tensors, tmp_path/name, metadata=dict(tokens='1', flops='1', seconds='1'))
        else: (tmp_path/name).write_bytes(raw)
        return tmp_path/name
    nan = {**tensors, 'ffn': tensors['ffn'].clone().index_fill_(1, torch.tensor([3]), float('nan'))}
    for path in (file('short', raw=whole[:len(whole) // 2]), file('empty', raw=b''), file('text', raw=b'no scores at all, only a sentence'), file('nan', nan),
                 file('part', {k: v for k, v in tensors.items() if k != 'heads'}), file('flat', {**tensors, 'heads': tensors['heads'].flatten()}),
                 file('layers', {**tensors, 'ffn': tensors['ffn'][:2].clone()})):
        with pytest.raises(ValueError, match=rf'{path.name}` is no file of importance scores, or a damaged one .*measure them again'): Importance.load(path)
    with pytest.raises(FileNotFoundError, match='no such file of importance scores'): Importance.load(tmp_path/'none')

def test_scores_of_another_teacher_are_refused():
    llama, wide = tiny('llama'), tiny('gpt2')
    got = measure(llama, some_windows())
    with pytest.raises(ValueError, match=r'was measured on llama: it has \(3, 2\) scores for heads, .* needs \(3, 4\)'): orders('importance', wide, got)
    with pytest.raises(ValueError, match='was measured on llama of [0-9,]+ parameters, not on'): orders('importance', tiny('qwen3'), got)      # equal shapes


# Bad input

@pytest.mark.parametrize('score, says', [
    ('magnitude', "`score` is 'magnitude'; choose one of default, wanda, activation, taylor, fisher, weight, random, cosine, loss"),
    (dict(width='wanda'), "names the axis 'width'; choose from layers, embd, heads, ffn"), (dict(vocab='weight'), "names the axis 'vocab'"),
    (dict(layers='wanda'), "`score` is 'wanda' for layers; choose one of taylor, fisher, weight, random, cosine, loss"),
    (dict(ffn='loss'), "`score` is 'loss' for ffn; choose one of wanda, activation, taylor, fisher, weight, random")])
def test_unknown_scores(score, says):
    with pytest.raises(ValueError) as e: measure(tiny('llama'), some_windows(), score)
    assert says in str(e.value)

@pytest.mark.parametrize('windows, says', [
    (torch.zeros(0, 9, dtype=torch.int64), 'at least one window'), (torch.ones(3, 1, dtype=torch.int64), 'two tokens'),
    (torch.ones(9, dtype=torch.int64), r'\(n, T \+ 1\)'), (torch.ones(2, 9), 'float32'), ([[1, 2, 3]], '`windows` is list'),
    (torch.ones(1, 66, dtype=torch.int64), 'predict 65 tokens each, .* reads at most 64'),
    (torch.full((2, 9), 96), 'token ids from 96 to 96, .* knows 0 to 95'), (torch.full((2, 9), -1), 'from -1 to -1')])
@pytest.mark.parametrize('score', ['default', 'weight'])
def test_windows_that_cannot_be_read(windows, says, score, monkeypatch):
    net = tiny('llama', max_position_embeddings=64)
    monkeypatch.setattr(net.model, 'forward', lambda **kw: pytest.fail("work began"))
    with pytest.raises(ValueError, match=says): measure(net, windows, score)

@pytest.mark.parametrize('score', ['wanda', 'activation', 'taylor', 'fisher', 'cosine', 'loss'])
def test_a_teacher_that_computes_nan(score):
    net = tiny('llama')
    net.model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    before, axis = checksum(net.model), SCORES[score][0]
    with pytest.raises(ValueError, match='computes NaN or infinity'): measure(net, some_windows(), by(axis, score))
    assert checksum(net.model)==before

def test_a_teacher_without_weights():
    with torch.device('meta'): net = Supernet(type(tiny('llama').model)(tiny('llama').config))
    with pytest.raises(ValueError, match='has no weights in memory: load them'): measure(net, some_windows())

def test_no_batch():
    with pytest.raises(ValueError, match='`batch` is 0; it must be at least 1'): measure(tiny('llama'), some_windows(), batch=0)

def test_defaults_are_scores(): assert all(axis in SCORES[s] for axis, s in DEFAULT.items()) and scores_by_axis()==DEFAULT
