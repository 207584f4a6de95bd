"distill: losses and gradients are those of the definitions, in chunks, in all precisions, and never hold more than a chunk of logits."
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, write_tokens
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from slm_begin import distill
from slm_begin.data import Batches, document_positions
from slm_begin.distill import LOSSES, CrossEntropy, Distill, Logits, Mix, ce_sum, chunked_loss, divergence, hidden_pairs, hidden_states
from slm_begin.pretrain import TrainConfig
from slm_begin.supernet import Supernet

objectives = dict(ce=lambda teacher, **kw: CrossEntropy(**kw), kd=lambda teacher, **kw: Distill(teacher, .3, .7, 2., **kw),
                  kl=lambda teacher, **kw: Distill(teacher, 0, 1, **kw))
for _loss in LOSSES: objectives[f'{_loss} T 2'] = lambda teacher, loss=_loss, **kw: Distill(teacher, .5, .5, 2., loss, .3, **kw)
for _loss in LOSSES[1:]: objectives[_loss] = lambda teacher, loss=_loss, **kw: Distill(teacher, .3, .7, 1., loss, .3, **kw)
every = pytest.mark.parametrize('name', objectives)


@pytest.fixture
def teacher(): return tiny_model(seed=1, hidden_size=48, noise=0)

@pytest.fixture
def student(): return tiny_model(seed=2, noise=0).train()

def batch(rows=3, T=11, vocab=128): return torch.randint(vocab, (rows, T + 1), generator=torch.Generator().manual_seed(0))

def defined(s, t, loss, skew):
    "The divergences as they are defined, of float64 logits; each token's."
    logp, logq = t.log_softmax(-1), s.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    logm = torch.logaddexp(logp + math.log(skew), logq + math.log(1-skew))          # skew p + (1 - skew) q
    kl = lambda p, logp, logq: (p * (logp - logq)).sum(-1)
    return {'kl': lambda: kl(p, logp, logq), 'reverse-kl': lambda: kl(q, logq, logp), 'tv': lambda: (p - q).abs().sum(-1)/2,
            'skew-kl': lambda: kl(p, logp, logm), 'js': lambda: skew * kl(p, logp, logm) + (1-skew) * kl(q, logq, logm)}[loss]()

def dense(teacher, name, student, ids):
    "The objectives as written in the paper, from whole logits in float64."
    s, t = (m(input_ids=ids[:, :-1]).logits.flatten(0, 1).double() for m in (student, teacher))
    ce = F.cross_entropy(s, ids[:, 1:].flatten())
    if name=='ce': return ce
    settings = dict(kd=(.3, .7, 2., 'kl'), kl=(0, 1, 1., 'kl'))
    alpha, beta, T, loss = settings.get(name) or ((.5, .5, 2., name[:-4]) if name.endswith(' T 2') else (.3, .7, 1., name))
    return alpha*ce + beta * T**2 * defined(s/T, t.detach()/T, loss, .3).mean()

def grads(loss, model): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


@every
@pytest.mark.parametrize('chunk', [1, 2, 7, 32, 33, 34, 10_000])
def test_any_chunk_gives_the_dense_loss_and_gradient(teacher, student, name, chunk):
    ids = batch()
    loss, report = objectives[name](teacher, chunk=chunk)(student, ids)
    want = dense(teacher, name, student, ids)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads(loss, student), grads(want, student), rtol=1e-3, atol=1e-6)
    assert all(v.ndim==0 and not v.requires_grad for v in report.values())


@every
def test_tied_embeddings_get_both_gradients(teacher, name):
    student, ids = tiny_model(tie=True, noise=0), batch()
    torch.testing.assert_close(grads(objectives[name](teacher, chunk=5)(student, ids)[0], student), grads(dense(teacher, name, student, ids), student),
                               rtol=1e-3, atol=1e-6)


