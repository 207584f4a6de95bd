"cache: it is the teacher, exactly or in expectation; whoever writes it, killed or not, writes the same bytes; and what does not belong to it is refused."
import json
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, write_tokens

from slm_begin import cache as module
from slm_begin.cache import Cache, Cached, Opinions, cache_teacher, keep_draws, keep_top, sparse_kl
from slm_begin.data import Batches, Mixture, Tokens
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.pretrain import TrainConfig, pretrain

quiet = dict(say=lambda line: None, precision='fp32')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def tokens(tmp_path_factory): return write_tokens(tmp_path_factory.mktemp('tokens')/'t', 1000)    # 62 windows of 16 tokens

def batches(tokens, seq_len=16, batch_size=4, seed=3): return Batches(tokens, seq_len, batch_size, seed)

def teacher(**kw): return tiny_model(**dict(seed=1, num_hidden_layers=2, hidden_size=16) | kw)

def student(**kw): return tiny_model(**dict(seed=2, num_hidden_layers=2, hidden_size=16) | kw)

def write(tokens, out, **kw):
    kw = dict(rows=40, shard_rows=8) | quiet | kw
    return cache_teacher(kw.pop('teacher', None) or teacher(), kw.pop('batches', None) or batches(tokens), out, **kw)

def step(objective, model, b, i=0):
    "Loss, reported sums and gradient on the batch of a step."
    loss, report = objective(model, b[i], windows=torch.from_numpy(b.window_ids(i, 0, b.batch_size)))
    return loss.detach(), report, grads(loss, model)

def grads(loss, model): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

def contents(folder): return {f.name: f.read_bytes() for f in sorted(folder.glob('*')) if f.suffix in ('.safetensors', '.bin')}

def identity(folder): return json.loads((folder/'manifest.json').read_text())['identity']


# It is the teacher

