"fitness: the loss against a naive one, losses that survive kills, races against brute force, and real processes of which one dies and one is slow."
import hashlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel  # MATH is the only CPU kernel that the counter knows
from torch.utils.flop_counter import FlopCounterMode

from slm_begin.data import read_lines
from slm_begin.fitness import Fitness, Jury, Objective, OutOfMemory, Scores, Workers, as_fitness, latency, measure_job, spread, teacher_hash, worse
from slm_begin.search import search
from slm_begin.space import ParamBin, SearchSpace
from slm_begin.supernet import Supernet

quickly = settings(deadline=None, max_examples=60, derandomize=True, database=None)

pytestmark = pytest.mark.usefixtures('one_thread')


def windows(n=8, t=34, seed=0): return torch.randint(128, (n, t + 1), generator=torch.Generator().manual_seed(seed))

@cache
def tiny(): return Supernet(tiny_model(), 'tiny')

@cache
def crowd(n=10):
    "A space, a bin, and some different sub-networks of it; the same in every process."
    space, rng, found = SearchSpace(tiny(), round_to=dict(embd=8, ffn=8)), random.Random(0), {}
    bin = ParamBin.around(tiny().count(tiny().full), .5, .1)
    while len(found) < n: found.setdefault((s := space.sample(rng, bin)).key, s)
    return space, bin, list(found.values())

def some(n=10): return crowd(n)[2]

def naive(sub, rows):
    "Loss of each next token, in float64 from the Hugging Face logits, token by token."
    with torch.no_grad(): logits = tiny().extract(sub).eval().double()(input_ids=rows[:, :-1]).logits.numpy()
    return np.array([[math.log(sum(math.exp(x - z[goal]) for x in z)) for z, goal in zip(row, ids[1:])] for row, ids in zip(logits, rows.tolist())])


# Losses

@pytest.mark.parametrize('t,parts', [(16, 1), (17, 1), (34, 2), (64, 2), (37, 37)])
def test_the_loss_is_the_cross_entropy_of_each_part_of_each_window(t, parts):
    "In the spread order: of five windows the first, the last, the middle one, ..."
    rows = windows(5, t)
    for sub in tiny().full, some()[0]:
        got, expected = Fitness(tiny(), rows, batch=2).score(sub), naive(sub, rows)[[0, 4, 2, 1, 3]]
        assert got.shape==(5, parts) and got.dtype==np.float64
        assert np.abs(got - expected.reshape(5, parts, -1).mean(-1)).max() < 1e-5
        assert Fitness(tiny(), rows)(sub)==pytest.approx(expected.mean(), abs=1e-5)


def test_a_part_is_the_largest_divisor_up_to_32_tokens():
    for t in *range(1, 300), 1021, 1024:
        fitness = Fitness(tiny(), torch.zeros(1, t + 1, dtype=torch.long))
        assert t//fitness.parts==max(d for d in range(1, 33) if t%d==0) and t%fitness.parts==0
    assert [Fitness(tiny(), torch.zeros(1, t + 1, dtype=torch.long)).parts for t in (17, 128, 257)]==[1, 4, 257]