@every
def test_students_with_shapes_of_their_own(teacher, name):
    net, ids = Supernet(teacher), batch()
    student = net.extract(net.subnet([0, 2], 20, (1, 3), (7, 30)))
    torch.testing.assert_close(grads(objectives[name](net.model)(student, ids)[0], student), grads(dense(net.model, name, student, ids), student),
                               rtol=1e-3, atol=1e-6)


@every
def test_bf16_autocast_agrees_roughly(teacher, student, name):
    ids = batch(8, 32)
    objective = objectives[name](teacher, chunk=50)
    a, _ = objective(student, ids)
    with torch.autocast('cpu', torch.bfloat16): b, report = objective(student, ids)
    assert b.dtype==torch.float32 and abs(a - b) < .02 * a and {v.dtype for v in report.values()}=={torch.float32}
    g, h = grads(a, student), grads(b, student)
    assert h.dtype==torch.float32 and F.cosine_similarity(g, h, 0) > .99 and .95 < h.norm()/g.norm() < 1.05


@every
def test_bf16_weights(teacher, student, name):
    ids = batch(8, 32)
    want = dense(teacher, name, student, ids)
    g = grads(want, student)
    loss, _ = objectives[name](teacher, chunk=50)(student.bfloat16(), ids)
    h = grads(loss, student)
    assert loss.dtype==torch.float32 and abs(loss - want) < .03 * want and h.dtype==torch.bfloat16 and F.cosine_similarity(g, h.float(), 0) > .99


def test_the_weights_gradient_is_not_rounded_to_the_hidden_states_type():
    torch.manual_seed(0)
    hidden, weight, y = torch.randn(64, 16).bfloat16().requires_grad_(), torch.randn(50, 16).requires_grad_(), torch.randint(50, (64,))
    def per_token(logits, rows):
        ce, g = ce_sum(logits, y[rows])
        return ce, ce[None], g
    loss, _ = chunked_loss(hidden, weight, per_token, 16, analytic=True)
    loss.backward()
    assert weight.grad.dtype==torch.float32 and hidden.grad.dtype==torch.bfloat16
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_an_outer_factor_reaches_the_gradients(student):
    "Micro-batches are weighted by their share."
    ids, objective = batch(5), CrossEntropy(chunk=9)
    whole = grads(objective(student, ids)[0], student)
    parts = sum(grads(objective(student, part)[0] * len(part)/5, student) for part in ids.split(2))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@every
def test_without_gradients_nothing_is_prepared_for_them(teacher, student, name):
    ids, objective = batch(), objectives[name](teacher, chunk=10)
    with torch.no_grad(): loss, _ = objective(student, ids)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, objective(student, ids)[0].detach())
    student.requires_grad_(False)
    assert not objective(student, ids)[0].requires_grad


def test_only_the_projection_learns_or_all_but_it(student):
    ids, objective = batch(), CrossEntropy()
    want = dict(zip([n for n,_ in student.named_parameters()], torch.autograd.grad(objective(student, ids)[0], student.parameters()), strict=True))
    for frozen in 'lm_head', 'gpt_neox':
        for n,p in student.named_parameters(): p.requires_grad_(not n.startswith(frozen)), setattr(p, 'grad', None)
        objective(student, ids)[0].backward()
        for n,p in student.named_parameters():
            if n.startswith(frozen): assert p.grad is None, n
            else: torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-7)


def test_the_teacher_gets_no_gradients_and_no_dropout(student):
    teacher = tiny_model(seed=1, hidden_dropout=.5, attention_dropout=.5).train()
    before, ids = {k: v.clone() for k,v in teacher.state_dict().items()}, batch()
    objective = Distill(teacher)
    losses = [objective(student.eval(), ids)[0] for _ in range(2)]
    losses[0].backward()
    assert losses[0]==losses[1] and not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items())