@pytest.mark.parametrize('dtype,tolerance', [('float32', 1e-6), ('float16', 2e-3)])
@pytest.mark.parametrize('alpha,beta,T', [(0, 1, 1), (.3, .7, 1), (.3, .7, 2), (0, 1, .5), (1, 0, 1)])
def test_all_of_the_vocabulary_is_the_live_teacher(tokens, tmp_path, alpha, beta, T, dtype, tolerance):
    cache, model, b = write(tokens, tmp_path/'c', method='topk', k=128, temperature=T, dtype=dtype), student(), batches(tokens)
    loss, report, g = step(Cached(cache, alpha, beta, chunk=10), model, b)
    live, reported, h = step(Distill(teacher(), alpha, beta, T), model, b)
    torch.testing.assert_close(loss, live, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(g, h, rtol=tolerance, atol=tolerance * h.abs().max().item())
    for name in 'ce', 'kl': torch.testing.assert_close(report[name], reported[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('kw', [dict(tie=True), dict(tie=False)])
@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_any_chunk_and_tied_embeddings(tokens, tmp_path, chunk, kw):
    cache, model, b = write(tokens, tmp_path/'c', method='topk', k=128, dtype='float32', chunk=chunk), student(**kw), batches(tokens)
    torch.testing.assert_close(step(Cached(cache, chunk=chunk), model, b)[2], step(Distill(teacher()), model, b)[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['gemma2', 'cohere', 'granite', 'phi'])
def test_families_with_more_than_a_product(tmp_path, family):
    "A soft cap, a factor, a bias: in the teacher's logits and in the student's gradient."
    from test_families import tiny
    tokens, model, other = write_tokens(tmp_path/'t', 300, 96), tiny(family).model.requires_grad_(), tiny(family, seed=1).model
    b = batches(tokens)
    cache = write(tokens, tmp_path/'c', teacher=other, batches=b, rows=4, method='topk', k=96, dtype='float32')
    (loss, _, g), (live, _, h) = (step(o, model, b) for o in (Cached(cache, chunk=10), Distill(other)))
    torch.testing.assert_close(loss, live, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


@pytest.mark.parametrize('k', [1, 5, 127])
@pytest.mark.parametrize('T', [1., 3.])
def test_the_rest_is_one_more_class(k, T):
    "KL over k + 1 classes as written, in float64 by autograd."
    torch.manual_seed(0)
    t, s = torch.randn(6, 128) * 3, (torch.randn(6, 128) * 2).double().requires_grad_()
    kept = keep_top(t, k, T)
    p, q = ((o / T).double().softmax(-1) for o in (t, s))
    both = [torch.cat([o.gather(1, kept['ids']), 1 - o.gather(1, kept['ids']).sum(-1, keepdim=True)], -1) for o in (p, q)]
    want = (both[0] * (both[0].log() - both[1].log())).sum(-1)
    g, = torch.autograd.grad(want.sum(), s)
    probs, rest = kept['logp'].exp(), kept['rest'].exp().float()
    mine = Opinions(kept['ids'], probs, rest, torch.special.entr(probs).sum(-1) + torch.special.entr(rest))
    logq = (s.detach() / T).float().log_softmax(-1)
    picked = logq.gather(1, mine.ids)
    kl, factor, more = sparse_kl(picked.exp(), picked, mine)
    torch.testing.assert_close(kl.double(), want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(((factor[:, None] * logq.exp()).scatter_add(1, mine.ids, more) / T).double(), g, rtol=1e-3, atol=1e-5)


def test_what_is_kept_of_the_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(5, 50) * 4
    kept, p = keep_top(logits, 7, 2.), (logits.double() / 2).softmax(-1)
    torch.testing.assert_close(kept['logp'].double().exp(), p.topk(7)[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept['rest'].double().exp(), 1 - p.topk(7)[0].sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((kept['logp'] + kept['lse'][:, None]) * 2, logits.topk(7)[0])            # the logits can be had again
    assert (keep_top(logits, 50)['rest']==-torch.inf).all()


def test_draws_are_as_even_as_they_can_be():
    "Each id is drawn draws * p times, rounded down or up; what is impossible never is."
    torch.manual_seed(0)
    logits = torch.randn(200, 50) * 3
    logits[:, :3], logits[:, -2:] = -1e4, -torch.inf
    p = logits.double().softmax(-1)
    for u in torch.ones(200), torch.full((200,), 1e-12), torch.rand(200, dtype=torch.float64):
        kept = keep_draws(logits, 50, u)
        row = torch.repeat_interleave(torch.arange(200), kept['unique'])
        drawn = torch.zeros(200, 50).index_put_((row, kept['ids']), kept['counts'].float(), accumulate=True)
        assert (drawn.sum(-1)==50).all() and (drawn > 0).sum()==len(kept['ids']) and not drawn[:, :3].any() and not drawn[:, -2:].any()
        assert ((drawn - 50 * p).abs() < 1 + 1e-3).all()
        torch.testing.assert_close(kept['entropy'].double(), torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5)


def test_sampling_gives_the_live_gradient_in_expectation_and_the_likeliest_do_not(tokens, tmp_path):
    """Of 60 caches with seeds of their own, along the gradient itself and 11 random directions: Student's t below 4 (a false alarm of all in 500),
    while the likeliest 4 miss by ten times what the mean of the 60 may."""
    model, b, n = student(), batches(tokens), 60
    true = step(Distill(teacher(), 0, 1), model, b)[2]
    directions = torch.cat([true[None], torch.randn(11, len(true), generator=torch.Generator().manual_seed(0)) * true.abs()])
    of = lambda i, **kw: directions @ (step(Cached(write(tokens, tmp_path/str(i), rows=4, **kw), 0, 1), model, b)[2] - true)
    off = torch.stack([of(i, draws=12, seed=i) for i in range(n)]).double()
    bound = off.std(0) / n**.5
    assert ((off.mean(0) / bound).abs() < 4).all()
    assert (of('top', method='topk', k=4).double() / bound).abs().max() > 10


def test_the_reported_kl_of_draws_is_the_true_one_on_average(tokens, tmp_path):
    model, b = student(), batches(tokens)
    kl = lambda o: step(o, model, b)[1]['kl'].item()
    drawn = [kl(Cached(write(tokens, tmp_path/str(i), rows=4, draws=20, seed=i))) for i in range(30)]
    assert abs(np.mean(drawn) - kl(Distill(teacher()))) < 4 * np.std(drawn) / 30**.5 + 1e-3


def test_half_precision_costs_little(tokens, tmp_path):
    a, b = (write(tokens, tmp_path/d, method='topk', k=16, dtype=d).read(batches(tokens).window_ids(0, 0, 4)) for d in ('float16', 'float32'))
    torch.testing.assert_close(a.probs, b.probs, rtol=4e-3, atol=0)
    for kept in a, b: torch.testing.assert_close(kept.probs.sum(-1) + kept.rest, torch.ones(64))


# The objective

@pytest.mark.parametrize('method', ['topk', 'sample'])
def test_padding_is_no_target(tokens, tmp_path, method):
    "Padded at the right, a window is what its beginning is: attention is causal."
    cache, model, b = write(tokens, tmp_path/'c', method=method), student(), batches(tokens)
    rows, windows, objective = b[0].clone(), b.window_ids(0, 0, 4), Cached(cache, chunk=10)
    rows[:, 11:] = -100
    loss, report = objective(model, rows, windows=windows)
    kept = cache.read(windows)
    part = Opinions(*(o.view(4, 16, *o.shape[1:])[:, :10].flatten(0, 1) for o in kept))
    short = Cached(SimpleNamespace(identity=cache.identity, read=lambda windows: part, key=''), chunk=10)
    want, wanted = short(model, b[0][:, :11], windows=windows)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads(loss, model), grads(want, model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(report['kl'], wanted['kl'], rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up(tokens, tmp_path):
    cache, model, b = write(tokens, tmp_path/'c'), student(), batches(tokens)
    objective, ids, windows = Cached(cache), b[0], b.window_ids(0, 0, 4)
    parts = sum(grads(objective(model, ids[[i]], windows=windows[[i]])[0] / 4, model) for i in range(4))
    torch.testing.assert_close(parts, grads(objective(model, ids, windows=windows)[0], model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('method', ['topk', 'sample'])
def test_no_more_memory_than_cross_entropy(tmp_path, method):
    from test_distill import Watch
    V, chunk = 9_973, 16
    tokens = write_tokens(tmp_path/'t', 600, V)
    kw = dict(vocab_size=V, num_hidden_layers=1, noise=0, intermediate_size=32)
    b, model = batches(tokens, 64, 8), student(**kw)
    cache = write(tokens, tmp_path/'c', teacher=teacher(**kw), batches=b, rows=8, method=method)
    peaks = []
    for objective in CrossEntropy(chunk), Cached(cache, chunk=chunk):
        with Watch(chunk * V // 2) as seen: objective(model, b[0], windows=b.window_ids(0, 0, 8))[0].backward()
        assert seen.largest==max(chunk * V, V * 16)
        peaks.append(seen.peak)
    assert peaks[1] <= 1.2 * peaks[0]


def test_bf16_autocast_agrees_roughly(tokens, tmp_path):
    cache, model, b = write(tokens, tmp_path/'c', method='topk', k=32), student(), batches(tokens)
    a, _, g = step(Cached(cache), model, b)
    with torch.autocast('cpu', torch.bfloat16): c, _, h = step(Cached(cache), model, b)
    assert abs(a - c) < .03 * a and F.cosine_similarity(g, h, 0) > .99


def test_a_run_from_the_cache_is_the_live_run(tokens, tmp_path):
    "Step after step, in uneven micro-batches; and a run goes on with its own cache only."
    cfg = TrainConfig(tokens=6 * 64, seq_len=16, batch_size=4, micro_batch_size=3, lr=1e-2, warmup_steps=2, evals=1, precision='fp32', seed=3)
    every = dict(method='topk', k=128, dtype='float32')
    cache, ends = write(tokens, tmp_path/'c', rows=24, **every), []
    for name,objective in dict(live=Distill(teacher()), cached=Cached(cache)).items():
        model = student(noise=0).train()
        pretrain(model, batches(tokens), cfg, tmp_path/name, objective, say=lambda line: None)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
    assert (ends[0] - torch.cat([p.detach().flatten() for p in student(noise=0).parameters()])).abs().max() > .01
    other = write(tokens, tmp_path/'d', rows=24, teacher=teacher(seed=9), **every)
    with pytest.raises(ValueError, match='holds a run with other settings: cache'):
        pretrain(student(), batches(tokens), cfg, tmp_path/'cached', Cached(other), say=lambda line: None)
    with pytest.raises(ValueError, match='serves 6 steps of this run, which has 7'):
        pretrain(student(), batches(tokens), replace(cfg, tokens=7 * 64), tmp_path/'longer', Cached(cache), say=lambda line: None)


def test_keys_tell_caches_apart(tokens, tmp_path):
    kinds = [dict(), dict(seed=1), dict(method='topk'), dict(method='topk', k=4), dict(rows=24), dict(teacher=teacher(seed=5))]
    caches = [write(tokens, tmp_path/str(i), **kw) for i,kw in enumerate(kinds)]
    keys = [Cached(c).key for c in caches] + [Cached(caches[0], .5).key]
    assert all(a!=b for i,a in enumerate(keys) for b in keys[:i]) and Cached(Cache(tmp_path/'0'), chunk=7).key==keys[0]


# Whoever writes it

def written(folder, out, die_at=None, moment='', process=(0, 1), method='sample', limit=None, result=None):
    "A cache, or a share of it, written by a process of its own, which kills itself with SIGKILL at one of its shards, or may not write large files."
    def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
    write_shard, replace, shards = module.CacheWriter.write, os.replace, []
    def dying(self, i):
        shards.append(i)
        if len(shards) - 1==die_at:
            if moment=='reading': self.opinions = die
            if moment=='half a file': os.fsync = die                    # a part of a file is there then
            if moment=='before renaming': module.os.replace = lambda a, b: die() if str(b).endswith('.safetensors') else replace(a, b)
        write_shard(self, i)
    module.CacheWriter.write = dying
    if moment=='before the manifest': module.os.replace = lambda a, b: die() if str(b).endswith('manifest.json') else replace(a, b)
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: write(Tokens(folder), out, process=process, method=method)
    except OSError as e: result.write_text(str(e))


@pytest.mark.parametrize('method', ['topk', 'sample'])
def test_kill_9_and_resume_ends_in_the_same_bytes(processes, tokens, tmp_path, method):
    whole = write(tokens, tmp_path/'whole', method=method)
    for at,moment in [(0, 'reading'), (0, 'half a file'), (1, 'before renaming'), (1, 'reading'), (None, 'before the manifest')]:
        p = processes(written, tokens.folder, tmp_path/'parts', at, moment, (0, 1), method)
        p.join()
        assert p.exitcode==-signal.SIGKILL, moment
        with pytest.raises(FileNotFoundError, match='holds no finished cache'): Cache(tmp_path/'parts')
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'parts').glob('*.safetensors')}
    again = write(tokens, tmp_path/'parts', method=method)
    assert contents(tmp_path/'parts')==contents(tmp_path/'whole') and again.key==whole.key
    assert len(before)==5 and {f: f.stat().st_mtime_ns for f in before}==before           # what was finished was not written again
    assert sorted(f.name for f in (tmp_path/'parts').iterdir())==sorted([*contents(tmp_path/'whole'), 'manifest.json'])


def test_two_processes_write_what_one_writes(processes, tokens, tmp_path):
    one = write(tokens, tmp_path/'one')
    started = [processes(written, tokens.folder, tmp_path/'two', None, '', (i, 2)) for i in range(2)]
    for p in started: p.join()
    assert [p.exitcode for p in started]==[0, 0]
    assert contents(tmp_path/'two')==contents(tmp_path/'one') and Cache(tmp_path/'two').key==one.key and identity(tmp_path/'two')==identity(tmp_path/'one')


def test_each_process_writes_its_share_and_the_first_waits(tokens, tmp_path):
    out, got = tmp_path/'c', []
    assert write(tokens, out, process=(1, 2)) is None and sorted(contents(out))==['shard-00001.safetensors', 'shard-00003.safetensors']
    with pytest.raises(TimeoutError, match=r"shards 2, 4 of `.*` have not come from the other processes in 0.1 s: what is finished is kept"):
        write(tokens, out, process=(0, 3), patience=.1)
    first = threading.Thread(target=lambda: got.append(write(tokens, out, process=(0, 2))))
    (out/'shard-00001.safetensors').rename(tmp_path/'late')
    first.start()
    time.sleep(.3)
    assert not got and first.is_alive()
    (tmp_path/'late').rename(out/'shard-00001.safetensors')
    first.join()
    assert got[0].key==write(tokens, tmp_path/'one').key


@pytest.mark.parametrize('method', ['topk', 'sample'])
def test_a_window_is_the_same_beside_any_others(tokens, tmp_path, method):
    "Micro-batches and shards of other sizes, a longer cache, another order: to rounding."
    b, other = batches(tokens), batches(tokens, seed=8)
    caches = [write(tokens, tmp_path/'a', method=method), write(tokens, tmp_path/'b', method=method, micro_batch_size=3, shard_rows=5, rows=43),
              write(tokens, tmp_path/'c', method=method, batches=other, rows=None, chunk=7)]
    for kept in (c.read(b.window_ids(2, 0, 4)) for c in caches[1:]):
        first = caches[0].read(b.window_ids(2, 0, 4))
        if method=='sample': assert (first.ids!=kept.ids).float().mean() < .02
        else: torch.testing.assert_close(first.probs, kept.probs, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(first.entropy, kept.entropy, rtol=1e-2, atol=2e-3)


def test_stopped_and_continued(tokens, tmp_path):
    calls = iter(range(10))
    with pytest.raises(KeyboardInterrupt, match='stopped; the finished shards of the cache'): write(tokens, tmp_path/'c', stop=lambda: next(calls)==2)
    assert len(contents(tmp_path/'c'))==2
    said = []
    assert write(tokens, tmp_path/'c', say=said.append).key==write(tokens, tmp_path/'whole').key
    assert said[-1].startswith('cached 384 of 384 tokens (100%)') and said[-1].endswith(' left')
    assert write(tokens, tmp_path/'c', say=said.append, stop=lambda: True).account and len(said)==2       # finished: nothing is done, nothing said


def test_a_full_disk_keeps_what_is_finished(tokens, tmp_path, monkeypatch):
    fsync, calls = os.fsync, iter(range(100))
    def full(fd):
        if next(calls) >= 6: raise OSError(28, 'No space left on device')
        fsync(fd)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match=r'cannot write `.*shard-00002.safetensors`: .*No space left on device. 2 of 5 shards are finished and kept'):
            write(tokens, tmp_path/'c')
    assert not [*(tmp_path/'c').glob('*.tmp')] and len(contents(tmp_path/'c'))==2      # nothing half-written takes up the space
    assert write(tokens, tmp_path/'c').key==write(tokens, tmp_path/'whole').key


def test_a_disk_that_is_really_full(processes, tokens, tmp_path):
    p = processes(written, tokens.folder, tmp_path/'c', None, '', (0, 1), 'sample', 4000, tmp_path/'result')
    p.join()
    assert p.exitcode==0 and 'cannot write' in (tmp_path/'result').read_text() and not [*(tmp_path/'c').glob('*.tmp')]
    assert write(tokens, tmp_path/'c').key==write(tokens, tmp_path/'whole').key


def test_a_read_only_folder(tokens, tmp_path, monkeypatch):
    def refused(*args, **kw): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(module.os, 'replace', refused)
    with pytest.raises(OSError, match='cannot write a cache to `.*c`: .*Permission denied'): write(tokens, tmp_path/'c')


# What it holds

@pytest.mark.parametrize('kind', [dict(method='topk', k=5), dict(method='topk', k=5, dtype='float32'), dict(draws=255), dict(draws=1)])
@pytest.mark.parametrize('vocab,dtype', [(128, 'uint16'), (90_000, 'uint32')])
def test_ids_of_every_size(tmp_path, vocab, dtype, kind):
    tokens, model = write_tokens(tmp_path/'t', 300, 128), teacher(vocab_size=vocab, initializer_range=2.)
    b = batches(tokens)
    cache = write(tokens, tmp_path/'c', teacher=model, batches=b, rows=4, **kind)
    kept = cache.read(b.window_ids(0, 0, 4))
    with torch.no_grad(): logits = model(input_ids=b[0][:, :-1]).logits.flatten(0, 1)
    assert cache.manifest['dtypes']['ids']==dtype and (vocab==128 or kept.ids.max() > 65_536)
    if 'k' in kind: assert torch.equal(kept.ids, logits.topk(5)[1])
    else: torch.testing.assert_close(kept.probs.sum(-1), torch.ones(64))
    size = sum(len(data) for name,data in contents(tmp_path/'c').items() if name!='windows.bin')
    assert cache.account['tokens']==64 and cache.account['bytes']==size and cache.manifest['bytes_per_token']==round(size/64, 2)


def test_documents_apart(tmp_path):
    "What is said of the second document of a window is what is said of it alone."
    ids = np.random.default_rng(0).integers(1, 128, 17 * 8)
    ids[7::16] = 0
    tokens = write_tokens(tmp_path/'t', ids=ids)
    b = batches(tokens)
    every = dict(method='topk', k=128, dtype='float32', rows=4)
    apart, across = (write(tokens, tmp_path/str(s), separate=s, **every).read(b.window_ids(0, 0, 4)) for s in (True, False))
    at = [torch.zeros(64, 128).scatter(1, o.ids, o.probs).view(4, 16, 128) for o in (apart, across)]
    for row,p,q in zip(b[0], *at, strict=True):
        begin = (row[:-1]==0).nonzero()[-1].item()
        with torch.no_grad(): alone = teacher()(input_ids=row[None, begin:-1]).logits[0].softmax(-1)
        torch.testing.assert_close(p[begin:], alone, rtol=1e-4, atol=1e-6)
        assert begin==0 or (q[begin:] - alone).abs().max() > 1e-3


def test_some_entries_of_the_vocabulary(tokens, tmp_path):
    "A teacher with padded entries, and a student without them, or with more."
    cache, b = write(tokens, tmp_path/'c', teacher=teacher(vocab_size=150), method='topk', k=128, vocab=128, dtype='float32'), batches(tokens)
    model = student()
    live = teacher(vocab_size=150)
    with torch.no_grad(): p = live(input_ids=b[0][:, :-1]).logits[..., :128].flatten(0, 1).softmax(-1)
    q = model(input_ids=b[0][:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    want = (p * (p.log() - q)).sum(-1).mean()
    loss, _, g = step(Cached(cache, 0, 1), model, b)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g, grads(want, model), rtol=1e-4, atol=1e-6)
    Cached(cache).ready(student(vocab_size=130), b, config())
    with pytest.raises(ValueError, match="the student's vocabulary has 120 entries, the cache's 128: write it with `vocab=120`"):
        Cached(cache).ready(student(vocab_size=120), b, config())


def test_it_says_what_it_is(tokens, tmp_path):
    cache = write(tokens, tmp_path/'c', method='topk', k=4, temperature=2.)
    hash_, size = cache.identity['teacher'], cache.manifest['bytes_per_token']
    assert repr(cache)==f"Cache(c: top 4 at temperature 2 of teacher {hash_}, 640 tokens in 40 windows, {size:g} bytes a token)"
    shown = cache._repr_html_()
    assert 'the 4 likeliest ids, at temperature 2' in shown and 'in 5 shards' in shown and shown.count('<tr>')==shown.count('</tr>')==7
    assert '10 draws' in repr(write(tokens, tmp_path/'<d>', draws=10)) and '&lt;d&gt;' in Cache(tmp_path/'<d>')._repr_html_()


# What does not belong to it

def config(**kw): return SimpleNamespace(**dict(steps=10, short_len=0, separate=False) | kw)

def test_another_run_is_refused_by_name(tmp_path, tokens):
    cache, model = write(tokens, tmp_path/'c'), student()
    ready = lambda b, **kw: Cached(cache).ready(model, b, config(**kw))
    ready(batches(tokens))
    other = write_tokens(tmp_path/'other', 1000, seed=1)
    path = other.folder/'manifest.json'
    path.write_text(path.read_text().replace('t' * 16, 'u' * 16))
    for b,kw,names in [(batches(write_tokens(tmp_path/'text', 1000, seed=1)), {}, [r'text \(0{16} in the cache, 0{15}1 here\)']),
                       (batches(Tokens(other.folder)), {}, ['text', 'tokenizer']), (batches(tokens, 8), {}, [r'seq_len \(16 in the cache, 8 here\)']),
                       (batches(tokens), dict(separate=True), ['separate'])]:
        with pytest.raises(ValueError, match='does not fit this run: ' + '.*'.join(names)): ready(b, **kw)
    message = '`short_len` is 8, but the cache knows what the teacher says in windows of 16 tokens'
    with pytest.raises(ValueError, match=message): ready(batches(tokens), short_len=8)
    with pytest.raises(ValueError, match=r'does not fit this run: teacher \('): cache.check(batches(tokens), 10, teacher=teacher(seed=9))
    cache.check(batches(tokens), 10, teacher=teacher())
    with pytest.raises(ValueError, match='`windows` is None'): Cached(cache)(model, batches(tokens)[0])


def test_a_cache_that_is_too_short_says_how_far_it_goes(tokens, tmp_path):
    cache, model = write(tokens, tmp_path/'c', rows=42), student()
    Cached(cache).ready(model, batches(tokens), config(steps=10))
    message = "serves 10 steps of this run, which has 11: it holds 42 of the text's 62 windows. Write one with `rows=44`, or train for 10"
    with pytest.raises(ValueError, match=message):
        Cached(cache).ready(model, batches(tokens), config(steps=11))
    with pytest.raises(ValueError, match='`rows=20000`'): Cached(cache).ready(model, batches(tokens), config(steps=5000))
    with pytest.raises(ValueError, match=r'serves 0 steps .* those that come first with seed 3'): Cached(cache).ready(model, batches(tokens, seed=4), config())
    assert [cache.serves(batches(tokens, batch_size=n), 100) for n in (1, 8, 42)]==[42, 5, 1]
    missing = batches(tokens).window_ids(11, 0, 4)
    with pytest.raises(ValueError, match=r'is not in the cache `.*`, which holds 42 windows'): Cached(cache)(model, batches(tokens)[11], windows=missing)


def test_an_epoch_serves_every_order(tokens, tmp_path):
    cache, model, b = write(tokens, tmp_path/'c', rows=None), student(), batches(tokens, seed=11)
    Cached(cache).ready(model, b, config(steps=10**6))
    part = write(tokens, tmp_path/'d', batches=b, rows=8)
    torch.testing.assert_close(step(Cached(cache), model, b, 1)[2], step(Cached(part), model, b, 1)[2], rtol=1e-2, atol=1e-3)
    assert write(tokens, tmp_path/'c', rows=None, batches=b).key==cache.key             # the same for everyone


def test_a_mixture(tokens, tmp_path):
    "Its small source comes round before the large one has ended; what covers all of it serves other weights."
    parts = dict(a=write_tokens(tmp_path/'a', 100), b=tokens)
    mixed = lambda w, seed=3: Batches(Mixture(parts, dict(a=w, b=1 - w)), 16, 4, seed)
    b, model = mixed(.5), student()
    cache = write(tokens, tmp_path/'c', batches=b, rows=48)
    assert len(cache.windows)==6 + 24 and cache.serves(b, 100)==12
    Cached(cache).ready(model, b, config(steps=12))
    message = r"serves \d steps .* those that come first with mixture \['1/2', '1/2'\]"
    with pytest.raises(ValueError, match=message): Cached(cache).ready(model, mixed(.25), config(steps=12))
    with pytest.raises(ValueError, match=r'does not fit this run: text \('): Cached(cache).ready(model, batches(tokens), config())
    Cached(write(tokens, tmp_path/'d', batches=b, rows=None)).ready(model, mixed(.125, 9), config(steps=1000))


def test_rows_beyond_an_epoch_are_written_once(tokens, tmp_path):
    assert write(tokens, tmp_path/'c', rows=500).account['tokens']==62 * 16


@pytest.mark.parametrize('kw,named', [(dict(teacher=teacher(seed=9)), r'teacher \('), (dict(rows=20), r'rows \(40 there, 20 here\)'), (dict(draws=51), 'draws'),
    (dict(method='topk'), r'method \(sample there, topk here\)'), (dict(separate=True), 'separate'), (dict(seed=1), 'seed_of_draws'),
    (dict(precision='bf16'), 'precision'), (dict(shard_rows=7), 'shard_rows')])
@pytest.mark.parametrize('finished', [True, False])
def test_a_folder_keeps_to_its_cache(tokens, tmp_path, kw, named, finished):
    stop = lambda: not finished
    try: write(tokens, tmp_path/'c', stop=stop)
    except KeyboardInterrupt: pass
    before = {f: f.read_bytes() for f in (tmp_path/'c').iterdir()}
    with pytest.raises(ValueError, match=f'holds another cache: .*{named}.*Give this one a folder of its own'): write(tokens, tmp_path/'c', **kw)
    assert {f: f.read_bytes() for f in (tmp_path/'c').iterdir()}==before


def test_a_folder_with_other_files_is_left_alone(tokens, tmp_path):
    (tmp_path/'thesis.txt').write_text('important')
    with pytest.raises(ValueError, match=r'holds other files \(thesis.txt\)'): write(tokens, tmp_path)


# Damage

def test_damage_is_named_and_mended(tokens, tmp_path):
    out = tmp_path/'c'
    cache, windows = write(tokens, out), batches(tokens).window_ids(2, 0, 4)
    before, path = contents(out), out/'shard-00001.safetensors'                       # rows 8 to 15
    path.write_bytes(before[path.name][:-7])
    with pytest.raises(ValueError, match=r'shard `.*shard-00001.safetensors` is damaged \([\d,]+ bytes instead of'): Cache(out)
    path.unlink()
    with pytest.raises(ValueError, match=r'shard `.*shard-00001.safetensors` is missing: .*call `cache_teacher` again'): Cache(out)
    assert write(tokens, out).key==cache.key and contents(out)==before
    path.write_bytes(before[path.name][:-7] + b'damaged')
    with pytest.raises(ValueError, match=r'shard `.*shard-00001.safetensors` is not as it was written'): Cache(out).read(windows)
    Cache(out).read(batches(tokens).window_ids(0, 0, 4))                              # the other shards are sound
    Cache(out, verify=False).read(windows)
    (out/'windows.bin').write_bytes(before['windows.bin'][::-1])
    with pytest.raises(ValueError, match='`.*windows.bin` is missing or damaged'): Cache(out)
    (out/'windows.bin').unlink()
    path.unlink()
    assert write(tokens, out).key==cache.key and contents(out)==before
    for text in '', '{"identity": {}}', '[]':
        (out/'manifest.json').write_text(text)
        with pytest.raises(ValueError, match='`.*manifest.json` is damaged, or of another version'): Cache(out)


def test_no_cache_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'holds no finished cache \(no manifest.json\): write one with `cache_teacher`'): Cache(tmp_path/'nowhere')


def test_few_shards_are_open_at_a_time(tokens, tmp_path):
    write(tokens, tmp_path/'c', rows=None, shard_rows=1)
    cache, b = Cache(tmp_path/'c', keep=3), batches(tokens, batch_size=8)
    first = [cache.read(b.window_ids(i, 0, 8)) for i in range(5)]
    assert len(cache._open)==3
    for i in range(5): assert all(torch.equal(x, y) for x,y in zip(first[i], Cache(tmp_path/'c').read(b.window_ids(i, 0, 8)), strict=True))


@pytest.mark.parametrize('kw,message', [(dict(method='top'), "`method` is 'top'; choose one of sample, topk"),
    (dict(draws=0), '`draws` is 0; it must lie between 1 and 255'), (dict(draws=256), '`draws` is 256'),
    (dict(k=0), '`k` is 0'), (dict(method='topk', k=129), '`k` is 129; the vocabulary has 128 entries'),
    (dict(temperature=2.), "`temperature` is 2.0; draws are made at 1: choose `method='topk'`"), (dict(method='topk', temperature=0), '`temperature` is 0'),
    (dict(dtype='int8'), "`dtype` is 'int8'"), (dict(rows=0), '`rows` is 0'), (dict(vocab=129), "`vocab` is 129; the teacher's vocabulary has 128 entries"),
    (dict(precision='fp8'), "`precision` is 'fp8'"), (dict(process=(2, 2)), r'`process` is \(2, 2\)'), (dict(micro_batch_size=0), '`micro_batch_size` is 0'),
    (dict(shard_rows=0), '`shard_rows` is 0'), (dict(chunk=0), '`chunk` is 0')])
def test_impossible_settings(tokens, tmp_path, kw, message):
    with pytest.raises(ValueError, match=message): write(tokens, tmp_path/'c', **kw)
    assert not (tmp_path/'c').exists()