def test_every_beginning_of_the_order_is_spread_evenly():
    for n in range(1, 130): assert sorted(spread(n))==list(range(n))
    for m in range(8):                                              # 2**m of 128: one in each stretch of that many
        assert sorted(i*2**m//128 for i in spread(128)[:2**m])==list(range(2**m))


def test_pieces_are_what_one_call_gives():
    fitness, sub = Fitness(tiny(), windows(7), batch=3), some()[0]
    pieces = [fitness.score(sub, *span) for span in [(0, 1), (1, 2), (2, 6), (6, None)]]
    assert np.abs(np.concatenate(pieces) - fitness.score(sub)).max() < 1e-5 and fitness.score(sub).shape==(7, 2)


def test_the_price_is_what_pytorch_counts():
    fitness = Fitness(tiny(), windows(6))
    for sub in some(3):
        for n in 1, 4, 6:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted: fitness.score(sub, 0, n)
            assert fitness.price(sub, n)==(n*34, pytest.approx(counted.get_total_flops(), rel=.01))
        assert fitness.price(sub)==fitness.price(sub, 6) and fitness.price(sub, 0)==(0, 0)


def test_the_key_is_of_teacher_windows_and_precision():
    "And of nothing else: not of the object, nor of how the measuring is done."
    rows, other = windows(), windows()
    other[3, 5] += 1
    key = Fitness(tiny(), rows).key
    assert key==Fitness(Supernet(tiny_model()), rows.clone(), batch=1, keep=0, ahead=True).key and len(key)==16
    changed = tiny_model()
    with torch.no_grad(): changed.gpt_neox.layers[1].mlp.dense_h_to_4h.bias[-1] += 1e-3
    others = [Fitness(tiny(), other), Fitness(tiny(), rows[:7]), Fitness(tiny(), rows[:, :-1]), Fitness(tiny(), rows, precision='bf16'),
              Fitness(Supernet(tiny_model(seed=1)), rows), Fitness(Supernet(changed), rows)]
    assert len({key, *(f.key for f in others)})==7


def test_the_key_is_of_the_shape_of_the_windows():
    "Two windows of 16 tokens are not one of 32."
    rows = windows(2, 15)
    assert Fitness(tiny(), rows).key!=Fitness(tiny(), rows.view(1, 32)).key


def test_a_teacher_with_large_parameters_has_a_hash():
    "An embedding of 50,304 x 512, as Pythia-70m has: of its last entry, too, which float32 rounds up to one that is not there."
    net = namedtuple('Net', 'config model stored')(tiny().config, torch.nn.Module(), None)
    net.model.register_buffer('embedding', torch.zeros(50_304, 512, dtype=torch.uint8))
    before = teacher_hash(net)
    net.model.embedding[-1, -1] = 1
    assert teacher_hash(net)!=before


def test_bf16_is_close_to_fp32():
    rows = windows(2)
    for sub in some(3):
        exact, rough = Fitness(tiny(), rows).score(sub), Fitness(tiny(), rows, precision='bf16').score(sub)
        assert 0 < np.abs(exact - rough).max() < .02*exact.mean()


@pytest.mark.parametrize('rows', [windows()[0], windows()[:0], windows()[:, :1], windows().float(), windows()[None]], ids=str)
def test_windows_that_are_none_are_refused(rows):
    with pytest.raises(ValueError, match='must hold token ids'): Fitness(tiny(), rows)


@pytest.mark.parametrize('rows', [windows() > 9, windows() + 1, windows() - 1], ids=['bool', 'beyond the vocabulary', 'negative'])
def test_windows_of_what_is_no_token_are_refused(rows):
    with pytest.raises(ValueError, match='token'): Fitness(tiny(), rows)


@pytest.mark.parametrize('dtype', [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_type_are_the_same_ids(dtype):
    plain, other = Fitness(tiny(), windows(2)), Fitness(tiny(), windows(2).to(dtype))
    assert np.array_equal(plain.score(some()[0]), other.score(some()[0])) and plain.key==other.key


@pytest.mark.parametrize('kw,message', [(dict(batch=0), '`batch` is 0'), (dict(precision='fp8'), "`precision` is 'fp8'")])
def test_settings_that_are_none_are_refused(kw, message):
    with pytest.raises(ValueError, match=message): Fitness(tiny(), windows(), **kw)


# Memory

class Crowded(Fitness):
    "No memory for a forward pass of more than `room` windows; `sizes` are those of the passes that were tried."
    def __init__(self, *args, room, error, **kw):
        super().__init__(*args, **kw)
        self.room, self.error, self.sizes = room, error, []
    def model(self, sub):
        found = super().model(sub)
        def watch(module, args, kw):
            self.sizes.append(len(kw['input_ids']))
            if self.sizes[-1] > self.room: self.error()
        if not found._forward_pre_hooks: found.register_forward_pre_hook(watch, with_kwargs=True)
        return found

def cuda_says(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
def python_says(): raise MemoryError
def pytorch_says(): torch.empty(2**50, dtype=torch.uint8)           # a thousand terabytes: what the CPU allocator really says

@pytest.mark.parametrize('error', [cuda_says, python_says, pytorch_says])
def test_memory_that_runs_out_halves_the_batch(error):
    crowded, sub = Crowded(tiny(), windows(8), batch=8, room=2, error=error), some()[0]
    assert np.abs(crowded.score(sub) - Fitness(tiny(), windows(8)).score(sub)).max() < 1e-5
    assert crowded.sizes==[8, 4, 2, 2, 2, 2] and crowded.batch==2
    crowded.score(some()[1])                                        # the next one begins where this one fitted
    assert crowded.sizes[6:]==[2, 2, 2, 2]
    crowded.room = 0
    with pytest.raises(OutOfMemory, match='not even one window of 34 tokens'): crowded.score(sub)
    assert crowded.sizes[10:]==[2, 1] and not crowded._cut and issubclass(OutOfMemory, MemoryError)


def test_other_errors_are_not_taken_for_it():
    def bug(): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    crowded = Crowded(tiny(), windows(), room=0, error=bug)
    with pytest.raises(RuntimeError, match='mat1'): crowded.score(some()[0])
    with pytest.raises(RuntimeError, match='mat1'): measure_job(crowded, some()[0], 0, 1)
    assert crowded.batch==8 and len(crowded.sizes)==2


def test_a_jury_notes_it_and_goes_on(tmp_path):
    "A candidate that does not fit is the last one, now and when it is read again."
    large = {s.key for s in sorted(some(), key=tiny().count)[-4:]}
    class Large(Fitness):
        def model(self, sub): return cuda_says() if sub.key in large else super().model(sub)
    jury = Jury(Large(tiny(), windows(4), batch=1), Scores(tmp_path))
    [ranked] = jury.best([some()], len(some()))
    assert {s.key for s in ranked[6:]}==large and len(ranked)==10
    assert {k for k, v in Scores(tmp_path).known.items() if v.error=='out of memory'}==large
    assert jury.best([some()], 2)==[ranked[:2]] and jury.mean(ranked[-1])==jury.estimate(ranked[-1], ranked[0])==math.inf


# What stays cut out

def counted(monkeypatch):
    "How often each sub-network is cut out."
    cut, extract = Counter(), tiny().extract
    def counting(sub):
        cut[sub.key] += 1
        return extract(sub)
    monkeypatch.setattr(tiny(), 'extract', counting)
    return cut

@pytest.mark.parametrize('room,kept', [(0, 1), (1.5, 1), (2.5, 2), (100, 4)])
def test_models_are_kept_within_bounds(monkeypatch, room, kept):
    "The latest ones, as far as `keep` goes, and the one at work in any case."
    cut, subs = counted(monkeypatch), some(4)
    size = 4*max(tiny().count(s) for s in subs)
    fitness = Fitness(tiny(), windows(1), keep=int(room*size))
    for s in subs: fitness.score(s)
    assert list(fitness._cut)==[s.key for s in subs][-kept:]
    for s in subs[-kept:]: fitness.score(s)
    assert sum(cut.values())==4


def test_ahead_in_a_thread_gives_the_same(monkeypatch):
    cut, subs = counted(monkeypatch), some()
    ahead, plain, got = Fitness(tiny(), windows(2), ahead=True), Fitness(tiny(), windows(2)), []
    ahead.prepare(subs[0])
    for s, later in zip(subs, [*subs[1:], subs[0]]):
        ahead.prepare(later)
        got.append(ahead.score(s))
    assert set(cut.values())=={1} and plain._threads is None
    assert np.array_equal(got, [plain.score(s) for s in subs])


def test_what_is_prepared_is_not_thrown_away(monkeypatch):
    "Large models: not even one fits into `keep`."
    cut = counted(monkeypatch)
    fitness = Fitness(tiny(), windows(1), keep=0, ahead=True)
    fitness.prepare(some()[0])
    for s, later in zip(some(), some()[1:]):
        fitness.prepare(later)
        fitness.score(s)
    assert set(cut.values())=={1}


def test_two_are_never_built_at_the_same_time(monkeypatch):
    "`no_init_weights` puts empty functions into torch.nn.init for everyone: where two of them overlap, they stay there, and no model is initialised any more."
    from transformers import initialization
    inside, most = set(), [0]
    @contextmanager
    def watched():
        inside.add(threading.get_ident())
        time.sleep(.05)
        most[0] = max(most[0], len(inside))
        yield
        inside.remove(threading.get_ident())
    monkeypatch.setattr(initialization, 'no_init_weights', watched)
    Jury(Fitness(tiny(), windows(1), ahead=True), confidence=1).read(some(3), 1)
    assert most==[1]


# Scores

def table(*rows): return np.array(rows, float)

def knowledge(scores): return {k: (v.losses.tolist(), v.seconds.tolist(), v.error) for k, v in scores.known.items()}

def test_a_line_torn_anywhere_loses_nothing_else(tmp_path):
    scores = Scores(tmp_path, 'k')
    steps = [('a', 0, table([1.25, 2]), .5), ('b', 0, table([3, 4.]), .25), ('a', 1, table([5, 6.], [7, 8]), 1.)]
    for s in steps: scores.add(*s)
    whole, path = scores.path.read_bytes(), tmp_path/'scores-k.jsonl'
    start = whole.rindex(b'{')
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        again = Scores(tmp_path, 'k')
        assert again.pieces('a')==(1 if cut < len(whole) - 1 else 3) and again.get('b').losses.tolist()==[[3, 4]]
        if again.pieces('a')==1: again.add(*steps[2])
        again.add('c', 0, table([9, 9.]), .5)
        assert knowledge(Scores(tmp_path, 'k'))==knowledge(again)
        assert again.get('a').losses.tolist()==[[1.25, 2], [5, 6], [7, 8]] and again.get('a').seconds.tolist()==[.5, .5, .5]


def test_what_is_read_later_is_what_was_used(tmp_path):
    "To the last bit, though it is written with six decimals."
    scores, losses = Scores(tmp_path), np.random.default_rng(0).normal(5, 1, (4, 3))
    scores.add('a', 0, losses, .1234567)
    assert np.array_equal(Scores(tmp_path).get('a').losses, scores.get('a').losses) and np.abs(scores.get('a').losses - losses).max() <= 5.1e-7
    assert knowledge(Scores(tmp_path))==knowledge(scores) and Scores().get('a') is None and Scores(tmp_path, 'another').pieces('a')==0


def test_two_searches_write_to_one_file(tmp_path):
    "At the same time: no line is lost or torn, and where both have measured the same, it is there once."
    def write(name):
        mine = Scores(tmp_path)
        for i in range(100):
            mine.add(f'{name}{i}', 0, table([i, .5]*50), .5)
            mine.add(f'both{i}', 0, table([i, .5]*50), .5)
            mine.add(f'both{i}', 1, table([i, .25]*50), .5)
    threads = [threading.Thread(target=write, args=(name,)) for name in 'ab']
    for t in threads: t.start()
    for t in threads: t.join()
    again = Scores(tmp_path)
    assert len(read_lines(again.path))==sum(map(bool, again.path.read_text().splitlines()))==600 and len(again)==300
    assert all(again.get(f'{name}{i}').losses.tolist()==[[i, .5]*50] for name in 'ab' for i in range(100))
    assert all(again.get(f'both{i}').losses.tolist()==[[i, .5]*50, [i, .25]*50] for i in range(100))


def test_two_searches_read_in_different_pieces(tmp_path):
    "One races, the other reads in full: both sets of lines together are as good as the longer one."
    racing, full, losses = Scores(tmp_path), Scores(tmp_path), table(*([i, .5] for i in range(8)))
    racing.add('a', 0, losses[:1], .5)
    full.add('a', 0, losses[:4], .5)
    full.add('a', 4, losses[4:], .5)
    racing.add('a', 1, losses[1:2], .5)
    assert Scores(tmp_path).get('a').losses.tolist()==losses.tolist()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_an_error(tmp_path, bad):
    "Written as JSON that anyone can read, and final: nothing is added to it later."
    scores = Scores(tmp_path)
    scores.add('a', 0, table([1., bad]), .5)
    scores.add('b', 0, table([1, 2.], [3, 4]), .5)
    scores.add('b', 2, table([bad, 2.]), .25)
    scores.add('c', 0, np.zeros((0, 2)), .5, 'out of memory')
    for key in 'abc': scores.add(key, scores.pieces(key), table([1, 2.]), .5)
    def refuse(constant): raise AssertionError(constant)
    for line in scores.path.read_text().splitlines(): json.loads(line, parse_constant=refuse)
    for s in scores, Scores(tmp_path):
        assert {k: v.error for k, v in s.known.items()}==dict(a='not a number', b='not a number', c='out of memory')
        assert [s.pieces(k) for k in 'abc']==[0, 2, 0] and s.get('b').losses.tolist()==[[1, 2], [3, 4]] and s.get('b').seconds.sum()==.75


def test_a_gap_is_not_filled_with_what_comes_after_it():
    scores = Scores()
    scores.add('a', 2, table([1, 2.]), .5)
    scores.add('b', 0, table([1, 2.]), .5)
    scores.add('b', 2, table([3, 4.]), .5)
    assert scores.get('a') is None and scores.get('b').losses.tolist()==[[1, 2]]


# A race

Sub = namedtuple('Sub', 'key')

class Table:
    "A fitness that looks the losses up, and counts the windows that each has read."
    key = 'table'
    def __init__(self, losses):                                     # (candidates, windows, parts)
        self.losses, (n, self.pieces, self.parts) = np.round(losses, 6), losses.shape
        self.subs, self.read = [Sub(hashlib.sha256(bytes([i, n])).hexdigest()[:16]) for i in range(n)], Counter()
        self.at = {s.key: o for s, o in zip(self.subs, self.losses)}
    def price(self, sub, pieces=None): return (n := self.pieces if pieces is None else pieces)*10, n*(1000 + int(sub.key[:2], 16))
    def prepare(self, sub): pass
    def score(self, sub, start=0, stop=None):
        assert start==self.read[sub.key] < stop <= self.pieces      # one after the other, none twice
        self.read[sub.key] = stop
        return self.at[sub.key][start:stop]
    def true(self, s): return m if math.isfinite(m := float(self.at[s.key].mean())) else math.inf
    def top(self, k): return sorted(self.subs, key=lambda s: (self.true(s), s.key))[:k]

def texts(n, pieces, parts, seed, spread=.1, noise=.05, hard=1.):
    "Losses as they are: text is more or less hard, for all alike; candidates differ less, and a part of that is noise."
    rng = np.random.default_rng(seed)
    noise = noise*rng.normal(size=(n, pieces, parts))
    return 5 + hard*rng.normal(size=(1, pieces, parts)) + spread*rng.normal(size=(n, 1, 1)) + noise

def raced(losses, k, confidence=.999, times=1):
    fitness = Table(losses)
    jury = Jury(fitness, confidence=confidence)
    [found] = jury.best([fitness.subs*times], k)
    return fitness, jury, found


sizes = dict(n=st.integers(1, 12), k=st.integers(1, 14), pieces=st.integers(1, 9), parts=st.integers(1, 3), seed=st.integers(0, 10**6))

@quickly
@given(**sizes, ties=st.booleans(), broken=st.floats(0, 1), times=st.integers(1, 2))
def test_without_racing_it_is_brute_force(n, k, pieces, parts, seed, ties, broken, times):
    "Also with ties, candidates without a loss (from any window on), fewer candidates than seats, and some named twice."
    losses, rng = texts(n, pieces, parts, seed), np.random.default_rng(seed)
    if ties: losses = losses.round()
    for i in np.flatnonzero(rng.random(n) < broken/2): losses[i, rng.integers(pieces):] = math.nan
    fitness, jury, found = raced(losses, k, 1, times)
    assert found==fitness.top(k)
    assert all(fitness.read[s.key]==pieces for s in fitness.subs) and jury.account['tokens']==jury.account['measured_tokens']==10*n*pieces


@quickly
@given(**sizes, ties=st.booleans(), broken=st.floats(0, 1), confidence=st.sampled_from([.5, .9, .999]))
def test_whatever_the_losses_a_race_ends_in_order(n, k, pieces, parts, seed, ties, broken, confidence):
    "As many as there are seats, no one twice, sorted, none without a loss before one with; and it never reads more than without racing."
    losses, rng = texts(n, pieces, parts, seed), np.random.default_rng(seed)
    if ties: losses = losses.round()
    losses[np.flatnonzero(rng.random(n) < broken/2)] = math.nan
    fitness, jury, found = raced(losses, k, confidence, 2)
    assert len({s.key for s in found})==len(found)==min(k, n)
    assert found==jury.sorted(found) and all(0 < fitness.read[s.key] <= pieces for s in fitness.subs)
    fine = {s.key for s in fitness.subs if fitness.true(s) < math.inf}
    assert sum(s.key in fine for s in found)==min(k, len(fine)) and all(s.key in fine for s in found[:len(fine)])
    assert jury.account['measured_tokens']==10*sum(fitness.read.values()) <= jury.account['tokens'] <= 10*n*pieces
    assert jury.account['evaluations']==n and jury.account['flops']==sum(fitness.price(s, jury.asked[s.key])[1] for s in fitness.subs)


@pytest.mark.parametrize('k,noise,saved', [(1, .05, .7), (6, .05, .5), (1, .2, .3), (6, .2, .1)])
def test_a_race_is_nearly_always_right_and_reads_less(k, noise, saved):
    "Against reading all 16 windows of 24 candidates, over 60 texts; where it is wrong, the one that was missed is hardly better."
    wrong, read, missed = 0, 0, []
    for seed in range(60):
        fitness, jury, found = raced(texts(24, 16, 4, seed, noise=noise), k)
        wrong += {s.key for s in found}!={s.key for s in fitness.top(k)}
        read += sum(fitness.read.values())/(24*16*60)
        missed.append(np.mean([fitness.true(s) for s in found]) - np.mean([fitness.true(s) for s in fitness.top(k)]))
    assert wrong <= 3 and max(missed) < .02 and read < 1 - saved


def test_a_race_is_right_about_candidates_of_which_some_are_noisier():
    "Children of one parent differ little from each other, strangers much: so one pair needs few windows, and another one many."
    wrong = 0
    for seed in range(60):
        losses, noise = texts(24, 16, 4, seed, noise=0), np.random.default_rng(seed + 999)
        losses += .3*10**noise.uniform(-2, .5, (24, 1, 1))*noise.normal(size=losses.shape)
        fitness, jury, found = raced(losses, 6)
        wrong += {s.key for s in found}!={s.key for s in fitness.top(6)}
    assert wrong <= 3


def test_a_candidate_that_loses_its_loss_late_gives_its_seat_back():
    losses = texts(3, 4, 8, 0, noise=.01, spread=0)
    losses[2] += 1                                                  # surely the last after one window, but the only one that has a loss
    losses[:2, 1:] = math.nan
    fitness, jury, found = raced(losses, 1)
    assert found==[fitness.subs[2]]


def test_clear_cases_are_decided_after_one_window():
    "As many as there are seats need no comparison; a gap that is larger than the noise needs no second window; equal ones are read to the end."
    far = texts(8, 16, 32, 0, spread=0, noise=.01) + np.arange(8)[:, None, None]
    for k in 3, 8, 20:
        fitness, jury, found = raced(far, k)
        assert found==fitness.subs[:k] and set(fitness.read.values())=={1}
    fitness, jury, found = raced(np.repeat(texts(1, 16, 4, 0), 5, 0), 2)
    assert found==sorted(fitness.subs)[:2] and set(fitness.read.values())=={16}


def test_candidates_without_any_loss_end_a_race_too():
    fitness, jury, found = raced(np.full((6, 8, 2), math.nan), 4)
    assert found==sorted(fitness.subs)[:4] and set(fitness.read.values())=={1}


def test_groups_race_side_by_side():
    "What each would choose alone; and the order of the list does not matter."
    losses = texts(20, 16, 4, 3)
    fitness = Table(losses)
    groups = [fitness.subs[:7], fitness.subs[7:], []]
    found = Jury(fitness).best(groups, 3)
    alone = [Jury(Table(losses)).best([g], 3)[0] for g in groups]
    assert found==alone==[Jury(Table(losses)).best([g[::-1]], 3)[0] for g in groups] and alone[2]==[]


def test_the_next_race_goes_on_with_what_was_read():
    "Children against those that are in: as good as a race of all, and no window is read twice (`Table` would not allow it)."
    wrong = 0
    for seed in range(20):
        fitness = Table(texts(24, 16, 4, seed))
        jury, top = Jury(fitness), []
        for i in range(0, 24, 8): [top] = jury.best([top + fitness.subs[i:i+8]], 4)
        jury.read(top, 16)
        assert [jury.mean(s) for s in top]==[fitness.true(s) for s in top] and jury.to_go(top[0])==(0, 0)
        wrong += jury.sorted(top)!=fitness.top(4)
    assert wrong <= 1


def test_those_that_have_read_more_are_compared_by_what_all_have_read():
    "On the first window, here, the first one is better; the others are hard for it, and would be for the second one."
    fitness = Table(np.array([[1., 3, 3, 3], [2, 4, 4, 4]])[..., None])
    jury = Jury(fitness)
    jury.read(fitness.subs[:1], 4)
    jury.read(fitness.subs, 1)
    assert [jury.mean(s) for s in fitness.subs]==[2.5, 2] and jury.sorted(fitness.subs[::-1])==fitness.subs
    assert jury.account['tokens']==50 and jury.to_go(fitness.subs[1])[0]==30


def test_an_estimate_corrects_for_hard_and_easy_windows():
    "Exact for one that is worse by the same everywhere, however little it has read; and measured once it is read in full."
    losses = texts(2, 8, 2, 0, noise=0)
    fitness = Table(losses)
    reference, other = fitness.subs
    jury = Jury(fitness)
    jury.read([reference], 8)
    for n in 1, 2, 8:
        jury.read([other], n)
        assert jury.estimate(other, reference)==pytest.approx(losses[1].mean(), abs=2e-6)
    assert jury.estimate(other, reference)==jury.mean(other)==fitness.true(other)


@pytest.mark.parametrize('confidence', [.49, 1.01, 99.9])
def test_no_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match='`confidence` is'): Jury(Table(texts(1, 1, 1, 0)), confidence=confidence)


# What was known before has no say

def asked(scores, losses, confidence=.999, k=4, stop=None):
    "Two generations; the best, and the account without what was measured now."
    fitness = Table(losses)
    fitness.read.update({s.key: scores.pieces(s.key) for s in fitness.subs})
    jury, top = Jury(fitness, scores, confidence, stop=stop), []
    for i in range(0, 24, 12): [top] = jury.best([top + fitness.subs[i:i+12]], k)
    account = jury.account
    return top, {s.key: (jury.asked[s.key], jury.mean(s)) for s in fitness.subs}, account, account.pop('measured_tokens')

@pytest.mark.parametrize('broken', [0, 5])
def test_a_jury_does_not_see_what_others_knew(tmp_path, monkeypatch, broken):
    "Neither who is the best nor the account, seconds included, depends on it; only what is measured now does."
    clock = count()
    monkeypatch.setattr('slm_begin.fitness.time', SimpleNamespace(perf_counter=lambda: next(clock)**1.5))   # each piece takes longer than those before
    losses = texts(24, 16, 4, 7)
    losses[:broken] = math.nan
    first = asked(Scores(tmp_path), losses)
    assert first[-1]==(first[2]['tokens'] if not broken else first[-1]) > 0 and first[2]['tokens'] < 24*16*10
    nothing = asked(Scores(tmp_path), losses)
    assert nothing[:3]==first[:3] and nothing[-1]==0
    everything = asked(Scores(tmp_path), losses, confidence=1)      # reads the rest
    assert everything[-1] > 0 and asked(Scores(tmp_path), losses, confidence=1)[-1]==0
    assert asked(Scores(tmp_path), losses)==nothing


def test_a_jury_does_not_see_errors_that_lie_ahead(tmp_path):
    losses = texts(24, 16, 4, 7)
    losses[Table(losses).subs.index(Table(losses).top(1)[0]), 12:] = math.nan       # the best one, as far as a race reads it
    first = asked(Scores(tmp_path), losses)
    asked(Scores(tmp_path), losses, confidence=1)
    assert asked(Scores(tmp_path), losses)[:3]==first[:3]


def test_stopped_anywhere_and_gone_on(tmp_path):
    "After each measurement: the same best, the same account, and nothing is measured twice."
    losses = texts(24, 8, 4, 5)
    whole, parts, stops = asked(Scores(), losses), Scores(tmp_path), 0
    while True:
        calls = iter(range(1, 10**6))
        try: again = asked(parts, losses, stop=lambda c=calls: next(c)==9)
        except KeyboardInterrupt: stops, parts = stops + 1, Scores(tmp_path)
        else: break
    times = lambda account: {k: v for k, v in account.items() if k!='seconds'}
    assert stops > 3 and again[:2]==whole[:2] and times(again[2])==times(whole[2])
    assert sum(len(o['losses']) for o in read_lines(parts.path))*10==whole[-1]


# Is it surely worse?

# Student's t that a one-sided test must exceed, by degrees of freedom, from printed tables
CRITICAL = {.95: {3: 2.353, 7: 1.895, 15: 1.753, 31: 1.696, 63: 1.669, 127: 1.657}, .999: {3: 10.215, 7: 4.785, 15: 3.733, 31: 3.375, 63: 3.225, 127: 3.156}}

def is_worse(a, b, confidence=.999): return bool(worse(np.stack([np.ravel(a), np.ravel(b)]), confidence)[0, 1])

def critical(df, confidence):
    "The t value from which on `worse` is sure, by bisection."
    unit = np.linspace(-1, 1, df + 1)
    unit /= unit.std(ddof=1)*math.sqrt(df + 1)**-1                  # a mean of t has the t value t
    low, high = 0., 1e4
    for _ in range(60):
        middle = (low + high)/2
        low, high = (low, middle) if is_worse((unit + middle)[None], 0*unit[None], confidence) else (middle, high)
    return high

@pytest.mark.parametrize('confidence,df', [(c, df) for c, values in CRITICAL.items() for df in values])
def test_it_is_students_quantile(confidence, df):
    assert critical(df, confidence)==pytest.approx(CRITICAL[confidence][df], rel=.05 if df > 3 else .1)


def test_it_decides_as_scipy_does():
    stats, rng, same, sure = pytest.importorskip('scipy.stats'), np.random.default_rng(0), 0, 0
    for _ in range(400):
        a = 3 + rng.normal(size=(rng.integers(4, 9), 4))
        b = a + rng.normal(-.6, .8, a.shape)
        p = stats.ttest_rel(a.ravel(), b.ravel(), alternative='greater').pvalue
        if .0008 < p < .00125: continue
        same, sure = same + 1, sure + (p < .001)
        assert is_worse(a, b)==(p < .001), p
    assert same > 350 and 80 < sure < 320


def test_all_pairs_at_once_are_the_pairs():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(7, 12)) + rng.normal(size=(7, 1))
    assert worse(losses, .9).tolist()==[[is_worse(a, b, .9) for b in losses] for a in losses]
    assert worse(losses[:1]).tolist()==[[False]]


def test_it_is_wrong_as_rarely_as_it_says():
    "On noise alone: once in twenty with a confidence of 0.95."
    rng, n = np.random.default_rng(0), 4000
    assert sum(is_worse(rng.normal(size=(2, 8)), np.zeros((2, 8)), .95) for _ in range(n))/n==pytest.approx(.05, abs=.015)


def test_it_never_says_both_and_needs_two_differences():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = rng.normal(size=(2, 2, 3))
        assert not (is_worse(a, b, .6) and is_worse(b, a, .6)) and not is_worse(a, a) and not is_worse(a, b, 1) and not is_worse(a[:1, :1] + 99, a[:1, :1])
    assert is_worse(table([1, 2, 3]), table([0, 1, 2])) and not is_worse(table([0, 1, 2]), table([1, 2, 3]))     # always by the same: no noise at all


# Anything else to minimise

def test_any_function_can_be_asked():
    f = as_fitness(lambda s: tiny().count(s))
    jury = Jury(f)
    assert jury.best([some()], 3)[0]==sorted(some(), key=lambda s: (tiny().count(s), s.key))[:3] and jury.account['tokens']==jury.account['flops']==0
    assert f(tiny().full)==tiny().count(tiny().full) and as_fitness(f) is f
    assert Objective(len, 'a').key==Objective(sum, 'a').key!=Objective(len, 'b').key
    with pytest.raises(TypeError, match='`fitness` is 3'): as_fitness(3)
    assert latency(tiny(), seq_len=8, repeats=1)(some()[0]) > 0


# Real processes

class Member(Fitness):
    "Measures in one of several processes. The first jobs of a race are begun by all at the same time, so that each has one at least."
    def __init__(self, out, rank, members, **kw):
        super().__init__(tiny(), windows(8, 16), **kw)
        self.out, self.rank, self.members, self.jobs = out, rank, members, 0
    def score(self, sub, start, stop):
        self.jobs += 1
        if stop==1:
            (self.out/f'busy-{self.rank}').touch()
            waited(lambda: len(list(self.out.glob('busy-*')))==self.members)
        self.begun(stop)
        return super().score(sub, start, stop)
    def begun(self, stop): pass

class Slow(Member):
    def begun(self, stop): time.sleep(.15)

class Stuck(Member):
    def begun(self, stop):
        if self.jobs==1: time.sleep(1.5)

class Dying(Member):
    def begun(self, stop):
        if stop==1: os.kill(os.getpid(), signal.SIGKILL)

def waited(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)

def searched(fitness, out=None, **kw):
    "A search, small and the same everywhere."
    space, bin, _ = crowd()
    return search(space, bin, fitness, population=10, generations=2, elites=3, mutate=4, crossover=2, immigrants=1, out=out, say=lambda line: None, **kw)

def comparable(result):
    return dict(best=result.best.subnet.key, loss=result.best.loss, history=[{k: v for k, v in h.items() if 'seconds' not in k} for h in result.history],
                account={k: v for k, v in result.account.items() if k not in ('seconds', 'peak_memory_gb')})

def member(out, rank, kinds, patience, leave):
    "A search in the first process; the others help, and write down what they are told."
    workers, fitness = Workers(patience), kinds[rank](out, rank, len(kinds))
    if rank:
        told = workers.serve(fitness)
        return (out/f'told-{rank}.json').write_text(json.dumps([fitness.jobs, told]))
    found = searched(fitness, workers=workers)
    (out/'found.json').write_text(json.dumps([fitness.jobs, comparable(found)]))
    workers.finish(dict(best=found.best.subnet.key))
    if leave: os._exit(0)                                           # a program that ends quickly
    waited(lambda: len(list(out.glob('told-*')))==len(kinds) - 1 - (Dying in kinds))

def together(processes, out, *kinds, patience=20., leave=False):
    "What the first has found; how many jobs each process did; the exit codes."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE=str(len(kinds)), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo', ACCELERATE_USE_CPU='true',
               OMP_NUM_THREADS='1')
    started = [processes(member, out, k, kinds, patience, leave, env={**env, 'RANK': str(k), 'LOCAL_RANK': str(k)}) for k in range(len(kinds))]
    end = time.monotonic() + 60
    for p in started:
        p.join(max(0, end - time.monotonic()))
        if p.exitcode is None: p.kill()                             # it hangs
    jobs, found = json.loads((out/'found.json').read_text())
    told = {int(f.stem[-1]): json.loads(f.read_text()) for f in out.glob('told-*')}
    assert all(t[1]==dict(best=found['best']) for t in told.values())
    return found, {0: jobs, **{k: t[0] for k, t in told.items()}}, [p.exitcode for p in started]

@pytest.fixture(scope='module')
def alone():
    "What one process finds."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield json.loads(json.dumps(comparable(searched(Fitness(tiny(), windows(8, 16))))))
    torch.set_num_threads(before)


def test_three_processes_find_what_one_finds_though_one_is_slow(processes, tmp_path, alone):
    "The same history and account; the slow one merely does less of the work, and all are told the end."
    found, jobs, codes = together(processes, tmp_path, Member, Member, Slow)
    assert found==alone and codes==[0, 0, 0]
    assert set(jobs)=={0, 1, 2} and 0 < jobs[2] < min(jobs[0], jobs[1])


def test_a_killed_process_loses_nothing(processes, tmp_path, alone):
    "In the middle of a job: the first process does it in its place."
    found, jobs, codes = together(processes, tmp_path, Member, Dying, Slow, patience=.3)
    assert found==alone and codes==[0, -signal.SIGKILL, 0] and set(jobs)=={0, 2}


def test_a_process_that_was_given_up_may_come_back(processes, tmp_path, alone):
    "Its job was done by another one meanwhile; what it says of it is not used, and it helps on or is told the end."
    found, jobs, codes = together(processes, tmp_path, Member, Stuck, patience=.1)
    assert found==alone and codes==[0, 0] and set(jobs)=={0, 1}


def test_the_first_may_leave_when_it_has_told_the_others(processes, tmp_path, alone):
    "The table of jobs goes with it, so it must not leave before."
    found, jobs, codes = together(processes, tmp_path, Member, Slow, Slow, leave=True)
    assert found==alone and codes==[0, 0, 0] and set(jobs)=={0, 1, 2}


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_fitness import Fitness, Workers, comparable, searched, tiny, windows
workers, fitness = Workers(), Fitness(tiny(), windows(8, 16))
if workers.main:
    found = comparable(searched(fitness, workers=workers))
    workers.finish(found)
else: found = workers.serve(fitness)
with open(f'{sys.argv[2]}/{"main" if workers.main else "other"}.json', 'w') as f: json.dump(found, f)
"""

@pytest.mark.slow
def test_accelerate_launch_starts_them(tmp_path, alone):
    "On CPUs `accelerate launch --cpu` starts one process only, so here it is told that there are GPUs, and its children that there are none."
    (tmp_path/'script.py').write_text(SCRIPT)
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--main_process_port', '0', tmp_path/'script.py', os.path.dirname(__file__), tmp_path]
    done = subprocess.run(launch, env=os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', ACCELERATE_USE_CPU='true'), timeout=180,
                          capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    assert json.loads((tmp_path/'main.json').read_text())==json.loads((tmp_path/'other.json').read_text())==alone


def test_one_process_has_no_workers():
    assert not Workers.wanted()
    with pytest.raises(ValueError, match='one process only'): Workers()