def test_a_student_that_is_the_teacher_has_nothing_to_learn(teacher):
    student, ids = tiny_model(seed=1, hidden_size=48, noise=0), batch()
    loss, report = Distill(teacher, 0, 1, 3.)(student, ids)
    assert abs(loss) < 1e-6 and abs(report['kl']) < 1e-6 and grads(loss, student).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(loss=st.sampled_from(LOSSES), skew=st.floats(.01, .99), seed=st.integers(0, 9), scale=st.sampled_from([0., .1, 1., 10., 100., 1e4]),
       far=st.sampled_from([0., 1., 100.]), alpha=st.sampled_from([0., .3]), beta=st.sampled_from([0., .7, 2.]))
def test_divergences_and_their_gradients(loss, skew, seed, scale, far, alpha, beta):
    "Against float64, up to logits so far apart that probabilities underflow. Errors are those of float32: relative to the largest difference."
    gen = torch.Generator().manual_seed(seed)
    s = torch.randn(4, 50, generator=gen) * scale
    t = s.flip(1) * .5 + torch.randn(4, 50, generator=gen) * far
    z = s.double().requires_grad_()
    want, lse = defined(z, t.double(), loss, skew), z.logsumexp(-1)
    g, = torch.autograd.grad(beta * want.sum() + alpha * lse.sum(), z)
    far, got, lse_got = divergence(s.clone(), t.clone(), loss, skew, beta, alpha)
    wide = 1 + (s.abs().max() + t.abs().max()).item()
    assert torch.isfinite(far).all() and torch.isfinite(got).all() and (far > -1e-5 * wide).all()
    torch.testing.assert_close(far.double(), want.detach(), rtol=1e-4, atol=2e-6 * wide)
    torch.testing.assert_close(lse_got.double(), lse.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), g, rtol=1e-3, atol=1e-5 * wide if loss in ('reverse-kl', 'js') else 2e-6 * wide**.5)


@pytest.mark.parametrize('loss', LOSSES)
def test_divergences_of_ones_own(loss):
    z = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 5
    far, g, _ = divergence(z.clone(), z.clone() + 3., loss)                           # a constant changes no distribution
    assert far.abs().max() < 1e-5 and (loss=='tv' or g.abs().max() < 1e-6)            # that of tv has a step here


def test_what_bounds_the_losses():
    "Jensen-Shannon, skew KL and total variation stay finite where nothing is shared; the two KLs do not."
    t, s = torch.full((1, 8), -1e4), torch.full((1, 8), -1e4)
    t[:, 0], s[:, 1] = 1e4, 1e4
    far = {loss: divergence(s.clone(), t.clone(), loss, .1)[0].item() for loss in LOSSES}
    assert far['kl']==far['reverse-kl']==pytest.approx(2e4) and far['tv']==pytest.approx(1.) and far['skew-kl']==pytest.approx(-math.log(.1))
    assert far['js']==pytest.approx(-.1 * math.log(.1) - .9 * math.log(.9))


class Watch(TorchDispatchMode):
    "Records the largest tensor that any operation makes, and how many numbers are alive at most in tensors of at least `large`."
    def __init__(self, large):
        super().__init__()
        self.large, self.alive, self.largest, self.peak = large, WeakTensorKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if not isinstance(t, torch.Tensor): continue
            self.largest = max(self.largest, t.numel())
            if t.numel() >= self.large: self.alive[t] = t.numel()
        self.peak = max(self.peak, sum({t.untyped_storage().data_ptr(): n for t,n in self.alive.items()}.values()))
        return out


