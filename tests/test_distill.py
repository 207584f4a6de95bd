"distill: chunks are what they stand for, in all precisions, and never hold more than a chunk of logits."
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from slm_begin.distill import CrossEntropy, Distill, ce_sum, chunked_loss, hidden_states, kl_sum
from slm_begin.supernet import Supernet

objectives = dict(ce=lambda teacher, **kw: CrossEntropy(**kw), kd=lambda teacher, **kw: Distill(teacher, .3, .7, 2., **kw),
                  kl=lambda teacher, **kw: Distill(teacher, 0, 1, **kw))
every = pytest.mark.parametrize('name', objectives)


@pytest.fixture
def teacher(): return tiny_model(seed=1, hidden_size=48, noise=0)

@pytest.fixture
def student(): return tiny_model(seed=2, noise=0).train()

def batch(rows=3, T=11, vocab=128): return torch.randint(vocab, (rows, T + 1), generator=torch.Generator().manual_seed(0))

def dense(teacher, name, student, ids):
    "The objectives as written in the paper, from whole logits in float64."
    s, t = (m(input_ids=ids[:, :-1]).logits.flatten(0, 1).double() for m in (student, teacher))
    ce = F.cross_entropy(s, ids[:, 1:].flatten())
    kl = lambda T: (F.softmax(t/T, -1) * (F.log_softmax(t/T, -1) - F.log_softmax(s/T, -1))).sum(-1).mean() * T**2
    return dict(ce=lambda: ce, kd=lambda: .3*ce + .7*kl(2.), kl=lambda: kl(1.))[name]()

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
    per_token = lambda logits, rows: ((loss := ce_sum(logits, y[rows])), loss.detach()[None])
    loss, _ = chunked_loss(hidden, weight, per_token, 16)
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


def test_kl_of_peaked_and_padded_logits():
    "Vocabularies are padded: entries that the teacher rules out must not make the loss infinite or undefined."
    t, s = torch.zeros(2, 10), torch.zeros(2, 10)
    t[:, 0], s[:, 1] = 200., 200.
    assert kl_sum(s, t)==pytest.approx(400., rel=1e-4) and kl_sum(t, t)==0
    t[:, 8:] = -1e4
    s.requires_grad_()
    loss = kl_sum(s, t, 2.)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()
    assert kl_sum(torch.randn(3, 10).bfloat16().float(), torch.randn(3, 10).bfloat16()).dtype==torch.float32


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


@pytest.mark.parametrize('kw,message', [(dict(alpha=-1), 'alpha=-1'), (dict(alpha=0, beta=0), 'one of them > 0'), (dict(temperature=0), 'temperature=0'),
                                        (dict(beta=-.1), 'beta=-0.1')])
def test_impossible_settings(teacher, kw, message):
    with pytest.raises(ValueError, match=message): Distill(teacher, **kw)


def test_chunks_and_vocabularies_that_cannot_be(teacher, student):
    with pytest.raises(ValueError, match='`chunk` is 0'): CrossEntropy(chunk=0)(student, batch())
    with pytest.raises(ValueError, match="student's vocabulary has 128 entries, the teacher's 130"): Distill(tiny_model(vocab_size=130))(student, batch())


def test_keys_tell_objectives_apart(teacher):
    keys = [o.key for o in (CrossEntropy(), Distill(teacher), Distill(teacher, .5), Distill(teacher, temperature=2.), Distill(tiny_model()))]
    assert all(a!=b for i,a in enumerate(keys) for b in keys[:i]) and CrossEntropy(chunk=7).key==keys[0]