@every
def test_logits_never_stand_in_memory_together(name):
    "Forward and backward for a large vocabulary: no tensor of tokens x vocabulary, nor of a good part of it, nor many chunks at a time."
    V, chunk, ids = 9_973, 16, batch(8, 64, 9_973)
    kw = dict(vocab_size=V, num_hidden_layers=1, noise=0, intermediate_size=32)
    teacher, student = tiny_model(seed=1, **kw), tiny_model(seed=2, **kw)
    N, weights = ids[:, 1:].numel(), V * 32
    with Watch(chunk * V) as seen:
        loss, _ = objectives[name](teacher, chunk=chunk)(student, ids)
        loss.backward()
    assert seen.largest==max(chunk * V, weights) < N * V/8
    assert seen.peak <= 8 * chunk * V + 3 * weights < N * V/2
    with Watch(chunk * V) as naive: loss = student(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
    assert naive.largest==N * V <= naive.peak                       # the measure sees what it should


def test_hidden_states_are_those_before_the_projection(student):
    ids = batch()
    logits = hidden_states(student, ids) @ student.lm_head.weight.T
    torch.testing.assert_close(logits, student(input_ids=ids).logits.flatten(0, 1))


@pytest.mark.parametrize('kw,message', [(dict(alpha=-1), 'alpha=-1'), (dict(alpha=0, beta=0), 'one of them > 0'), (dict(temperature=0), '`temperature` is 0'),
                                        (dict(beta=-.1), 'beta=-0.1'),
    (dict(alpha=math.nan), 'alpha=nan'), (dict(temperature=math.nan), 'temperature'), (dict(loss='jsd'), "is 'jsd'; choose one of kl, reverse-kl"),
    (dict(skew=0.), '`skew` is 0'),
    (dict(skew=1), '`skew` is 1'), (dict(weights='cosine'), "is 'cosine'; choose one of constant, linear, wsd"),
    (dict(weights='linear', alpha_end=-1), 'alpha=-1'),
    (dict(weights='wsd', alpha_end=0, beta_end=0), 'one of them > 0'), (dict(beta_end=.5), "`weights` is 'constant'"), (dict(hidden=-1), '`hidden` is -1'),
    (dict(hidden=.1), 'give `subnet`'), (dict(hidden_loss='l1'), "is 'l1'; choose one of cosine, mse"), (dict(vocab=0), '`vocab` is 0')])
def test_impossible_settings(teacher, kw, message):
    with pytest.raises(ValueError, match=message): Distill(teacher, **kw)


def test_chunks_and_vocabularies_that_cannot_be(teacher, student):
    with pytest.raises(ValueError, match='`chunk` is 0'): CrossEntropy(chunk=0)(student, batch())
    with pytest.raises(ValueError, match="student's vocabulary has 128 entries, the teacher's 130"): Distill(tiny_model(vocab_size=130))(student, batch())
    with pytest.raises(ValueError, match='`vocab` is 129'): Distill(tiny_model(vocab_size=130), vocab=129).ready(student)


def test_keys_tell_objectives_apart(teacher):
    keys = [o.key for o in (CrossEntropy(), Distill(teacher), Distill(teacher, .5), Distill(teacher, temperature=2.), Distill(tiny_model()))]
    assert all(a!=b for i,a in enumerate(keys) for b in keys[:i]) and CrossEntropy(chunk=7).key==keys[0]


def test_settings_without_effect_leave_the_key():
    teacher, net = tiny_model(), Supernet(tiny_model())
    two = [Distill(teacher, hidden=.1, subnet=net.subnet([0], e, 2, 8)).key for e in ([0, 1], [0, 2])]
    assert two[0]!=two[1] and Distill(teacher, subnet=net.full).key==Distill(teacher).key!=Distill(teacher, loss='tv').key


def test_weights_follow_their_schedules():
    assert Mix(.3, .7).at(.5, .1)==(.3, .7)
    linear, wsd = Mix(0., 1., 'linear', 1., 0.), Mix(.1, .9, 'wsd', 1., 0.)
    assert [linear.at(p, .3) for p in (0, .25, 1)]==[(0, 1), (.25, .75), (1, 0)]
    assert wsd.at(.7, 1.)==(.1, .9) and wsd.at(.2, 0.)==(1., 0.) and wsd.at(0, .5)==pytest.approx((.55, .45))
    assert Mix(.3, .7, 'linear', beta_end=0.).at(1.)==(.3, 0.)                        # an end that is not given is the beginning


def test_schedules_reach_the_loss(teacher, student):
    ids, loss = batch(), lambda o, **kw: o(student, ids, **kw)[0].detach()
    o = Distill(teacher, 0., 1., weights='linear', alpha_end=1., beta_end=0.)
    torch.testing.assert_close(loss(o, progress=1.), loss(CrossEntropy()))
    torch.testing.assert_close(loss(o, progress=.3), loss(Distill(teacher, .3, .7)))
    torch.testing.assert_close(loss(Distill(teacher, 0., 1., weights='wsd', alpha_end=1., beta_end=0.), lr_scale=.7), loss(Distill(teacher, .3, .7)))


@every
def test_padding_is_nothing(teacher, student, name):
    "A padded batch has the loss and gradients of its texts one by one, weighted by their tokens."
    ids, objective, sizes = batch(), objectives[name](teacher, chunk=7), (11, 4, 7)
    padded = ids.clone()
    for row,n in zip(padded, sizes, strict=True): row[n+1:] = -100
    loss, report = objective(student, padded)
    alone = [objective(student, row[None, :n+1]) for row,n in zip(ids, sizes, strict=True)]
    mean = lambda values: sum(v * n for v,n in zip(values, sizes, strict=True)) / sum(sizes)
    torch.testing.assert_close(loss, mean([l for l,_ in alone]))
    torch.testing.assert_close(grads(loss, student), grads(mean([l for l,_ in alone]), student), rtol=1e-3, atol=1e-6)
    for k in report: torch.testing.assert_close(report[k], mean([r[k] for _,r in alone]))
    empty, _ = objective(student, torch.full_like(ids, -100))
    assert empty==0 and not grads(empty, student).any()                               # no token at all: no NaN


def test_padding_is_nothing_to_hidden_states_either(teacher):
    net, ids = Supernet(teacher), batch(2)
    subnet = net.subnet([0, 2], 20, 2, 30)
    objective, student = Distill(net.model, hidden=1., subnet=subnet), net.extract(subnet)
    padded = torch.cat([ids, torch.full((2, 5), -100)], 1)
    (a, _), (b, _) = objective(student, ids), objective(student, padded)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(grads(a, student), grads(b, student), rtol=1e-3, atol=1e-6)
    assert torch.isfinite(grads(objective(student, torch.full_like(ids, -100))[0], student)).all()


def family(name, **kw):
    "A tiny causal LM of a family, with weights large enough for attention to matter."
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    cfg = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, bos_token_id=0,
               eos_token_id=0, pad_token_id=0, num_key_value_heads=2, head_dim=8, initializer_range=.3)
    if name in ('gpt2', 'gpt_neox', 'bloom'): cfg = {k: v for k,v in cfg.items() if k not in ('num_key_value_heads', 'head_dim')}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **cfg | kw)).eval()

families = pytest.mark.parametrize('name', ['gpt_neox', 'llama', 'qwen3', 'gemma', 'gemma2', 'gpt2', 'cohere'])


@families
def test_documents_are_kept_apart(name):
    "Of a window with three documents: the logits and the gradients are those of each alone; also with our attention for CPUs."
    model, eot = family(name), 127
    ids = torch.randint(1, 127, (1, 21), generator=torch.Generator().manual_seed(0))
    ids[0, [6, 13]] = eot
    positions, parts, objective = document_positions(ids[:, :-1], eot), [(0, 6), (6, 13), (13, 20)], CrossEntropy()
    alone = torch.cat([Logits(model, ids[:, a:b]).rows(slice(None)) for a,b in parts])
    torch.testing.assert_close(Logits(model, ids[:, :-1], positions).rows(slice(None)), alone, rtol=1e-4, atol=1e-4)
    assert (Logits(model, ids[:, :-1]).rows(slice(None)) - alone)[6:].abs().max() > .01     # and it makes a difference
    whole = grads(objective(model, ids, positions=positions)[0], model)
    apart = sum(grads(objective(model, ids[:, a:b+1])[0] * (b-a) / 20, model) for a,b in parts)
    torch.testing.assert_close(whole, apart, rtol=1e-3, atol=1e-5)


def test_distillation_of_documents_kept_apart(teacher, student):
    ids = batch(2, 20).clamp(max=126)
    ids[0, [0, 8]], ids[1, 5] = 127, 127
    positions, objective = document_positions(ids[:, :-1], 127), Distill(teacher, .3, .7)
    parts = [(0, 0, 8), (0, 8, 20), (1, 0, 5), (1, 5, 20)]
    whole = objective(student, ids, positions=positions)[0]
    apart = sum(objective(student, ids[r:r+1, a:b+1])[0] * (b-a) / 40 for r,a,b in parts)
    torch.testing.assert_close(whole, apart)
    torch.testing.assert_close(grads(whole, student), grads(apart, student), rtol=1e-3, atol=1e-6)


def test_families_that_do_not_keep_documents_apart_are_refused(student, monkeypatch):
    where = torch.arange(10).repeat(1, 1)
    with pytest.raises(ValueError, match='BloomForCausalLM` does not keep documents apart.*`separate` off'): Logits(family('bloom'), where, where)
    body = student.base_model.forward                                                # takes positions, and does not heed them
    def heedless(input_ids=None, position_ids=None, **kw): return body(input_ids=input_ids, **kw)
    monkeypatch.setattr(student.base_model, 'forward', heedless)
    Logits(student, where)
    for _ in range(2):
        with pytest.raises(ValueError, match='does not keep documents apart'): Logits(student, where, where)


def test_models_whose_logits_are_made_otherwise_are_refused(student):
    student.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    for _ in range(2):
        with pytest.raises(ValueError, match='not made of its last hidden states'): CrossEntropy()(student, batch())
    assert student.training


@pytest.mark.parametrize('name,kw', [('gemma2', dict(final_logit_softcapping=2.)), ('cohere', dict(logit_scale=.3)), ('granite', dict(logits_scaling=4.)),
                                     ('phi', {})])
@pytest.mark.parametrize('loss', LOSSES)
def test_what_families_do_to_their_logits(name, kw, loss):
    "Soft caps, factors, biases: value and gradient are those of the model's own logits."
    student, teacher, ids = family(name, **kw), family(name, **kw), batch(2, 6)
    for p in teacher.parameters(): p.data += .1
    objective = Distill(teacher, .4, .6, 1.5, loss, .3, chunk=5)
    s, t = (m(input_ids=ids[:, :-1]).logits.flatten(0, 1).double() for m in (student, teacher))
    want = .4 * F.cross_entropy(s, ids[:, 1:].flatten()) + .6 * 1.5**2 * defined(s/1.5, t.detach()/1.5, loss, .3).mean()
    got = objective(student, ids)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads(got, student), grads(want, student), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('T', [1., 2.])
@pytest.mark.parametrize('ours,theirs', [(128, 131), (131, 128), (130, 131)])
def test_vocabularies_padded_differently(loss, T, ours, theirs):
    "Distributions over the shared entries; cross-entropy as the student has it. Value and gradient."
    student, teacher, ids = tiny_model(vocab_size=ours, noise=.1), tiny_model(seed=1, vocab_size=theirs), batch(2, 6)
    s, t = (m(input_ids=ids[:, :-1]).logits.flatten(0, 1).double() for m in (student, teacher))
    want = .4 * F.cross_entropy(s, ids[:, 1:].flatten()) + .6 * T**2 * defined(s[:, :128]/T, t[:, :128].detach()/T, loss, .3).mean()
    objective = Distill(teacher, .4, .6, T, loss, .3, vocab=128, chunk=5)
    objective.ready(student)
    got = objective(student, ids)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads(got, student), grads(want, student), rtol=1e-3, atol=1e-5)


def test_a_text_of_another_tokenizer_is_refused(teacher, student, tmp_path):
    cfg = TrainConfig(tokens=100, seq_len=16, batch_size=2)
    at_home, foreign = (Batches(write_tokens(tmp_path/str(vocab), 500, vocab), 16, 2) for vocab in (128, 200))
    for objective in CrossEntropy(), Distill(teacher):
        objective.ready(student, at_home, cfg)
        with pytest.raises(ValueError, match='tokenizer of 200 entries.*model has 128'): objective.ready(student, foreign, cfg)
    with pytest.raises(ValueError, match='`vocab` is 100.*tokenizer of 128'): Distill(tiny_model(vocab_size=130), vocab=100).ready(student, at_home, cfg)


def test_hidden_states_go_by_the_students_own_indices(teacher):
    "By hand: what each block reads, and the end, in the channels that were kept, in their order."
    net, ids = Supernet(teacher), batch(2)
    subnet = net.subnet([0, 2], [5, 1, 30, 17, 2, 9], 2, 30)
    student = net.extract(subnet)
    assert hidden_pairs(subnet, 3)==[(1, 2), (2, 3)]
    s, t = (m(input_ids=ids[:, :-1], output_hidden_states=True).hidden_states for m in (student, net.model))
    pairs = [(s[i], t[j][..., [5, 1, 30, 17, 2, 9]].detach()) for i,j in ((1, 2), (2, 3))]
    want = dict(cosine=sum(1 - F.cosine_similarity(a, b, -1).mean() for a,b in pairs)/2,
                mse=sum(((a - b)**2).mean(-1).div((b**2).mean(-1)).mean() for a,b in pairs)/2)
    for kind,far in want.items():
        plain, (loss, report) = Distill(net.model)(student, ids)[0], Distill(net.model, hidden=2., hidden_loss=kind, subnet=subnet)(student, ids)
        torch.testing.assert_close(report['hidden'], far.detach())
        want = torch.autograd.grad(plain + 2 * far, student.parameters(), retain_graph=True)
        torch.testing.assert_close(grads(loss, student), torch.cat([g.flatten() for g in want]), rtol=1e-3, atol=1e-6)


def test_sub_networks_that_do_not_fit_are_refused(teacher):
    net = Supernet(teacher)
    a, b = net.subnet([0, 2], 20, 2, 30), net.subnet([1], 20, 2, 30)
    student, of = net.extract(a), lambda subnet, teacher=net.model: Distill(teacher, hidden=1., subnet=subnet)
    of(a).ready(student)
    with pytest.raises(ValueError, match='keeps 1 layers and 20 channels; the student has 2 and 20'): of(b).ready(student)
    with pytest.raises(ValueError, match='not one of this teacher, which has 2 layers and 32 channels'): of(a, tiny_model(num_hidden_layers=2)).ready(student)


@pytest.mark.parametrize('loss', ['kl', 'reverse-kl', 'js'])
@pytest.mark.parametrize('T', [1., 2.])
def test_liger_computes_the_same(teacher, student, monkeypatch, loss, T):
    "With liger's own kernels: on a GPU, or anywhere in Triton's interpreter (`TRITON_INTERPRET=1`, `pip install liger-kernel triton`)."
    if not (torch.cuda.is_available() or os.environ.get('TRITON_INTERPRET')): pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    liger = pytest.importorskip('liger_kernel.transformers')
    device, ids = 'cuda' if torch.cuda.is_available() else 'cpu', batch()
    ids[1, 5:] = -100
    student, ids, seen = student.to(device), ids.to(device), []
    for objective in CrossEntropy(), Distill(teacher.to(device), 0., .7, T, loss, .3):
        monkeypatch.setattr(distill, '_liger', lambda: None)
        want, told = objective(student, ids)
        monkeypatch.setattr(distill, '_liger', lambda: seen.append(1) or liger)
        got, fused = objective(student, ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads(got, student), g := grads(want, student), rtol=1e-3, atol=1e-5)
        for k in fused: torch.testing.assert_close(fused[k], told[k], rtol=1e-4, atol=1e-6)
        with torch.autocast(device, torch.bfloat16): half, _ = objective(student, ids)
        h = grads(half, student)
        assert half.dtype==torch.float32 and abs(half - want) < .02 * want and h.dtype==torch.float32 and F.cosine_similarity(g, h, 0) > .99
    assert len(seen)==4


def test_liger_is_asked_only_for_what_it_has(monkeypatch):
    "Not for soft caps, biases, padded vocabularies, two losses at once, or losses that it lacks."
    monkeypatch.setattr(distill, '_liger', lambda: pytest.fail("liger was asked"))
    ids, plain, wide = batch(2, 6), tiny_model(), tiny_model(vocab_size=130)
    for name,kw in ('gemma2', dict(final_logit_softcapping=2.)), ('phi', {}):
        model = family(name, **kw)
        for objective in CrossEntropy(), Distill(model, 0., 1.): objective(model, ids)
    for teacher,kw in (plain, dict(alpha=.1)), (plain, dict(loss='tv')), (plain, dict(loss='skew-kl')), (wide, dict(vocab=128)):
        Distill(teacher, **dict(alpha=0., beta=1.) | kw)(plain, ids)
    with pytest.raises(BaseException, match='liger was asked'): Distill(plain, 0., 1.)(plain, ids)


def test_the_comparisons_leave_a_model_as_it_was(student):
    before, state = {k: v.clone() for k,v in student.state_dict().items()}, torch.get_rng_state()
    CrossEntropy()(student, batch(), positions=document_positions(batch()[:, :-1], 0))
    assert student.training and torch.equal(torch.get_rng_state(), state) and all(torch.equal(v, before[k]) for k,v in student.state_dict().items())


def test_the_limits_of_the_generalised_jensen_shannon_divergence():
    "GKD's equation: divided by its weight it becomes KL(p || q) at 0 and KL(q || p) at 1; so p and q are not exchanged. At 1/2 it is symmetric."
    t, s = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0))
    far = lambda s, t, *kind: divergence(s.clone(), t.clone(), *kind)[0].sum().item()
    kl, reverse = far(s, t, 'kl'), far(s, t, 'reverse-kl')
    assert kl==pytest.approx(F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction='sum').item(), rel=1e-4)
    assert abs(kl - reverse) > .1 and reverse==pytest.approx(far(t, s, 'kl'), rel=1e-5)
    assert far(s, t, 'js', 1e-3) / 1e-3==pytest.approx(kl, rel=1e-2) and far(s, t, 'js', 1-1e-3) / 1e-3==pytest.approx(reverse, rel=1e-2)
    assert far(s, t, 'skew-kl', 1e-6)==pytest.approx(kl, rel=1e-3)
    assert far(s, t, 'js', .5)==pytest.approx(far(t, s, 'js', .5), rel=1e-5) and far(s, t, 'tv')==pytest.approx(far(t, s, 'tv'), rel=1e-5)


def test_under_autocast_teacher_and_student_are_multiplied_in_its_type(teacher, student):
    kinds = []
    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default and args[0].shape[0]==33: kinds.append(args[0].dtype)
            return func(*args, **(kwargs or {}))
    objective = Distill(teacher)
    objective(student, batch())
    with torch.autocast('cpu', torch.bfloat16), Types(): objective(student, batch())
    assert set(kinds)=={torch.bfloat16} and len(kinds) >= 3


@pytest.fixture(scope='module')
def embedded(): return Supernet.from_pretrained()

def test_hidden_states_of_layer_wise_students(embedded):
    "A student of the embedded teacher: it is nearer in its own channels than in its neighbours'; the whole teacher is at no distance."
    layerwise = lambda first: embedded.subnet([0, 2, 5], range(first, first+96), (2, 5, 3), (64, 200, 31))
    ids = torch.randint(embedded.sizes['vocab'], (2, 12), generator=torch.Generator().manual_seed(0))
    far = lambda student, subnet, kind: Distill(embedded.model, hidden=1., hidden_loss=kind, subnet=subnet)(student, ids)[1]['hidden']
    student = embedded.extract(layerwise(3))
    Distill(embedded.model, hidden=1., subnet=layerwise(3)).ready(student)
    for kind in 'cosine', 'mse':
        assert far(student, layerwise(3), kind) < .9 * far(student, layerwise(4), kind) and far(embedded.model, embedded.full, kind).abs() < 1e-5
